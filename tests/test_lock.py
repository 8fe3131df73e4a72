import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sa_engine.lock import RunLock, is_live, read_heartbeat, read_lock
from sa_engine.storage import RunError, RunPaths

HOLD_LOCK = """
import sys, time
from pathlib import Path
from sa_engine.lock import RunLock
from sa_engine.storage import RunPaths
with RunLock(RunPaths(Path(sys.argv[1])), "theirs"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_a_live_run_keeps_others_out_and_a_dead_one_does_not(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out")
    command = [sys.executable, "-c", HOLD_LOCK, str(paths.out)]
    holder = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(RunError, match=f"process {holder.pid} on host"), RunLock(paths, "ours"):
            pass
        assert read_lock(paths)["session"] == "theirs"
    finally:
        holder.send_signal(signal.SIGKILL)
        holder.wait()
    with RunLock(paths, "ours"):
        assert read_lock(paths)["session"] == "ours"
        assert read_lock(paths)["pid"] == os.getpid()


def of_another_host(paths: RunPaths, age_s: float) -> None:
    """Leave what a run on another host leaves that showed its last sign of life so long ago."""
    paths.run.mkdir(parents=True)
    holder = {"host": "elsewhere", "pid": 1, "born": 0.0, "session": "theirs"}
    for path in (paths.lock, paths.heartbeat):
        path.write_text(json.dumps(holder))
        now = path.stat().st_mtime
        os.utime(path, (now - age_s, now - age_s))


def test_a_lock_of_another_host_is_believed_while_its_heart_beats(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    of_another_host(paths, 100)
    message = "process 1 on host elsewhere; its last sign of life is 100 s old.*180 s.*--steal-lock"
    with pytest.raises(RunError, match=message), RunLock(paths, "ours"):
        pass
    assert read_lock(paths)["session"] == "theirs"
    assert is_live(paths)


def test_a_silent_host_is_taken_over(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    of_another_host(paths, 200)
    assert not is_live(paths)
    with RunLock(paths, "ours"):
        assert read_lock(paths)["session"] == "ours"


@pytest.mark.parametrize("where", ["another host", "this process"])
def test_a_stolen_lock_is_no_longer_its_first_holders(tmp_path: Path, where: str) -> None:
    paths = RunPaths(tmp_path)
    theirs = RunLock(paths, "theirs")
    if where == "another host":
        of_another_host(paths, 0)
    else:
        theirs.__enter__()
        assert theirs.held()
    with RunLock(paths, "ours", steal=True) as ours:
        assert ours.held()
        assert not theirs.held()
        if where == "this process":
            theirs.__exit__(None, None, None)
        assert ours.held(), "the first holder's end must not take the lock away"
    assert not paths.lock.exists()


def test_the_heart_beats_and_says_how_far_the_run_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa_engine.lock._BEAT_S", 0.01)
    paths = RunPaths(tmp_path)
    with RunLock(paths, "ours") as lock:
        first = read_heartbeat(paths)
        assert first["session"] == "ours"
        lock.tell(images=3)
        while read_heartbeat(paths).get("images") != 3:
            time.sleep(0.005)
        assert read_heartbeat(paths)["updated"] >= first["updated"] >= first["started"]
        assert is_live(paths)
    assert read_heartbeat(paths) == {}
    assert not is_live(paths)


def test_a_run_that_wrote_nothing_leaves_no_folder(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path / "out")
    with RunLock(paths, "first"):
        assert paths.lock.exists()
    assert not paths.out.exists()
    with RunLock(paths, "second"):
        (paths.out / "file").touch()
    assert [path.name for path in paths.out.iterdir()] == ["file"]


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="cannot write to the output .*file"):
        RunLock(RunPaths(tmp_path / "file"), "ours").__enter__()
