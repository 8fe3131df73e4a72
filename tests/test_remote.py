"""Runs on an object store: a real S3 server on loopback, through pyarrow."""

import json
import os
import pickle
import signal
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from runs import data_files, in_child
from small_stage import drive, run, small_config

from sa_engine import lock, runner
from sa_engine.cli import main
from sa_engine.lock import RunLock
from sa_engine.partial import PartialShard
from sa_engine.pictures import show
from sa_engine.reader import iter_records
from sa_engine.remote import LocationError, RemotePath, StoreError
from sa_engine.storage import RunError, RunPaths, list_names, location, modified
from sa_engine.verify import verify


@pytest.fixture
def bucket(s3: Callable[[str], str]) -> RemotePath:
    """An empty folder of the test's own."""
    return RemotePath(s3(uuid.uuid4().hex))


@pytest.fixture
def uri(s3: Callable[[str], str]) -> Callable[[RemotePath], str]:
    """What a user would type for a place in the bucket."""
    return lambda place: s3(str(place).removeprefix("s3://bucket/"))


@pytest.fixture
def expected(photo_folder: Path, tmp_path: Path) -> dict[str, str]:
    """The files of a run over `photo_folder` from disk to disk."""
    run(small_config(photo_folder, tmp_path / "expected"))
    return data_files(tmp_path / "expected")


@pytest.fixture
def photo_bucket(photo_folder: Path, bucket: RemotePath) -> RemotePath:
    """The photos of `photo_folder`, in the bucket."""
    for path in photo_folder.rglob("*.jpg"):
        (bucket / "photos" / path.relative_to(photo_folder).as_posix()).put(path)
    return bucket / "photos"


# Places


def test_a_place_reads_back_what_was_put_there(bucket: RemotePath, tmp_path: Path) -> None:
    place = bucket / "deep er" / "\u0444\u043e\u0442\u043e #1?.bin"
    assert not place.exists()
    assert list_names(bucket) == []
    with pytest.raises(FileNotFoundError):
        place.read_bytes()
    for content in (b"first", b"2nd"):
        place.put(content)
        assert place.read_bytes() == content
    (tmp_path / "file").write_bytes(bytes(range(256)) * 50_000)
    (bucket / "large").put(tmp_path / "file")
    with (bucket / "large").open() as file:
        file.seek(256 * 49_999)
        assert file.read() == bytes(range(256))
    assert (bucket / "large").size_and_mtime_ns() == (
        12_800_000,
        round(modified(bucket / "large") * 1e9),
    )
    assert sorted(list_names(bucket)) == ["deep er", "large"]
    assert [key for key, *_ in bucket.find_files()] == [f"deep er/{place.name}", "large"]
    assert (place.parent, bucket.is_dir(), place.is_dir()) == (bucket / "deep er", True, False)
    place.unlink()
    place.unlink(missing_ok=True)
    with pytest.raises(FileNotFoundError):
        place.unlink()
    bucket.remove_tree()
    bucket.remove_tree()
    assert bucket.find_files() == []


def test_an_upload_that_fails_leaves_nothing(bucket: RemotePath, tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError):
        (bucket / "sa_000000.tar").put(tmp_path)
    assert bucket.find_files() == []


def test_a_place_travels_to_another_process(
    bucket: RemotePath, uri: Callable[[RemotePath], str]
) -> None:
    (bucket / "a").put(b"here")
    again = pickle.loads(pickle.dumps(bucket / "a"))
    assert (again, hash(again), again.read_bytes()) == (bucket / "a", hash(bucket / "a"), b"here")
    assert location(uri(bucket / "a")) == bucket / "a"


def test_texts_hide_credentials(s3: Callable[[str], str]) -> None:
    place = RemotePath(s3("x y/z").replace("s3://", "s3://key:secret@"))
    assert str(place / "1") == "s3://bucket/x y/z/1"
    assert "secret" not in repr(place)
    assert str(RemotePath("gs://anonymous@bucket/x") / "y") == "gs://bucket/x/y"
    with pytest.raises(LocationError, match="ftp://host/x: ") as caught:
        location("ftp://user:secret@host/x")
    assert "secret" not in str(caught.value)


