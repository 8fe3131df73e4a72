"""Finished images read one by one, from any thread, process or store; and what is said where they are damaged."""

import hashlib
import io
import pickle
import shutil
import threading
import uuid
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from training import Masks, make_run, paths_aside, quarter, share

from sa_engine.cli import main
from sa_engine.finished import FinishedRun
from sa_engine.images import decode_image
from sa_engine.reader import iter_records, iter_sources, iter_tables, read_image
from sa_engine.remote import RemotePath
from sa_engine.storage import RunError
from sa_engine.training.data import TrainingData, TrainingDataError


@pytest.mark.parametrize(
    "options",
    [{}, {"formats": ("tar",)}, {"write_images": False}, {"formats": ("parquet",), "shard_size": 100},
     {"formats": ("tar",), "write_images": False}],
    ids=["both", "tar", "no pictures", "parquet", "json"],
)  # fmt: skip
def test_any_image_is_read_by_its_id(options: dict[str, Any], many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        return [(None, share(height, width, of=of)) for of in np.arange(int(key[:3]) % 4) / 4 + 0.1]

    out = make_run(many, tmp_path / "out", draw, **options)
    run = pickle.loads(pickle.dumps(FinishedRun(out)))
    records = list(iter_records(out))
    order = np.random.default_rng(0).permutation(len(records)).tolist()
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda i: run.record(records[i].image_id), order * 2))
        assert found == [records[i] for i in order * 2]
        pictures = list(threads.map(run.picture, records))
    for record, picture in zip(records, pictures, strict=True):
        photo = decode_image((many / str(record.source_path)).read_bytes())
        if run.has_pictures:
            assert np.array_equal(picture, decode_image(read_image(out, record.image_id)))
            assert np.abs(picture.astype(int) - photo).mean() < 8
        else:
            assert np.array_equal(picture, photo)
    keys = {run.content_key(record) for record in records}
    assert len(keys) == 24
    assert len(TrainingData.open([out])) == 18
    with pytest.raises(RunError, match="has no image 25: it is not planned"):
        run.record(25)


