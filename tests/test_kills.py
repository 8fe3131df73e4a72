"""A run that is killed, or whose worker dies: nothing is lost, and nothing is half written."""

import json
import os
import random
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
from PIL import Image
from runs import (
    FORKS,
    data_files,
    errors,
    files_of_run,
    in_child,
    markers,
    plan,
    start_driver,
    wait_for_marker,
)
from small_stage import (
    SmallConfig,
    SmallStage,
    drive,
    drive_on_small_disk,
    run,
    small_config,
    work,
)

from sa_engine import runner
from sa_engine.lock import RunLock
from sa_engine.partial import PartialShard
from sa_engine.progress import Interrupted
from sa_engine.storage import RunError, RunPaths


def kill_when(ready: Callable[[], bool], config: SmallConfig, pause_s: float = 0.0) -> bool:
    """Start a driver and kill it a little after something has come true.

    Returns whether it had an image in a process of its own, which is then ended too.
    """
    child = FORKS.Process(target=drive, args=(config,))
    child.start()
    while child.is_alive() and not ready():
        time.sleep(0.002)
    time.sleep(pause_s)
    alone = psutil.Process(child.pid).children() if child.is_alive() else []
    child.kill()
    child.join()
    for process in alone:
        process.kill()
    return bool(alone)


def ended(out: Path) -> int:
    """Images that a run has finished, in shards and out of them."""
    # A walk, as it passes over a folder that the run takes away meanwhile; and before the markers, as a shard's
    # finished images lie about for a moment after its marker is there.
    places = [(Path(at).name, names) for at, _, names in os.walk(RunPaths(out).partial)]
    committed = {stats.name: stats.planned for stats in markers(out)}
    loose = [name for shard, names in places if shard not in committed for name in names]
    return sum(name.endswith(".done") for name in loose) + sum(committed.values())


def held(out: Path) -> list[str]:
    """Keys that the workers of a run's unfinished shards have in hand."""
    files = RunPaths(out).partial.glob("*/inflight.json")
    return [key for file in files for key in json.loads(file.read_bytes())["keys"]]


def test_twenty_kills_of_the_driver_on_one_image_never_blame_it(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, slow="coffee.jpg")
    in_hand_alone = 0
    for number in range(20):
        in_hand_alone += kill_when(lambda: "coffee.jpg" in held(out), config, number / 25)
        assert "coffee.jpg" in held(out)
    assert in_hand_alone > 10, "most kills fall while the image is tried alone"
    assert errors(out) == []
    report = run(replace(config, slow=None))
    assert (report.ok, report.failed) == (4, 0)
    assert data_files(out) == expected


@pytest.mark.parametrize("step", ["prepare", "process", "finish"])
def test_an_image_that_crashes_this_process_crashes_it_once(
    photo_folder: Path, tmp_path: Path, step: str
) -> None:
    """The next run tries it alone in a process of its own; its death is laid to the image."""
    out = tmp_path / "out"
    config = small_config(
        photo_folder, out, shard_size=4, kill=f"coffee.jpg:{step}", max_failed=1.0
    )
    assert in_child(drive, config) == -signal.SIGKILL
    assert errors(out) == []
    report = run(config)
    assert (report.ok, report.failed) == (3, 1)
    assert [(row["key"], row["error"]) for row in errors(out)] == [("coffee.jpg", "WorkerDied")]


