"""What an operator asks of a run's folder: how far it is, and what failed."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from runs import start_driver, wait_for_marker
from small_stage import run, small_config

from sa_engine.cli import main
from sa_engine.failures import by_reason, list_failures, table
from sa_engine.lock import RunLock
from sa_engine.partial import Failure
from sa_engine.status import read_status
from sa_engine.storage import RunError, RunPaths


def sa_engine(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def files(out: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in out.rglob("*")}


# status


def test_a_running_run_says_how_far_it_is_and_when_it_will_end(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sa_engine.cli.runs._WATCH_LOG_S", 0.1)
    out = tmp_path / "out"
    code = (
        "import sys; from sa_engine import lock; lock._BEAT_S = 0.1; sys.argv[0] = 'small_stage.py';"
        "import small_stage; small_stage.main()"
    )
    driver = subprocess.Popen(
        [sys.executable, "-c", code, str(photo_folder), str(out), "local=true", "seconds=0.8"],
        stderr=subprocess.DEVNULL,
    )
    try:
        while not (found := _status_if_planned(out)) or found.images_per_second is None:
            assert driver.poll() is None
            time.sleep(0.05)
        assert (found.state, found.images, found.shards) == ("running", 4, 2)
        assert found.holder["pid"] == driver.pid
        assert 0 < found.done <= 4
        assert 0.1 < found.images_per_second < 2
        assert found.seconds_left == (4 - found.done) / found.images_per_second
        shown = str(found)
        assert f"running (small; process {driver.pid} on " in shown
        assert f"{found.images_per_second:.2f} images/s, about " in shown
        watched = sa_engine("status", out, "--watch", "--json")  # until it is finished
    finally:
        driver.wait()
    states = [json.loads(line) for line in watched.output.splitlines()]
    assert states[-1]["state"] == "finished"
    assert states[-1]["ok"] == 4


def _status_if_planned(out: Path) -> object:
    return read_status(out) if RunPaths(out).info.exists() else None


def test_a_killed_run_is_stopped_and_looked_at_without_a_trace(
    photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, "local=true", "seconds=0.5")
    wait_for_marker(out, driver)
    while not list(RunPaths(out).partial.glob("*/3.done")):
        time.sleep(0.01)
    driver.kill()
    driver.wait()
    before = files(out)
    found = read_status(out)
    assert (found.state, found.committed, found.ok) == ("stopped", 1, 2)
    assert (found.open_shards, found.ended, found.done) == (1, 1, 3)
    assert found.holder == {}
    assert "75.0% of 4 images" in str(found)
    assert "2 images in 1 of 2 shards, 1 more in 1 open shards" in str(found)
    assert "speed" not in str(found)
    assert files(out) == before


def test_a_finished_run_adds_up(photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "empty.jpg").touch()
    out = tmp_path / "out"
    report = run(small_config(photo_folder, out, skip="coffee.jpg", max_failed=0.5))
    found = read_status(out)
    assert (found.state, found.ok, found.skipped, found.failed) == ("finished", 3, 1, 1)
    assert found.masks == report.masks
    result = sa_engine("status", out)
    assert result.exit_code == 0
    assert "100.0% of 5 images" in result.output
    assert f"3 ok, 1 skipped, 1 failed   (see: sa-engine errors {out})" in result.output
    assert json.loads(sa_engine("status", out, "--json").output)["counts"] == {
        "masks": report.masks
    }


def test_a_lock_that_is_held_means_running(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))
    with RunLock(RunPaths(out), "ours"):
        found = read_status(out)
    assert (found.state, found.holder["pid"]) == ("running", os.getpid())
    assert "not known yet" in str(found)


def test_a_run_that_is_being_planned_is_told(tmp_path: Path) -> None:
    with (
        RunLock(RunPaths(tmp_path / "out"), "ours"),
        pytest.raises(RunError, match=f"still being planned, by process {os.getpid()} on "),
    ):
        read_status(tmp_path / "out")


@pytest.mark.parametrize("command", ["status", "errors", "verify"])
def test_a_folder_without_a_run_is_told(tmp_path: Path, command: str) -> None:
    result = sa_engine(command, tmp_path)
    assert result.exit_code == 2
    assert result.output.startswith("Error: ") and str(tmp_path) in result.output


def test_verify_ends_with_1_if_anything_is_wrong(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))
    whole = sa_engine("verify", out, "--num-workers", 1)
    assert (whole.exit_code, "no problem found" in whole.output) == (0, True)
    tar = out / "sa_000000.tar"
    tar.write_bytes(tar.read_bytes()[:-1])
    damaged = sa_engine("verify", out, "--num-workers", 1)
    assert (damaged.exit_code, "problems found: 1" in damaged.output) == (1, True)
    assert "sa_000000.tar: has " in damaged.output


def test_looking_at_a_run_loads_no_heavy_library(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))
    code = (
        "import sys\nfrom sa_engine.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "finally: print(sorted({'torch', 'ray'} & set(sys.modules)))"
    )
    for command in ("status", "errors"):
        done = subprocess.run(
            [sys.executable, "-c", code, command, str(out)], capture_output=True, text=True
        )
        assert done.stdout.splitlines()[-1] == "[]", done


# errors


def failure(key: str, message: str, status: str = "failed") -> Failure:
    return Failure(
        key=key, image_id=1, status=status, step="prepare", error="BadImage", message=message
    )


def test_failures_are_grouped_by_what_they_say() -> None:
    reasons = by_reason(
        [
            failure("a.jpg", "empty"),
            failure("b.jpg", "9 x 7 is too much"),
            failure("c.jpg", "8 x 6 is too much"),
            failure("d.jpg", "empty", "skipped"),
        ]
    )
    assert [(r.count, r.status, r.example.key) for r in reasons] == [
        (2, "failed", "b.jpg"),
        (1, "failed", "a.jpg"),
        (1, "skipped", "d.jpg"),
    ]
    assert table(reasons).splitlines()[:2] == [
        "images  status   step     reason             for example",
        "2       failed   prepare  9 x 7 is too much  b.jpg",
    ]


def test_every_failure_is_told(photo_folder: Path, tmp_path: Path) -> None:
    for name in ("empty1.jpg", "empty2.jpg", "two\nlines.jpg"):
        (photo_folder / name).touch()
    out = tmp_path / "out"
    run(small_config(photo_folder, out, skip="coffee.jpg", max_failed=0.5))
    assert [f.key for f in list_failures(out)] == [
        "coffee.jpg",
        "empty1.jpg",
        "empty2.jpg",
        "two\nlines.jpg",
    ]
    shown = sa_engine("errors", out).output
    assert [line.split()[0] for line in shown.splitlines()[:3]] == ["images", "3", "1"]
    lines = sa_engine("errors", out, "--list").output.splitlines()
    assert len(lines) == 4
    assert lines[0] == "skipped\tcoffee.jpg\tleft out on purpose"
    assert lines[3].startswith("failed\t'two\\nlines.jpg'\t")
    rows = [json.loads(line) for line in sa_engine("errors", out, "--json").output.splitlines()]
    assert [row["key"] for row in rows] == [f.key for f in list_failures(out)]
    with pytest.raises(RunError):
        list_failures(photo_folder)


def test_a_run_without_failures_says_so(photo_folder: Path, tmp_path: Path) -> None:
    run(small_config(photo_folder, tmp_path / "out"))
    assert sa_engine("errors", tmp_path / "out").output == "no image has failed or was skipped\n"


@pytest.mark.parametrize("content", ["", "{}", "[]", '{"schema_version": 1}'])
def test_a_damaged_marker_is_named(photo_folder: Path, tmp_path: Path, content: str) -> None:
    run(small_config(photo_folder, tmp_path / "out"))
    marker = tmp_path / "out" / "sa_000000.json"
    marker.write_text(content)
    result = sa_engine("status", tmp_path / "out")
    assert result.exit_code == 2 and f"{marker}: damaged" in result.output