def test_another_run_of_the_same_photos_shares_content_keys(many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        return [("manual", share(height, width, of=0.5))]

    outs = [
        make_run(many, tmp_path / "a", quarter),
        make_run(many, tmp_path / "b", draw, shard_size=7),
    ]
    first, second = (TrainingData.open([out]) for out in outs)
    keys = [[data.content_key(index) for index in range(24)] for data in (first, second)]
    assert keys[0] == keys[1]


def test_threads_and_processes_read_the_same(many: Path, tmp_path: Path) -> None:
    data = TrainingData.open([make_run(many, tmp_path / "out", quarter)], seed=3)
    expected = [digest_of(data, index) for index in range(24)]
    assert len(set(expected)) > 20, "some are lost"
    with ThreadPoolExecutor(4) as threads:
        again = pickle.loads(pickle.dumps(data))
        assert list(threads.map(lambda i: digest_of(again, i), [*range(24)] * 2)) == expected * 2
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as processes:
        assert processes.submit(digest_of, data, 5).result() == expected[5]
        assert processes.submit(data.batch, 4, 9, 1, 2).result() == data.batch(4, 9, 1, 2)


def digest_of(data: TrainingData, index: int) -> str:
    found = data.load(index, np.random.default_rng(index), image_size=64, jitter=(0.5, 1.5))
    if found is None:
        return "lost"
    assert found.pixels is not None
    return hashlib.sha256(found.pixels.tobytes() + found.masks.tobytes()).hexdigest()


def test_mistakes_and_damage_are_told(many: Path, tmp_path: Path) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    with pytest.raises(TrainingDataError, match="names a folder twice"):
        TrainingData.open([out, out])
    with pytest.raises(RunError, match="is not the output of a run"):
        TrainingData.open([tmp_path / "none"])
    with pytest.raises(TrainingDataError, match="max_mask_coverage is 1.5"):
        TrainingData.open([out], max_mask_coverage=1.5)
    empty = make_run(many, tmp_path / "empty", lambda key, h, w: [])
    with pytest.raises(TrainingDataError, match="0 held out, 0 for validation, 24 without masks"):
        TrainingData.open([empty])
    data = TrainingData.open([out])
    tar = out / "sa_000001.tar"
    content = tar.read_bytes()
    (image,) = (i for i in range(24) if data.load(i, np.random.default_rng(0)).image_id == 7)  # type: ignore[union-attr]
    run = FinishedRun(out)
    start = content.index(run_jpeg(out, 7))
    tar.write_bytes(content[: start + 20] + bytes(400) + content[start + 420 :])
    words = rf"cannot read image 7 in shard sa_000001 of {out}: .*`sa-engine verify {out}`"
    with pytest.raises(RunError, match=words):
        data.load(image, np.random.default_rng(0))
    assert data.load(image, np.random.default_rng(0), pixels=False) is not None
    tar.write_bytes(content[: start + 100])
    with pytest.raises(RunError, match=words):
        run.picture(run.record(7))
    tar.unlink()
    with pytest.raises(RunError, match=words):
        FinishedRun(out).picture(run.record(7))
    parquet = out / "sa_000001.parquet"
    parquet.write_bytes(parquet.read_bytes()[:-20])
    with pytest.raises(RunError, match=words):
        FinishedRun(out).record(7)
    with pytest.raises(RunError, match="sa-engine verify"):
        TrainingData.open([out])
    shutil.rmtree(many)
    bare = make_run_without_photos(tmp_path)
    with pytest.raises(RunError, match="its photo .* cannot be read"):
        bare.load(0, np.random.default_rng(0))


def run_jpeg(out: Path, image_id: int) -> bytes:
    return read_image(out, image_id)


def make_run_without_photos(tmp_path: Path) -> TrainingData:
    photos = tmp_path / "gone"
    photos.mkdir()
    Image.fromarray(np.zeros((20, 30, 3), np.uint8)).save(photos / "a.png")
    data = TrainingData.open([make_run(photos, tmp_path / "bare", quarter, write_images=False)])
    shutil.rmtree(photos)
    return data


def test_progress_counts_every_image(many: Path, tmp_path: Path) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    counts: list[int] = []
    TrainingData.open([out], progress=counts.append)
    assert sum(counts) == 24


def test_a_run_in_an_object_store_is_read_like_one_on_a_disk(
    many: Path, tmp_path: Path, s3: Callable[[str], str]
) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    place = RemotePath(s3(uuid.uuid4().hex))
    for path in out.rglob("*"):
        if path.is_file():
            (place / path.relative_to(out).as_posix()).put(path)
    here, there = (TrainingData.open([one], validation=0.2) for one in (out, place))
    assert here.fingerprint == there.fingerprint
    assert digest_of(here, 3) == digest_of(pickle.loads(pickle.dumps(there)), 3)
    assert paths_aside(here) == paths_aside(there)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def test_parquet_is_read_by_the_thread_that_asks(
    many: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A thread of Arrow's that still holds bytes of a file when Python ends would abort the process."""
    out = make_run(many, tmp_path / "run", quarter)
    threads = set()

    class Watched(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            threads.add(threading.get_ident())
            return super().read(size)

    opened = Path.open

    def watch(path: Path, mode: str = "r", *more: Any, **options: Any) -> Any:
        if path.suffix == ".parquet" and mode == "rb":
            return Watched(path)
        return opened(path, mode, *more, **options)

    monkeypatch.setattr(Path, "open", watch)
    records = list(iter_records(out))
    assert len(list(iter_tables(out, ("image_id", "sha256", "masks.list.element.area")))) > 1
    assert FinishedRun(out).record(records[0].image_id) == records[0]
    assert list(iter_sources(out))
    assert threads == {threading.get_ident()}


@pytest.mark.parametrize("damage", [truncate, empty, Path.unlink])
@pytest.mark.parametrize("formats", [("parquet",), ("tar",)])
def test_a_damaged_shard_is_named_whatever_reads_it(
    many: Path, tmp_path: Path, formats: tuple[str, ...], damage: Callable[[Path], None]
) -> None:
    out = make_run(many, tmp_path / "out", quarter, formats=formats)
    name = f"sa_000002.{formats[0]}"
    if damage is truncate and formats == ("tar",):  # its last blocks are padding
        (out / name).write_bytes((out / name).read_bytes()[:2000])
    else:
        damage(out / name)
    told = rf"cannot read {name} of {out}: .+; `sa-engine verify {out}` says what is damaged"
    for read in (
        iter_records,
        iter_sources,
        lambda out: iter_tables(out, ("image_id", "schema_version")),
    ):
        with pytest.raises(RunError, match=told):
            list(read(out))
    for command in (
        ["export", str(out), "--format=coco", f"--out={tmp_path / 'export'}"],
        ["split", str(out), "--holdout=3"],
        ["audit", str(out), str(out)],
        ["report", str(out)],
    ):
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 2 and f"cannot read {name} of" in result.stderr, result.output
    assert not (tmp_path / "export").exists() or not any((tmp_path / "export").iterdir())
