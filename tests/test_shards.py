import json
import tarfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from small_stage import mask_record

from sa_engine.partial import Breadcrumbs, Failure, Finished, PartialShard, finished_record
from sa_engine.plan import PlannedImage, Shard
from sa_engine.reader import reopen_shard
from sa_engine.records import ImageRecord, from_table, image_name, mask_id, sa1b_json
from sa_engine.shards import (
    RunError,
    ShardStats,
    commit_shard,
    committed_shards,
    read_markers,
)
from sa_engine.storage import RunPaths, sha256_file

SHARD = Shard(3, tuple(PlannedImage(number, f"{number}.png", 1, 1) for number in (9, 10, 11)))
BOTH = ("tar", "parquet")
SKIPPED = Failure(
    key="11.png", image_id=11, status="skipped", step="prepare", error="SkipImage", message="no"
)
FAILED = replace(SKIPPED, status="failed", error="BadImage")


def record(image_id: int, photo: np.ndarray) -> ImageRecord:
    bright = photo.mean(axis=2) > 128
    masks = [mask_record(mask_id(image_id, number), bright == (number == 0)) for number in (0, 1)]
    height, width = bright.shape
    return ImageRecord(
        image_id=image_id,
        width=width,
        height=height,
        file_name=image_name(image_id),
        source_path=f"{image_id}.png",
        sha256="0" * 64,
        masks=tuple(masks),
    )


def assert_is(finished: object, expected: ImageRecord, jpeg: bytes | None) -> None:
    assert isinstance(finished, Finished)
    assert from_table(finished.row) == [expected]
    assert (finished.parts["sa1b"], finished.parts.get("jpeg")) == (sa1b_json(expected), jpeg)
    assert (finished.image_id, finished.counts) == (
        expected.image_id,
        {"masks": len(expected.masks)},
    )


@pytest.fixture
def paths(tmp_path: Path, small_photo: np.ndarray) -> RunPaths:
    """A run with two finished images and a failed one."""
    paths = RunPaths(tmp_path)
    fill(paths, small_photo)
    return paths


def fill(paths: RunPaths, photo: np.ndarray, last: Failure = FAILED) -> PartialShard:
    store = PartialShard(paths, SHARD.name)
    for image_id in (10, 9):
        store.save(finished_record(record(image_id, photo), b"jpeg %d" % image_id))
    store.fail(last)
    return store


def test_a_commit_accounts_for_every_image_and_leaves_only_the_shard(paths: RunPaths) -> None:
    stats = commit_shard(paths, SHARD, BOTH, 1.5)
    assert (stats.planned, stats.ok, stats.skipped, stats.failed) == (3, 2, 0, 1)
    assert stats.masks == 4
    assert committed_shards(paths) == {3}
    assert read_markers(paths, range(9)) == {3: stats}
    assert sorted(path.name for path in paths.out.iterdir()) == [
        "_run",
        "sa_000003.json",
        "sa_000003.parquet",
        "sa_000003.tar",
    ]
    assert [path.name for path in paths.run.rglob("*") if path.is_file()] == ["sa_000003.jsonl"]
    lines = paths.errors("sa_000003").read_text().splitlines()
    assert [Failure(**json.loads(line)) for line in lines] == [FAILED]
    for name, file in stats.files.items():
        assert file == {
            "sha256": sha256_file(paths.out / name),
            "bytes": (paths.out / name).stat().st_size,
        }


def test_a_skipped_image_is_no_failure(tmp_path: Path, small_photo: np.ndarray) -> None:
    paths = RunPaths(tmp_path)
    fill(paths, small_photo, SKIPPED)
    stats = commit_shard(paths, SHARD, BOTH, 0)
    assert (stats.ok, stats.skipped, stats.failed) == (2, 1, 0)


def test_the_tar_is_sorted_and_says_nothing_of_time_or_owner(paths: RunPaths) -> None:
    commit_shard(paths, SHARD, BOTH, 0)
    with tarfile.open(paths.out / "sa_000003.tar") as archive:
        members = archive.getmembers()
    assert [member.name for member in members] == [
        "sa_9.jpg",
        "sa_9.json",
        "sa_10.jpg",
        "sa_10.json",
    ]
    assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in members} == {
        (0, 0, 0, "", "", 0o644)
    }


def test_equal_images_make_equal_files(tmp_path: Path, small_photo: np.ndarray) -> None:
    files = []
    for name in ("one", "two"):
        paths = RunPaths(tmp_path / name)
        fill(paths, small_photo)
        files.append(commit_shard(paths, SHARD, BOTH, len(name)).files)
    assert files[0] == files[1]