def test_local_texts_are_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for text in ("a b", f"file://{tmp_path}/a%20b", "./c/../a b"):
        assert location(text) == tmp_path / "a b"


# Runs


@pytest.mark.parametrize("images", ["on disk", "in the bucket"])
def test_a_run_into_a_bucket_makes_the_same_bytes(
    photo_folder: Path,
    photo_bucket: RemotePath,
    bucket: RemotePath,
    uri: Callable[[RemotePath], str],
    expected: dict[str, str],
    images: str,
) -> None:
    out = bucket / "out"
    source = str(photo_folder) if images == "on disk" else uri(photo_bucket)
    config = small_config(source, uri(out))
    assert runner.describe(runner_stage(), config).planned == 4
    assert not out.exists()
    assert run(config).ok == 4
    assert data_files(out) == expected
    assert files_of(out / "_run") == ["plan.parquet", "run.json"]
    assert [record.source_path for record in iter_records(out)][3] == "more/rocket.jpg"
    info = json.loads((out / "_run" / "run.json").read_bytes())
    assert info["config"]["out"] == str(out), "the URI's query is no part of the place"
    before = out.find_files()
    assert run(config).processed == 0
    assert verify(out, workers=2).problems == ()
    assert out.find_files() == before
    damaged = bytearray((out / "sa_000001.tar").read_bytes())
    damaged[5000] ^= 1
    (out / "sa_000001.tar").put(bytes(damaged))
    assert [problem.file for problem in verify(out).problems] == ["sa_000001.tar"]


def test_images_in_a_bucket_and_shards_on_disk(
    photo_bucket: RemotePath,
    uri: Callable[[RemotePath], str],
    tmp_path: Path,
    expected: dict[str, str],
) -> None:
    (photo_bucket / "notes.txt").put(b"")
    (photo_bucket / ".hidden" / "x.jpg").put(b"")
    out = tmp_path / "out"
    run(small_config(uri(photo_bucket), out))
    assert data_files(out) == expected
    info = json.loads((out / "_run" / "run.json").read_bytes())
    assert info["ignored"] == {".txt": 1, "hidden": 1}
    assert info["config"]["images"] == str(photo_bucket)


def test_two_workers_on_ray_make_the_same_bytes_in_a_bucket(
    ray_address: str,
    photo_bucket: RemotePath,
    bucket: RemotePath,
    uri: Callable[[RemotePath], str],
    expected: dict[str, str],
) -> None:
    out = bucket / "out"
    report = run(small_config(uri(photo_bucket), uri(out), local=False, num_workers=2))
    assert (report.ok, report.failed) == (4, 0)
    assert data_files(out) == expected


def test_a_kill_before_any_request_leaves_the_whole_shard_or_none(
    photo_folder: Path,
    bucket: RemotePath,
    uri: Callable[[RemotePath], str],
    expected: dict[str, str],
) -> None:
    shard = {name: digest for name, digest in expected.items() if name.startswith("sa_000000.")}
    for fatal in range(1, 100):
        out = bucket / f"out{fatal}"
        config = small_config(photo_folder, uri(out), limit=1)
        exit_code = in_child(drive, config, fatal)
        assert data_files(out).items() <= shard.items(), f"half-written after kill {fatal}"
        if "sa_000000.json" in list_names(out):
            assert data_files(out) == shard, f"incomplete after kill {fatal}"
        if exit_code == 0:
            break
        assert exit_code == -signal.SIGKILL
        assert run(config).failed == 0
        assert data_files(out) == shard
        assert files_of(out / "_run") == ["plan.parquet", "run.json"]
    assert fatal > 10, "a shard of two images needs that many requests"


def test_finished_images_in_a_bucket_are_kept(
    photo_folder: Path, bucket: RemotePath, uri: Callable[[RemotePath], str]
) -> None:
    out = bucket / "out"
    config = small_config(photo_folder, uri(out), shard_size=4)
    assert in_child(drive, replace(config, kill="more/rocket.jpg:process")) == -signal.SIGKILL
    kept = PartialShard(RunPaths(out), "sa_000000").ended()
    assert {1, 2} <= kept
    report = run(config)
    assert (report.ok, report.processed) == (4, 4 - len(kept))


