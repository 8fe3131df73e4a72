"""What a start of a run can do besides going on: extend, retry failed images, overwrite, steal the lock."""

import json
import os
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import data_files, errors, files_of_run, in_child, markers, plan
from small_stage import SmallStage, drive, run, small_config

from sa_engine import runner
from sa_engine.lock import RunLock
from sa_engine.pipeline import WorkerSpec
from sa_engine.plan import PlannedImage, read_plan
from sa_engine.reader import iter_records
from sa_engine.runner import Start
from sa_engine.storage import RunError, RunPaths, sweep
from sa_engine.worker import ShardWorker


def keys(out: Path) -> dict[int, str]:
    """Source of every record, by image id."""
    return {record.image_id: str(record.source_path) for record in iter_records(out)}


# --extend


def test_images_that_come_later_get_new_ids_and_shards(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=3)
    run(config)
    before = data_files(out)
    (photo_folder / "aaa.jpg").write_bytes((photo_folder / "coffee.jpg").read_bytes())
    (photo_folder / "more" / "zzz.jpg").write_bytes((photo_folder / "chelsea.jpg").read_bytes())
    (photo_folder / "notes.txt").touch()
    assert run(config).processed == 0, "only --extend looks for new images"
    summary = runner.describe(SmallStage(), config, Start(extend=True))
    assert (summary.planned, summary.added, summary.shards, summary.committed) == (6, 2, 3, 2)
    assert "6 images in" in str(summary) and "2 of them new" in str(summary)
    report = run(config, extend=True)
    assert (report.planned, report.ok, report.processed) == (6, 6, 2)
    assert before.items() <= data_files(out).items()
    assert keys(out) == {
        1: "astronaut.jpg",
        2: "chelsea.jpg",
        3: "coffee.jpg",
        4: "more/rocket.jpg",
        5: "aaa.jpg",
        6: "more/zzz.jpg",
    }
    assert json.loads(RunPaths(out).info.read_bytes())["ignored"] == {".txt": 1}
    unchanged = data_files(out)
    assert run(config, extend=True).processed == 0, "nothing is new"
    assert data_files(out) == unchanged


def test_a_first_run_can_be_asked_to_extend(photo_folder: Path, tmp_path: Path) -> None:
    assert run(small_config(photo_folder, tmp_path / "out"), extend=True).ok == 4


def test_a_kill_while_extending_loses_and_renumbers_nothing(
    photo_folder: Path, tmp_path: Path
) -> None:
    config = small_config(photo_folder, tmp_path / "out")
    new = (photo_folder / "coffee.jpg").read_bytes()
    expected: dict[int, str] = {}
    for fatal in range(1, 100):
        out = tmp_path / f"out{fatal}"
        (photo_folder / "aaa.jpg").unlink(missing_ok=True)
        run(replace(config, out=str(out)))
        before = data_files(out)
        (photo_folder / "aaa.jpg").write_bytes(new)
        code = in_child(drive, replace(config, out=str(out)), fatal, {"extend": True})
        assert before.items() <= data_files(out).items()
        run(replace(config, out=str(out)), extend=True)
        expected = expected or keys(out)
        assert keys(out) == expected
        assert expected[5] == "aaa.jpg"
        if code == 0:
            break
    assert fatal > 5


# --retry-failed


@pytest.fixture
def with_failures(photo_folder: Path, tmp_path: Path) -> dict[str, Any]:
    """A finished run in which two of five images of one shard failed and one was skipped."""
    photo = (photo_folder / "coffee.jpg").read_bytes()
    (photo_folder / "broken.jpg").write_bytes(photo[:500])
    (photo_folder / "gone.jpg").symlink_to("later.dat")
    config = small_config(
        photo_folder, tmp_path / "out", shard_size=6, skip="chelsea.jpg", max_failed=0.5
    )
    report = run(config)
    assert (report.ok, report.skipped, report.failed) == (3, 1, 2)
    return {"config": config, "photo": photo, "out": tmp_path / "out"}