@pytest.mark.parametrize("formats", [("tar",), ("parquet",)])
def test_formats_leave_files_out(paths: RunPaths, formats: tuple[str, ...]) -> None:
    stats = commit_shard(paths, SHARD, formats, 0)
    assert list(stats.files) == [f"sa_000003.{formats[0]}"]
    assert len(list(paths.out.glob("sa_*"))) == 2


def test_a_shard_of_failures_has_empty_files(tmp_path: Path) -> None:
    paths = RunPaths(tmp_path)
    store = PartialShard(paths, SHARD.name)
    for image in SHARD.images:
        store.fail(replace(FAILED, key=image.key, image_id=image.image_id))
    assert commit_shard(paths, SHARD, BOTH, 0).failed == 3
    with tarfile.open(paths.out / "sa_000003.tar") as archive:
        assert archive.getnames() == []


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("9.done", None),
        ("9.done", b""),
        ("9.done", b'{"record": "{}", "jpeg_sha256": null}'),
        ("9.done", b"one byte less"),
        ("9.done", bytes(1000)),
        ("11.failed", b'{"key": "11.png"'),
    ],
)
def test_damaged_leftovers_count_as_not_done_and_commit_nothing(
    paths: RunPaths, name: str, damage: bytes | None
) -> None:
    store = PartialShard(paths, SHARD.name)
    assert isinstance(store.load(9), Finished)
    file = store.folder / name
    if damage is None:
        file.unlink()
    elif damage == b"one byte less":
        file.write_bytes(file.read_bytes()[:-1])
    else:
        file.write_bytes(damage)
    assert store.load(int(name.partition(".")[0])) is None
    with pytest.raises(RunError, match="sa_000003 .* of 3 planned images"):
        commit_shard(paths, SHARD, BOTH, 0)
    assert list(paths.out.glob("sa_*")) == []


def test_finished_images_come_back_whole(paths: RunPaths, small_photo: np.ndarray) -> None:
    store = PartialShard(paths, SHARD.name)
    assert_is(store.load(9), record(9, small_photo), b"jpeg 9")
    assert store.load(11) == FAILED
    assert store.load(12) is None
    Breadcrumbs(store, "session").hold(["9.png"])
    assert store.ended() == {9, 10, 11}


def test_the_marker_comes_back(paths: RunPaths) -> None:
    stats = commit_shard(paths, SHARD, BOTH, 1.25)
    text = paths.marker(SHARD.name).read_text()
    assert ShardStats.from_json(text) == stats
    assert json.loads(text)["schema_version"] == 1


def test_breadcrumbs_count_deaths_of_one_session_only(tmp_path: Path) -> None:
    store = PartialShard(RunPaths(tmp_path), "sa_000000")
    Breadcrumbs(store, "first").hold(["a", "b"])
    for expected in (1, 2):
        breadcrumbs = Breadcrumbs(store, "first")
        assert breadcrumbs.deaths == {"a": 1, "b": expected}
        breadcrumbs.hold(["b"])
    assert not Breadcrumbs(store, "second").deaths


def test_a_reopened_shard_holds_all_but_its_failures(
    paths: RunPaths, small_photo: np.ndarray
) -> None:
    before = commit_shard(paths, SHARD, BOTH, 0)
    assert reopen_shard(paths, SHARD) == {11: 1}
    store = PartialShard(paths, SHARD.name)
    assert store.ended() == {9, 10}
    assert_is(store.load(9), record(9, small_photo), b"jpeg 9")
    assert committed_shards(paths) == set()
    store.fail(replace(FAILED, attempts=2))
    assert commit_shard(paths, SHARD, BOTH, 0).files == before.files


def test_a_reopened_shard_keeps_what_was_skipped_and_loses_old_errors(
    tmp_path: Path, small_photo: np.ndarray
) -> None:
    paths = RunPaths(tmp_path)
    fill(paths, small_photo, SKIPPED)
    commit_shard(paths, SHARD, ("tar",), 0)
    assert reopen_shard(paths, SHARD) == {}
    store = PartialShard(paths, SHARD.name)
    assert store.load(11) == SKIPPED
    (store.folder / "11.failed").unlink()
    store.save(finished_record(record(11, small_photo), b"jpeg 11"))
    assert commit_shard(paths, SHARD, ("tar",), 0).ok == 3
    assert not paths.errors(SHARD.name).exists()


def test_a_damaged_shard_is_not_reopened(paths: RunPaths) -> None:
    commit_shard(paths, SHARD, BOTH, 0)
    tar = paths.out / "sa_000003.tar"
    tar.write_bytes(tar.read_bytes().replace(b"jpeg 9", b"jpeg 8"))
    with pytest.raises(RunError, match=r"sa_000003\.tar was changed"):
        reopen_shard(paths, SHARD)
    assert committed_shards(paths) == {3}
