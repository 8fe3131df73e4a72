import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from PIL import Image
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
from sa_engine.errors import TooManyFailures
from sa_engine.lock import RunLock
from sa_engine.partial import PartialShard
from sa_engine.plan import read_plan
from sa_engine.progress import Interrupted
from sa_engine.reader import iter_records
from sa_engine.resources import Resources
from sa_engine.run_dir import plan_run, start_run
from sa_engine.shards import ShardStats
from sa_engine.storage import AnyPath, RunError, RunPaths, list_names, sha256_file

KEYS = ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "more/rocket.jpg"]
# Children start from a process that has imported everything, so a hundred of them take seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["small_stage"])


def data_files(out: AnyPath) -> dict[str, str]:
    """Sha256 of every tar and Parquet file."""
    names = sorted(name for name in list_names(out) if name.endswith((".tar", ".parquet")))
    return {name: sha256_file(out / name) for name in names}


def errors(out: Path) -> list[dict[str, Any]]:
    files = sorted(RunPaths(out).errors("x").parent.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def files_of_run(out: Path) -> list[str]:
    """Names of the files beside the shards."""
    return sorted(path.name for path in (out / "_run").rglob("*") if path.is_file())


def markers(out: Path) -> list[ShardStats]:
    return [ShardStats.from_json(path.read_bytes()) for path in sorted(out.glob("sa_*.json"))]


@pytest.fixture
def expected(photo_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The files of an uninterrupted run over `photo_folder`, in two shards."""
    out = tmp_path / "expected"
    run(small_config(photo_folder, out))
    return data_files(out)


def in_child(target: Any, *inputs: Any) -> int:
    """Call a function in a child process; return its exit code, -9 if it was killed."""
    child = FORKS.Process(target=target, args=inputs)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_driver(images: Path, out: Path, *sets: str) -> subprocess.Popen[str]:
    """Start the small stage's own command line."""
    script = Path(__file__).with_name("small_stage.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(images), str(out), *sets],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_marker(out: Path, driver: subprocess.Popen[str]) -> None:
    while not list(out.glob("sa_*.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)


# A run from start to end


def test_a_run_accounts_for_every_image_with_its_reason(photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "broken.jpg").write_bytes((photo_folder / "coffee.jpg").read_bytes()[:500])
    (photo_folder / "empty.png").touch()
    (photo_folder / "gone.jpg").symlink_to("nowhere")
    os.mkfifo(photo_folder / "pipe.jpg")
    (photo_folder / "notes.txt").touch()
    out = tmp_path / "out"
    config = small_config(photo_folder, out, skip="coffee.jpg", max_failed=0.5)
    report = run(config)
    assert (report.planned, report.ok, report.skipped, report.failed) == (8, 3, 1, 4)
    assert report.masks == sum(len(record.masks) for record in iter_records(out)) > 3
    assert report.processed == 8
    assert {(row["key"], row["status"], row["step"]) for row in errors(out)} == {
        ("broken.jpg", "failed", "prepare"),
        ("coffee.jpg", "skipped", "prepare"),
        ("empty.png", "failed", "prepare"),
        ("gone.jpg", "failed", "read"),
        ("pipe.jpg", "failed", "read"),
    }
    messages = {row["key"]: row["message"] for row in errors(out)}
    assert "Truncated" in messages["broken.jpg"]
    assert messages["pipe.jpg"] == "not a regular file"
    assert messages["coffee.jpg"] == "left out on purpose"
    assert [stats.planned for stats in markers(out)] == [2, 2, 2, 2]
    assert f"{report.masks} masks" in str(report)
    assert "8 images: 3 ok, 1 skipped, 4 failed" in str(report)
    with pytest.raises(TooManyFailures, match="4 of 8 images failed.*0.4.*errors") as caught:
        run(replace(config, max_failed=0.4))
    assert caught.value.exit_code == 3


def test_a_finished_run_returns_at_once(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert read_plan(RunPaths(out).plan)[0].images[0].key == "astronaut.jpg"
    for path in photo_folder.rglob("*.jpg"):
        path.unlink()  # a finished run does not look at its inputs again
    driver = start_driver(photo_folder, out, "local=false")
    assert json.loads(driver.communicate()[0]) == {"ok": 4, "heavy": []}
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
    report = run(small_config(photo_folder, out))
    assert (report.ok, report.processed, report.images_per_second) == (4, 0, 0)


def test_the_summary_of_a_plan_writes_nothing(photo_folder: Path, tmp_path: Path) -> None:
    (photo_folder / "notes.txt").touch()
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=3, limit=2)
    summary = runner.describe(SmallStage(), config)
    assert (summary.planned, summary.chosen, summary.shards, summary.committed) == (4, 3, 2, 0)
    assert summary.ignored == {".txt": 1}
    assert "4 images" in str(summary)
    assert "--limit takes 3" in str(summary)
    assert not out.exists()
    run(config)
    assert runner.describe(SmallStage(), config).committed == 1


def test_limit_takes_whole_shards_and_is_not_part_of_the_plan(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    for _ in range(2):  # the second time there is nothing left to do
        report = run(small_config(photo_folder, out, limit=1))
        assert (report.planned, report.ok, report.remaining) == (2, 2, 2)
        assert list(data_files(out)) == ["sa_000000.parquet", "sa_000000.tar"]
    assert run(small_config(photo_folder, out)).planned == 4
    assert data_files(out) == expected


def test_one_worker_process_is_all_that_local_has(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="num_workers = 2 with --local"):
        run(small_config(photo_folder, tmp_path / "out", num_workers=2))
    assert not (tmp_path / "out").exists()


# Resuming, and what it refuses


def test_a_resume_takes_the_images_of_the_plan(
    photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out, limit=1))
    (photo_folder / "aaa.jpg").write_bytes((photo_folder / "coffee.jpg").read_bytes())
    run(small_config(photo_folder, out))
    assert data_files(out) == expected


@pytest.mark.parametrize("change", ["size", "mtime"])
def test_a_photo_that_changed_since_the_plan_has_failed(
    photo_folder: Path, tmp_path: Path, change: str
) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out, limit=1))
    photo = photo_folder / "coffee.jpg"
    status = photo.stat()
    if change == "size":
        photo.write_bytes(photo.read_bytes() + b"x")
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns))
    else:
        os.utime(photo, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    report = run(small_config(photo_folder, out, max_failed=0.5))
    assert (report.ok, report.failed) == (3, 1)
    assert errors(out)[0]["key"] == "coffee.jpg"
    assert f"changed since the plan: {change}" in errors(out)[0]["message"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bands": 5}, "bands was 4 and is now 5"),
        ({"shard_size": 3}, "shard_size was 2 and is now 3"),
        ({"threads_per_worker": 2}, "threads_per_worker was 1 and is now 2"),
        ({"formats": ("tar",)}, r"formats was \['tar', 'parquet'\] and is now \['tar'\]"),
        ({"write_images": False, "bands": 3}, "write_images was True .*; bands was 4"),
        ({"model": "b"}, "model_fingerprint was 'a' and is now 'b'"),
    ],
)
def test_a_resume_with_other_options_names_them(
    photo_folder: Path, tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    out = tmp_path / "out"
    run(small_config(photo_folder, out, limit=1))
    before = data_files(out)
    with pytest.raises(RunError, match=message) as caught:
        run(small_config(photo_folder, out, **options))
    assert caught.value.exit_code == 2
    assert data_files(out) == before
    assert not RunPaths(out).lock.exists()


def test_a_resume_with_other_images_or_stage_names_them(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, limit=1)
    run(config)
    with pytest.raises(RunError, match="images was '.*photos' and is now '.*more'"):
        run(replace(config, images=str(photo_folder / "more")))
    with pytest.raises(RunError, match="stage was 'small' and is now 'other'"):
        runner.run(SmallStage("other"), config, dict)


def test_what_a_run_has_settled_need_not_be_given_again(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=None, threads_per_worker=None, limit=1)
    run(config)
    info = json.loads(RunPaths(out).info.read_bytes())
    assert info["identity"]["shard_size"] == 1
    assert info["identity"]["threads_per_worker"] >= 1
    monkeypatch.chdir(tmp_path)
    assert run(replace(config, images="photos", out="out", limit=None)).ok == 4


def test_a_folder_that_holds_something_else_is_refused(photo_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="holds astronaut.jpg .4 entries.* but no run"):
        run(small_config(photo_folder, photo_folder))
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="file is a file"):
        run(small_config(photo_folder, tmp_path / "file"))
    with pytest.raises(RunError, match="missing does not exist"):
        run(small_config(tmp_path / "missing", tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_two_runs_never_share_a_folder(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        RunLock(RunPaths(out), "theirs"),
        pytest.raises(RunError, match=f"process {os.getpid()} on host"),
    ):
        run(small_config(photo_folder, out))


def test_stages_that_break_their_contract_commit_no_nonsense(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = small_config(photo_folder, tmp_path / "out", max_failed=1.0)
    make_worker = SmallStage.make_worker

    def make_careless_worker(stage: SmallStage, config: SmallConfig) -> Any:
        return make_worker(stage, replace(config, write_images=False))

    monkeypatch.setattr(SmallStage, "make_worker", make_careless_worker)
    assert run(config).failed == 4
    assert {row["step"] for row in errors(tmp_path / "out")} == {"finish"}


# Kills


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
    # A walk, as it passes over a folder that the run takes away meanwhile.
    files = (name for *_, names in os.walk(RunPaths(out).partial) for name in names)
    loose = sum(name.endswith(".done") for name in files)
    return loose + sum(stats.planned for stats in markers(out))


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


def plan(config: SmallConfig) -> RunPaths:
    """Start a run up to its plan."""
    paths = RunPaths(Path(config.out))
    start_run(
        paths,
        "small",
        config,
        plan_run(paths, config),
        Resources(1, 1, 0),
        {"model_fingerprint": "a"},
    )
    return paths


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


# Ray


def on_ray(images: Path, out: Path, **options: Any) -> SmallConfig:
    return small_config(images, out, local=False, **options)


def slowly_on(ray_address: str) -> list[str]:
    """Options of a run whose second shard is still at work when the first is committed."""
    return [f"ray_address={ray_address}", "num_workers=1", "seconds=0.5"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_bytes_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str], workers: int
) -> None:
    cpus = 2 / workers  # four workers share the two CPUs
    report = run(on_ray(photo_folder, tmp_path / "out", num_workers=workers, cpus_per_worker=cpus))
    assert (report.ok, report.processed) == (4, 4)
    assert data_files(tmp_path / "out") == expected


def test_a_poison_image_costs_itself_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(
        on_ray(photo_folder, out, num_workers=2, kill="chelsea.jpg:process", max_failed=0.25)
    )
    assert (report.ok, report.failed) == (3, 1)
    assert [(row["key"], row["error"]) for row in errors(out)] == [("chelsea.jpg", "WorkerDied")]
    assert [record.source_path for record in iter_records(out)] == [
        key for key in KEYS if key != "chelsea.jpg"
    ]


def test_a_driver_killed_on_ray_is_resumed_at_once(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *slowly_on(ray_address))
    wait_for_marker(out, driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert run(small_config(photo_folder, out)).failed == 0  # while Ray's workers may still live
    assert data_files(out) == expected


def test_a_signal_stops_a_run_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *slowly_on(ray_address))
    wait_for_marker(out, driver)
    driver.terminate()
    _, stderr = driver.communicate()
    assert driver.returncode == 143
    assert "1 of 2 shards done; resume with: small_stage.py" in stderr
    assert "Traceback" not in stderr
    assert "\r" not in stderr
    assert run(small_config(photo_folder, out)).ok == 4
    assert data_files(out) == expected


def test_too_few_resources_are_told_with_the_numbers(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="8 workers with 1 CPU threads.*Ray has 2 CPUs.*room for 2"):
        run(on_ray(photo_folder, tmp_path / "out", num_workers=8))
    with pytest.raises(RunError, match="1 workers .* 1 GPUs.* each .* 2 CPUs and 0 GPUs"):
        run(on_ray(photo_folder, tmp_path / "out", gpus_per_worker=1.0))
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_worker_is_told_without_a_traceback(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    class Unloadable(SmallStage):
        def make_worker(self, config: SmallConfig) -> Any:
            raise RunError("the weights are gone")

    config = on_ray(photo_folder, tmp_path / "out")
    with pytest.raises(RunError, match="^the weights are gone$"):
        runner.run(Unloadable(), config, dict)
    assert markers(tmp_path / "out") == []