def test_mended_images_are_taken_in(with_failures: dict[str, Any], photo_folder: Path) -> None:
    config, out = with_failures["config"], with_failures["out"]
    before = {record.image_id: record for record in iter_records(out)}
    summary = runner.describe(SmallStage(), config, Start(retry_failed=True))
    assert "2 failed images to try again" in str(summary)
    (photo_folder / "later.dat").write_bytes(with_failures["photo"])
    assert run(config).processed == 0, "only --retry-failed takes them up"
    report = run(config, retry_failed=True)
    assert (report.ok, report.skipped, report.failed, report.processed) == (4, 1, 1, 2)
    after = {record.image_id: record for record in iter_records(out)}
    assert before.items() <= after.items()
    assert after.keys() - before.keys() == {5}
    assert [(row["key"], row["attempts"]) for row in errors(out)] == [
        ("broken.jpg", 2),
        ("chelsea.jpg", 1),
    ]
    (photo_folder / "broken.jpg").write_bytes(with_failures["photo"])
    assert run(config, retry_failed=True).failed == 0
    # The shard is the one that a run would have made which found all files in order.
    fresh = replace(config, out=str(out.parent / "fresh"))
    run(fresh)
    assert data_files(out) == data_files(Path(fresh.out))
    assert files_of_run(out) == files_of_run(Path(fresh.out))
    assert run(config, retry_failed=True).processed == 0


def test_a_kill_while_retrying_keeps_what_was_finished(
    with_failures: dict[str, Any], photo_folder: Path, tmp_path: Path
) -> None:
    (photo_folder / "later.dat").write_bytes(with_failures["photo"])
    config = with_failures["config"]
    expected: dict[str, str] = {}
    for fatal in range(1, 100):
        out = tmp_path / f"out{fatal}"
        (photo_folder / "later.dat").unlink(missing_ok=True)
        run(replace(config, out=str(out)))
        (photo_folder / "later.dat").write_bytes(with_failures["photo"])
        code = in_child(drive, replace(config, out=str(out)), fatal, {"retry_failed": True})
        # The images that were finished are in the shard, or in the store that a resume takes up.
        report = run(replace(config, out=str(out)), retry_failed=True)
        assert (report.ok, report.skipped, report.failed) == (4, 1, 1)
        expected = expected or data_files(out)
        assert data_files(out) == expected
        if code == 0:
            break
        assert code == -signal.SIGKILL
    assert fatal > 8


def test_retry_goes_on_with_unfinished_shards_too(
    with_failures: dict[str, Any], photo_folder: Path
) -> None:
    config, out = with_failures["config"], with_failures["out"]
    for name in ("x.jpg", "y.jpg"):
        (photo_folder / name).write_bytes(with_failures["photo"])
    report = run(config, extend=True, retry_failed=True)
    assert (report.planned, report.ok, report.failed, report.processed) == (8, 5, 2, 4)
    assert len(markers(out)) == 2


def test_the_failures_of_a_run_on_ray_are_retried_there(
    ray_address: str, with_failures: dict[str, Any], photo_folder: Path
) -> None:
    (photo_folder / "later.dat").write_bytes(with_failures["photo"])
    report = run(replace(with_failures["config"], local=False), retry_failed=True)
    assert (report.ok, report.failed, report.processed) == (4, 1, 2)


# --overwrite


def test_overwrite_starts_over_with_other_options(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=1)
    run(config)
    (photo_folder / "coffee.jpg").unlink()
    again = replace(config, bands=7, shard_size=2)
    assert runner.describe(SmallStage(), again, Start(overwrite=True)).committed == 0
    assert len(markers(out)) == 4, "a description removes nothing"
    report = run(again, overwrite=True)
    assert (report.planned, report.ok, report.processed) == (3, 3, 3)
    run(replace(again, out=str(tmp_path / "expected")))
    assert data_files(out) == data_files(tmp_path / "expected")
    assert len(markers(out)) == 2
    assert len(read_plan(RunPaths(out).plan)) == 2
    assert run(replace(again, out=str(tmp_path / "new")), overwrite=True).ok == 3


