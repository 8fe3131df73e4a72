import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sa_engine.storage import RunError, RunLock, RunPaths, atomic_write, read_lock

HOLD_LOCK = """
import sys, time
from pathlib import Path
from sa_engine.storage import RunLock, RunPaths
with RunLock(RunPaths(Path(sys.argv[1])), "theirs"):
    print("held", flush=True)
    time.sleep(60)
"""


def test_atomic_write_replaces_the_whole_file_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "file.json"
    for data in (b"first", b"2nd"):
        atomic_write(path, data)
        assert path.read_bytes() == data
    assert list(path.parent.iterdir()) == [path]


def test_a_failed_write_leaves_no_temporary_file(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError):
        atomic_write(tmp_path / "taken", b"data", scratch=tmp_path / "scratch")
    assert list((tmp_path / "scratch").iterdir()) == []


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


def test_a_lock_of_another_host_is_believed(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    paths.run.mkdir()
    paths.lock.write_text(json.dumps({"host": "elsewhere", "pid": 1, "session": "theirs"}))
    with pytest.raises(RunError, match="process 1 on host elsewhere.*remove"), RunLock(paths, "x"):
        pass
    paths.lock.unlink()
    with RunLock(paths, "ours"):
        pass


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