def test_an_object_that_changed_since_the_plan_has_failed(
    photo_bucket: RemotePath, uri: Callable[[RemotePath], str], tmp_path: Path
) -> None:
    config = small_config(uri(photo_bucket), tmp_path / "out", max_failed=0.5)
    run(replace(config, limit=1))
    (photo_bucket / "coffee.jpg").put((photo_bucket / "coffee.jpg").read_bytes() + b"x")
    (photo_bucket / "more" / "rocket.jpg").unlink()
    report = run(config)
    assert (report.ok, report.failed) == (2, 2)


def test_a_bucket_has_one_run_at_a_time(
    photo_folder: Path,
    bucket: RemotePath,
    uri: Callable[[RemotePath], str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    paths = RunPaths(bucket / "out")
    config = small_config(photo_folder, uri(paths.out))
    with RunLock(paths, "theirs"), pytest.raises(RunError, match=f"process {os.getpid()} on host"):
        run(config)
    dead = {"host": lock.socket.gethostname(), "pid": 1, "born": 0.0, "session": "dead"}
    paths.lock.put(json.dumps(dead).encode())
    assert run(replace(config, limit=1)).ok == 2
    elsewhere = json.dumps({**dead, "host": "elsewhere"}).encode()
    paths.lock.put(elsewhere)
    with pytest.raises(RunError, match="on host elsewhere; its last sign of life"):
        run(config)
    assert run(replace(config, limit=3), steal_lock=True).ok == 4
    (paths.out / "sa_000001.json").unlink()
    paths.lock.put(elsewhere)
    monkeypatch.setattr(lock, "_DEAD_AFTER_S", 0.0)
    assert run(config).ok == 4


def test_what_is_wrong_with_a_place_is_told(
    photo_folder: Path, s3: Callable[[str], str], tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="images folder s3://bucket/nothing does not exist"):
        run(small_config(s3("nothing"), tmp_path / "out"))
    with pytest.raises(LocationError, match="ftp"):
        run(small_config(photo_folder, "ftp://host/folder"))
    missing = s3("x").replace("s3://bucket", "s3://no-such-bucket")
    with pytest.raises(
        RunError, match="cannot read or write the output s3://no-such-bucket/x.*NO_SUCH_BUCKET"
    ):
        run(small_config(photo_folder, missing))
    with pytest.raises(RunError, match="images folder s3://no-such-bucket/x"):
        run(small_config(missing, tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_operators_are_told_of_a_store_that_refuses(s3: Callable[[str], str]) -> None:
    missing = s3("x").replace("s3://bucket", "s3://no-such-bucket")
    for command in (["status"], ["errors"], ["verify"], ["split", "--holdout=1"]):
        result = CliRunner().invoke(main, [*command, missing])
        assert result.exit_code == 2, result.output
        assert result.output.startswith("Error: ") and "s3://no-such-bucket/x" in result.output
    place = RemotePath(missing)
    with pytest.raises(StoreError, match="s3://no-such-bucket/x: .*NO_SUCH_BUCKET"):
        place.put(b"")
    with pytest.raises(FileNotFoundError):
        place.read_bytes()


def test_pictures_of_a_run_in_a_bucket(
    photo_folder: Path, bucket: RemotePath, uri: Callable[[RemotePath], str], tmp_path: Path
) -> None:
    out = bucket / "out"
    run(small_config(photo_folder, uri(out)))
    drawn = show(out, tmp_path / "pictures")
    assert [path.name for path in drawn] == [
        *(f"sa_{number}.jpg" for number in range(1, 5)),
        "contact_sheet.jpg",
    ]


def files_of(folder: RemotePath) -> list[str]:
    return sorted(key for key, *_ in folder.find_files())


def runner_stage() -> runner.Stage:
    from small_stage import SmallStage

    return SmallStage()