def test_overwrite_removes_nothing_before_all_is_ready(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out)
    run(config)
    before = data_files(out)

    def no_weights() -> dict[str, str]:
        raise RunError("the weights are gone")

    with pytest.raises(RunError, match="weights are gone"):
        runner.run(SmallStage(), config, no_weights, Start(overwrite=True))
    with pytest.raises(RunError, match="nowhere does not exist"):
        run(replace(config, images=str(tmp_path / "nowhere")), overwrite=True)
    assert data_files(out) == before
    (out / "diary.txt").touch()
    with pytest.raises(
        RunError, match=r"holds diary\.txt beside its run.*--overwrite removes runs"
    ):
        run(config, overwrite=True)
    assert data_files(out) == before
    assert run(config).processed == 0
    with pytest.raises(RunError, match=r"holds astronaut\.jpg .* but no run"):
        run(small_config(photo_folder, photo_folder), overwrite=True)
    assert (photo_folder / "coffee.jpg").exists()


def test_a_kill_while_overwriting_leaves_a_run_that_can_be_overwritten(
    photo_folder: Path, tmp_path: Path
) -> None:
    config = small_config(photo_folder, tmp_path / "out", bands=6)
    run(replace(config, out=str(tmp_path / "expected")))
    for fatal in (2, 3, 4, 8):
        out = tmp_path / f"out{fatal}"
        run(small_config(photo_folder, out))
        again = replace(config, out=str(out))
        assert in_child(drive, again, fatal, {"overwrite": True}) == -signal.SIGKILL
        assert run(again, overwrite=True).ok == 4
        assert data_files(out) == data_files(tmp_path / "expected")


# --steal-lock, and what does not go together


def test_a_run_whose_lock_is_stolen_commits_no_more(photo_folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    config = small_config(photo_folder, out)
    paths = RunPaths(out)
    stolen: list[RunLock] = []

    def steal() -> dict[str, str]:
        stolen.append(RunLock(paths, "thief", steal=True))
        stolen[0].__enter__()
        return {}

    with pytest.raises(RunError, match="another run has taken it"):
        runner.run(SmallStage(), config, steal)
    assert markers(out) == []
    with pytest.raises(RunError, match=f"process {os.getpid()} .*--steal-lock"):
        run(replace(config, model="b"))
    stolen[0].__exit__(None, None, None)
    assert not paths.lock.exists()


def test_workers_of_an_overwritten_run_leave_nothing_in_the_new_one(
    photo_folder: Path, tmp_path: Path
) -> None:
    """A worker that outlives its driver has an image in hand while another run starts over."""
    out = tmp_path / "out"
    config = small_config(photo_folder, out, shard_size=4, bands=2)
    paths = plan(config)
    taken: list[RunLock] = []

    class Slow(SmallStage):
        def make_worker(self, config: Any) -> Any:
            worker = super().make_worker(config)
            process = worker.process

            def overtaken(item: PlannedImage, prepared: Any) -> Any:
                if item.image_id == 2:
                    while not list(paths.partial.glob("*/1.done")):
                        time.sleep(0.001)
                    taken.append(RunLock(paths, "new", steal=True))
                    taken[0].__enter__()
                    sweep(paths.partial)
                return process(item, prepared)

            worker.process = overtaken
            return worker

    with RunLock(paths, "living"):
        spec = WorkerSpec(
            stage=Slow(),
            config=config,
            images=photo_folder,
            paths=paths,
            session="living",
            threads=1,
        )
        with pytest.raises(RunError, match="another run has taken it"):
            ShardWorker(spec).run(read_plan(paths.plan)[0])
        assert not list(paths.partial.glob("*/*.done"))
        taken[0].__exit__(None, None, None)


def test_starting_over_and_going_on_contradict_each_other() -> None:
    for other in ("extend", "retry_failed"):
        with pytest.raises(RunError, match="--overwrite starts over"):
            Start(**{"overwrite": True, other: True})