def test_a_crash_that_does_not_repeat_costs_nothing(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    once = str(tmp_path / "once")
    config = small_config(photo_folder, out, kill="coffee.jpg:process", kill_once=once)
    assert in_child(drive, config) == -signal.SIGKILL
    assert run(config).failed == 0
    assert data_files(out) == expected


def test_a_run_killed_at_random_ends_with_the_bytes_of_one_that_was_not(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    """Twenty kills over thirty shards."""
    folder = tmp_path / "photos"
    folder.mkdir()
    for number in range(60):
        photo = Image.fromarray(photos[number % 4]).reduce(8).rotate(number)
        photo.save(folder / f"{number:02}.jpg")
    run(small_config(folder, tmp_path / "expected"))
    expected = data_files(tmp_path / "expected")
    assert len(expected) == 60
    out = tmp_path / "out"
    config = small_config(folder, out, seconds=0.02)
    generator = random.Random(0)
    for _ in range(20):
        enough = ended(out) + generator.randrange(5)
        kill_when(lambda enough=enough: ended(out) >= enough, config, generator.random() / 50)
        assert data_files(out).items() <= expected.items()
    assert 30 < ended(out) < 60
    report = run(config)
    assert (report.ok, report.failed) == (60, 0)
    assert data_files(out) == expected
    assert files_of_run(out) == ["plan.parquet", "run.json"]


def test_finished_images_of_an_unfinished_shard_are_kept(
    photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=4)
    assert in_child(drive, replace(config, kill="more/rocket.jpg:process")) == -signal.SIGKILL
    store = PartialShard(RunPaths(out), "sa_000000")
    kept = [image_id for image_id in range(1, 5) if store.load(image_id) is not None]
    assert kept[:2] == [1, 2]
    done = store.folder / "1.done"
    done.write_bytes(done.read_bytes()[:-9])  # cut short by a power failure
    # What is taken up again is not the stage's to skip any more.
    report = run(replace(config, skip="chelsea.jpg"))
    assert (report.ok, report.processed) == (4, 4 - len(kept))
    run(small_config(photo_folder, tmp_path / "expected", shard_size=4))
    assert data_files(out) == data_files(tmp_path / "expected")


def test_a_kill_between_any_two_files_leaves_the_whole_shard_or_none(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    shard = {name: digest for name, digest in expected.items() if name.startswith("sa_000000.")}
    for fatal in range(1, 100):
        out = tmp_path / f"out{fatal}"
        config = small_config(photo_folder, out, limit=1)
        exit_code = in_child(drive, config, fatal)
        assert data_files(out).items() <= shard.items(), f"half-written after kill {fatal}"
        if markers(out):
            assert data_files(out) == shard, f"incomplete after kill {fatal}"
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        assert run(config).failed == 0
        assert data_files(out) == shard
        assert files_of_run(out) == ["plan.parquet", "run.json"]
    assert fatal > 10, "a shard of two images replaces that many files"


@pytest.mark.parametrize("killed", [True, False])
def test_a_disk_that_ends_within_a_tar_leaves_none_of_it(
    photo_folder: Path, tmp_path: Path, killed: bool
) -> None:
    config = small_config(photo_folder, tmp_path / "expected", shard_size=4)
    run(config)
    expected = data_files(tmp_path / "expected")
    out = tmp_path / "out"
    limit = (tmp_path / "expected" / "sa_000000.tar").stat().st_size - 1
    exit_code = in_child(drive_on_small_disk, replace(config, out=str(out)), limit, killed)
    assert exit_code == (-signal.SIGXFSZ if killed else 1)
    assert [path.name for path in out.iterdir()] == ["_run"]
    assert run(replace(config, out=str(out))).processed == 0
    assert data_files(out) == expected


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_the_run_and_says_how_to_resume(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str], signum: signal.Signals
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, "local=true", "seconds=0.6")
    wait_for_marker(out, driver)
    time.sleep(0.2)  # into the next image
    driver.send_signal(signum)
    _, stderr = driver.communicate()
    assert driver.returncode == 128 + signum
    assert "stopped: 1 of 2 shards done; resume with: small_stage.py " in stderr
    assert "Traceback" not in stderr
    assert not RunPaths(out).lock.exists()
    assert run(small_config(photo_folder, out)).ok == 4
    assert data_files(out) == expected


def test_a_signal_before_the_plan_leaves_nothing(photo_folder: Path, tmp_path: Path) -> None:
    def stop() -> dict[str, str]:
        os.kill(os.getpid(), signal.SIGTERM)
        return {}

    config = small_config(photo_folder, tmp_path / "out")
    with pytest.raises(Interrupted, match="before the run was planned") as caught:
        runner.run(SmallStage(), config, stop)
    assert caught.value.exit_code == 143
    assert not (tmp_path / "out").exists()


# Workers that die under a living driver


@pytest.mark.parametrize("step", ["prepare", "process", "finish"])
def test_a_poison_image_costs_itself(photo_folder: Path, tmp_path: Path, step: str) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=4, kill=f"chelsea.jpg:{step}")
    with RunLock(plan(config), "living"):
        codes = [in_child(work, config) for _ in range(3)]
    assert codes == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert (markers(out)[0].ok, markers(out)[0].failed) == (3, 1)
    assert [(row["key"], row["error"], row["attempts"]) for row in errors(out)] == [
        ("chelsea.jpg", "WorkerDied", 2)
    ]


def test_a_worker_that_dies_once_costs_nothing(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    once = str(tmp_path / "once")
    config = small_config(photo_folder, out, kill="chelsea.jpg:process", kill_once=once)
    with RunLock(plan(config), "living"):
        assert [in_child(work, config) for _ in range(2)] == [-signal.SIGKILL, 0]
    assert errors(out) == []
    assert run(config).ok == 4
    assert data_files(out) == expected


def test_workers_that_keep_dying_outside_of_images_end_the_run(
    photo_folder: Path, tmp_path: Path
) -> None:
    config = small_config(photo_folder, tmp_path / "out", shard_size=4)
    with RunLock(plan(config), "living"):
        # The second file of a shard's work comes after the first breadcrumb: no image is in hand.
        codes = [in_child(work, config, 2) for _ in range(5)]
        assert codes == [-signal.SIGKILL] * 5
        with pytest.raises(RunError, match="died 5 times on shard sa_000000 .* memory"):
            work(config)


def test_a_worker_without_its_driver_commits_nothing(photo_folder: Path, tmp_path: Path) -> None:
    config = small_config(photo_folder, tmp_path / "out")
    paths = plan(config)
    with RunLock(paths, "another"), pytest.raises(RunError, match="not held by this run"):
        work(config)
    assert markers(paths.out) == []
