"""A run from start to end."""

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from runs import data_files, errors, markers, start_driver
from small_stage import (
    SmallConfig,
    SmallStage,
    run,
    small_config,
)

from sa_engine import runner
from sa_engine.errors import TooManyFailures
from sa_engine.lock import RunLock
from sa_engine.plan import read_plan
from sa_engine.reader import iter_records
from sa_engine.storage import RunError, RunPaths


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


def test_a_dry_run_compares_the_model_only_if_there_is_work(
    photo_folder: Path, tmp_path: Path
) -> None:
    config = small_config(photo_folder, tmp_path / "out", limit=2)
    run(config)
    looked: list[int] = []

    def other() -> dict[str, str]:
        looked.append(1)
        return {"model_fingerprint": "other"}

    assert runner.describe(SmallStage(), config, identity=other).committed == 1 and not looked
    with pytest.raises(RunError, match="model_fingerprint was .* and is now 'other'"):
        runner.describe(SmallStage(), replace(config, limit=None), identity=other)
    start = runner.Start(overwrite=True)
    runner.describe(SmallStage(), config, start, other)
    assert len(looked) == 2


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
