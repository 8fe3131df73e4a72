"""What a training sees: which images and masks of real shards, in which order, where in the model-input frame."""

import hashlib
import io
import pickle
import shutil
import uuid
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import small_stage
from PIL import Image

from sa_engine import rle, runner
from sa_engine.evaluation.data import open_data
from sa_engine.finished import FinishedRun, image_digests
from sa_engine.holdout import split
from sa_engine.images import decode_image, resize_image
from sa_engine.modeling.sam import input_size
from sa_engine.partial import Finished, finished_record
from sa_engine.plan import PlannedImage
from sa_engine.reader import iter_records, iter_sources, iter_tables, read_image
from sa_engine.records import ARROW_SCHEMA, ImageRecord, image_name, mask_id
from sa_engine.remote import RemotePath
from sa_engine.storage import RunError
from sa_engine.training.data import Sample, TrainingData, TrainingDataError
from sa_engine.training.frame import Frame

Masks = list[tuple[str | None, np.ndarray]]


@dataclass(frozen=True)
class DrawnStage(small_stage.SmallStage):
    """Masks as a test draws them: by the photo's key and size."""

    draw: Callable[[str, int, int], Masks] = lambda key, height, width: []

    def make_worker(self, config: small_stage.SmallConfig) -> "DrawnWorker":
        return DrawnWorker(config, self.draw)


class DrawnWorker(small_stage.SmallWorker):
    def __init__(self, config: small_stage.SmallConfig, draw: Callable[..., Masks]) -> None:
        super().__init__(config)
        self.draw = draw

    def process(self, item: PlannedImage, prepared: tuple[np.ndarray, str]) -> Any:
        image, sha256 = prepared
        return image, sha256, self.draw(item.key, *image.shape[:2])

    def finish(self, item: PlannedImage, result: Any) -> Finished:
        image, sha256, masks = result
        records = [record_of(mask_id(item.image_id, i), *mask) for i, mask in enumerate(masks)]
        record = ImageRecord(image_id=item.image_id, width=image.shape[1], height=image.shape[0],
                             file_name=image_name(item.image_id), source_path=item.key,
                             sha256=sha256, masks=tuple(records))  # fmt: skip
        buffer = io.BytesIO()
        Image.fromarray(image).save(buffer, "JPEG", quality=95)
        return finished_record(record, buffer.getvalue() if self.config.write_images else None)


def record_of(number: int, source: str | None, mask: np.ndarray) -> Any:
    full = small_stage.mask_record(number, mask | (not mask.any()))
    return replace(full, source=source, segmentation=rle.encode(mask), area=int(mask.sum()))


def make_run(folder: Path, out: Path, draw: Callable[..., Masks], **options: Any) -> Path:
    config = small_stage.small_config(folder, out, **{"shard_size": 5, **options})
    extend = (out / "_run").exists()
    identity = lambda: {"model_fingerprint": "drawn"}  # noqa: E731
    report = runner.run(DrawnStage(draw=draw), config, identity, runner.Start(extend=extend))
    assert report.failed == 0
    return out


def share(height: int, width: int, *, of: float) -> np.ndarray:
    """A mask that covers so much of an image, from its left."""
    return np.arange(width)[None].repeat(height, 0) < width * of


def quarter(key: str, height: int, width: int) -> Masks:
    return [("automatic", share(height, width, of=0.25))]


@pytest.fixture
def many(photos: list[np.ndarray], tmp_path: Path) -> Path:
    """A folder of 24 different small pictures."""
    (tmp_path / "many").mkdir()
    for number in range(24):
        save(tmp_path / "many", number, photos)
    return tmp_path / "many"


def save(folder: Path, number: int, photos: list[np.ndarray]) -> None:
    picture = Image.fromarray(photos[number % 4]).reduce(16).rotate(number)
    picture.save(folder / f"{number:03}.png")


def paths_of(data: TrainingData, out: Path) -> set[str | None]:
    """Source paths of all images of an epoch, of the first run."""
    keys = {source.image_id: source.source_path for source in iter_sources(out)}
    rng = np.random.default_rng(0)
    samples = [data.load(index, rng, image_size=32) for index in range(len(data))]
    return {keys[one.image_id] for one in samples if one is not None and one.run == 0}


def paths_aside(data: TrainingData) -> set[str | None]:
    return {record.source_path for one in data.validation_sets() for record, _ in one}


def test_what_is_held_out_is_never_seen(
    many: Path, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    everything = {source.source_path for source in iter_sources(out)}
    held_out = {image["source_path"] for image in split(out, 6).images}
    data = TrainingData.open([out], validation=0.3)
    assert paths_of(data, out) | paths_aside(data) == everything - held_out
    assert paths_of(data, out).isdisjoint(paths_aside(data))
    (summary,) = data.runs
    assert summary.held_out == 6
    assert summary.images == len(data) == len(paths_of(data, out))
    assert summary.images + summary.validation_images == 24 - 6
    # Copies of these photos in a run that has no split of its own.
    other = make_run(many, tmp_path / "other", quarter, shard_size=7)
    both = TrainingData.open([other, out])
    assert paths_of(both, other) == everything - held_out
    assert [one.held_out for one in both.runs] == [6, 6]
    more = {image["source_path"] for image in split(other, 4, seed=9).images}
    both = TrainingData.open([other, out])
    assert paths_of(both, other) == everything - held_out - more
    assert [one.held_out for one in both.runs] == [len(held_out | more)] * 2
    # What a split made later will hold out.
    for number in range(24, 48):
        save(many, number, photos)
    make_run(many, out, quarter)
    data = TrainingData.open([out])
    before = paths_of(data, out)
    later = {image["source_path"] for image in split(out, 6).images}
    assert len(later) > len(held_out)
    assert before.isdisjoint(later)
    assert data.runs[0].held_out == len(later)


def test_masks_and_images_that_are_left_out_are_counted(many: Path, tmp_path: Path) -> None:
    drawn = {
        "003": (0.5, 0.9, 0.95, 1.0),
        "001": (1.0,),
        "002": (),
        "000": (0.0,),
        "004": (0.0, 0.2),
    }

    def draw(key: str, height: int, width: int) -> Masks:
        shares = drawn.get(key[:3], (0.3, 0.4))
        return [("automatic", share(height, width, of=of)) for of in shares]

    out = make_run(many, tmp_path / "out", draw)
    assert Image.open(many / "003.png").width == 40, "so that 36 columns are exactly 90 %"
    data = TrainingData.open([out])
    (summary,) = data.runs
    assert (summary.images, summary.without_masks, summary.without_usable_masks) == (21, 1, 2)
    assert (summary.large_masks, summary.empty_masks) == (3, 2)
    assert summary.masks == 19 * 2 + 2 + 1
    assert paths_of(data, out).isdisjoint({"001.png", "002.png", "000.png"})
    first = load_key(data, out, "003.png")
    assert len(first.masks) == 2
    assert np.allclose(first.masks.mean(axis=(1, 2)), (0.5, 0.9), atol=0.03)
    assert len(load_key(data, out, "004.png").masks) == 1
    assert TrainingData.open([out], max_mask_coverage=1.0).runs[0].large_masks == 0
    assert summary.to_dict()["large_masks"] == 3


def load_key(data: TrainingData, out: Path, key: str) -> Sample:
    """The sample of a photo."""
    (wanted,) = (source.image_id for source in iter_sources(out) if source.source_path == key)
    for index in range(len(data)):
        found = data.load(index, np.random.default_rng(0))
        if found is not None and found.image_id == wanted:
            return found
    raise AssertionError(f"{key} is not trained on")


def test_masks_are_sampled_by_the_steps_generator(many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        return [(None, share(height, width, of=of / 20)) for of in range(1, 11)]

    data = TrainingData.open([make_run(many, tmp_path / "out", draw)])
    whole = data.load(0, np.random.default_rng(0), image_size=64)
    assert whole is not None and len(whole.masks) == 10
    areas = whole.masks.sum(axis=(1, 2)).tolist()
    assert areas == sorted(set(areas))
    seen: Counter[int] = Counter()
    for seed in range(60):
        one, again = (
            data.load(0, np.random.default_rng(seed), image_size=64, max_masks=4) for _ in range(2)
        )
        assert one is not None and again is not None
        assert np.array_equal(one.masks, again.masks)
        found = one.masks.sum(axis=(1, 2)).tolist()
        assert len(found) == 4 and found == sorted(found), "in the order of the record"
        seen.update(found)
    assert set(seen) == set(areas)
    assert max(seen.values()) < 2.5 * min(seen.values())


def test_a_runs_images_are_repeated(many: Path, tmp_path: Path) -> None:
    first = make_run(many, tmp_path / "first", quarter)
    second = make_run(many, tmp_path / "second", quarter)
    data = TrainingData.open([first, second], repeat=(3, 1), oversample={"automatic": 2})
    assert data.slots == 24 * (3 + 1) * 2
    seen = Counter(index for _, index in data.batch(0, data.slots))
    rng = np.random.default_rng(0)
    for index, times in seen.items():
        sample = data.load(index, rng, image_size=32)
        assert sample is not None and times == (6, 2)[sample.run]
    with pytest.raises(TrainingDataError, match="repeat has 1 numbers: expected one for each of 2"):
        TrainingData.open([first, second], repeat=(3,))


def test_images_are_oversampled_by_the_sources_of_their_masks(many: Path, tmp_path: Path) -> None:
    sources: dict[str, tuple[str | None, ...]] = {
        "000": ("manual",),
        "001": ("automatic", "semi-automatic"),
        "002": (None,),
        "003": ("semi-automatic", "manual"),
    }

    def draw(key: str, height: int, width: int) -> Masks:
        named = sources.get(key[:3], ("automatic",))
        # What is too large counts for nothing.
        large: Masks = [("manual", share(height, width, of=1))] if key[:3] == "004" else []
        return [(source, share(height, width, of=0.3)) for source in named] + large

    out = make_run(many, tmp_path / "out", draw)
    data = TrainingData.open([out], oversample={"manual": 10, "semi-automatic": 3})
    keys = {source.image_id: str(source.source_path)[:3] for source in iter_sources(out)}
    assert data.slots == 10 + 3 + 1 + 10 + 20
    per_epoch = []
    for epoch in range(2):
        steps = range(epoch * data.slots, (epoch + 1) * data.slots)
        images = [index for step in steps for _, index in data.batch(step, 1)]
        per_epoch.append(images)
        samples = [data.load(i, np.random.default_rng(), image_size=16) for i in images]
        counts = Counter(keys[one.image_id] for one in samples if one is not None)
        expected = {"000": 10, "001": 3, "002": 1, "003": 10}
        assert counts == {key: expected.get(key, 1) for key in keys.values()}
    assert per_epoch[0] != per_epoch[1]
    for wrong, words in (
        ({"maual": 10}, "source 'maual': expected one of manual, assisted"),
        ({"manual": 0.5}, "whole number from 1 on"),
        ({"manual": 2.5}, "whole number from 1 on"),
    ):
        with pytest.raises(TrainingDataError, match=words):
            TrainingData.open([out], oversample=wrong)


def test_workers_share_what_one_alone_would_take(many: Path, tmp_path: Path) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    data = TrainingData.open([out], seed=5)
    for iteration in range(12):  # 7 does not divide 24: batches reach over the ends of epochs
        alone = data.batch(iteration, 7)
        assert [position for position, _ in alone] == list(range(7))
        for world in (2, 3):
            shares = [data.batch(iteration, 7, rank, world) for rank in range(world)]
            assert sorted(one for part in shares for one in part) == alone
            assert all(p % world == rank for rank, part in enumerate(shares) for p, _ in part)
    order = [index for i in range(48) for _, index in data.batch(i, 7)]
    assert all(sorted(order[at : at + 24]) == list(range(24)) for at in range(0, len(order), 24))
    assert len({tuple(order[at : at + 24]) for at in range(0, len(order), 24)}) == 14
    assert data.batch(30, 7) == [(p, order[30 * 7 + p]) for p in range(7)]
    same, other = (TrainingData.open([out], seed=seed).batch(3, 7) for seed in (5, 6))
    assert same == data.batch(3, 7) != other


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.indices((height, width)) + 0.5
    return np.hypot(rows - y * height, columns - x * width) < radius


def painted(folder: Path, height: int, width: int) -> tuple[Path, Callable[..., Masks]]:
    """Pictures in which the mask is what is white, on black."""
    (folder / "painted").mkdir()
    size = min(height, width)
    masks = {
        "a.png": disc(height, width, 0.4, 0.3, size / 5),
        "b.png": disc(height, width, 0.7, 0.8, size / 7),
        "c.png": disc(height, width, 0.05, 0.6, size / 4),
    }
    for name, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "painted" / name)
    return folder / "painted", lambda key, height, width: [("automatic", masks[key])]


@pytest.mark.parametrize(("height", "width"), [(450, 600), (700, 500)])
def test_jitter_keeps_masks_on_their_objects(height: int, width: int, tmp_path: Path) -> None:
    folder, draw = painted(tmp_path, height, width)
    data = TrainingData.open([make_run(folder, tmp_path / "out", draw)])
    scales, lost, cropped, compared = [], 0, 0, 0
    for seed in range(90):
        found = data.load(seed % 3, np.random.default_rng(seed), image_size=256, jitter=(0.1, 2.0))
        if found is None:
            lost += 1
            continue
        h, w = found.size
        assert found.pixels is not None and found.pixels.shape == (h, w, 3)
        assert found.masks.shape == (1, h, w) and max(h, w) <= 256
        cropped += h == w == 256
        scales.append(max(h, w) / 256)
        (mask,), seen = found.masks, found.pixels[..., 0] > 127
        assert 0 < mask.sum() <= 0.9 * h * w
        assert (mask ^ seen).sum() <= 0.25 * np.sqrt(mask.sum()) + 2, (
            "but single pixels of its edge"
        )
        if mask.sum() > 100:
            offset = np.argwhere(mask).mean(axis=0) - np.argwhere(seen).mean(axis=0)
            assert np.abs(offset).max() < 0.1
            compared += 1
    assert min(scales) < 0.3 and cropped > 3 and lost > 0 and compared > 40


def test_the_scale_of_the_jitter_is_uniform_and_crops_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    frames = [Frame.jittered(600, 800, 1024, (0.1, 2.0), rng) for _ in range(2000)]
    scales = np.array([frame.scaled[1] / 1024 for frame in frames])
    quartiles = np.quantile(scales, (0, 0.25, 0.5, 0.75, 1))
    assert np.allclose(quartiles, (0.1, 0.575, 1.05, 1.525, 2), atol=0.06)
    for frame in frames:
        assert frame.scaled == input_size(600, 800, frame.scaled[1])
        assert frame.size == tuple(min(side, 1024) for side in frame.scaled)
        assert all(0 <= c <= a - b for c, a, b in zip(frame.corner, frame.scaled, frame.size, strict=True))  # fmt: skip
    large = [frame for frame in frames if frame.scaled[1] > 1900]
    lefts = np.array([frame.corner[1] / (frame.scaled[1] - 1024) for frame in large])
    assert lefts.min() < 0.1 and lefts.max() > 0.9 and abs(lefts.mean() - 0.5) < 0.1


def test_a_mask_that_fills_what_is_seen_is_dropped(many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        return [("automatic", share(height, width, of=0.8))]

    data = TrainingData.open([make_run(many, tmp_path / "out", draw)])
    rngs = map(np.random.default_rng, range(40))
    ends = [data.load(0, rng, image_size=64, jitter=(2.0, 2.0)) for rng in rngs]
    covered = [one.masks[0].mean() for one in ends if one is not None]
    assert 0 < len(covered) < 40
    assert max(covered) <= 0.9


@pytest.mark.parametrize("photo", range(4))
def test_an_image_is_what_a_predictor_sees(
    photo: int, photos: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    Image.fromarray(photos[photo]).save(tmp_path / "one" / "a.png")

    def draw(key: str, height: int, width: int) -> Masks:
        dot = np.zeros((height, width), bool)
        dot[height // 3, width // 2] = True
        return [("manual", disc(height, width, 0.5, 0.6, height / 3)), ("manual", dot)]

    out = make_run(tmp_path / "one", tmp_path / "out", draw)
    data = TrainingData.open([out])
    released = decode_image(read_image(out, 1))
    (record,) = iter_records(out)
    for image_size in (1024, 200):  # larger and smaller than the photo
        found = data.load(0, np.random.default_rng(0), image_size=image_size)
        assert found is not None and found.pixels is not None
        h, w = input_size(*released.shape[:2], image_size)
        assert found.size == (h, w)
        assert np.array_equal(found.pixels, resize_image(released, h, w))
        assert np.array_equal(found.pixels, data.pixels(0, image_size))
        how = cv2.INTER_LINEAR if image_size == 1024 else cv2.INTER_AREA
        truth = rle.decode(record.masks[0].segmentation).astype(np.float32)
        expected = cv2.resize(truth, (w, h), interpolation=how)
        differ = (expected >= 0.5) != found.masks[0]
        assert differ.sum() <= 2 and np.abs(expected[differ] - 0.5).max(initial=0) < 1e-5
        # One pixel of the photo is never nothing.
        (row, column), *more = np.argwhere(found.masks[1])
        assert (image_size == 1024) == bool(more)
        scale = h / record.height
        assert abs(row - record.height // 3 * scale) <= 2 * max(1, scale)
        assert abs(column - record.width // 2 * scale) <= 2 * max(1, scale)
    bare = data.load(0, np.random.default_rng(0), image_size=200, pixels=False)
    assert bare is not None and bare.pixels is None
    assert np.array_equal(bare.masks, found.masks)
    with pytest.raises(ValueError, match="cannot be jittered"):
        data.load(0, np.random.default_rng(0), jitter=(0.1, 2), pixels=False)


def test_validation_stays_when_images_are_added(
    many: Path, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    first = TrainingData.open([out], validation=0.25)
    aside, trained = paths_aside(first), paths_of(first, out)
    assert len(aside) == first.runs[0].validation_images and len(aside | trained) == 24
    assert 2 <= len(aside) <= 12
    copied = min(str(path) for path in aside)
    (many / "copy.png").write_bytes((many / copied).read_bytes())
    for number in range(24, 48):
        save(many, number, photos)
    make_run(many, out, quarter)
    second = TrainingData.open([out], validation=0.25)
    assert aside | {"copy.png"} <= paths_aside(second)
    assert trained <= paths_of(second, out)
    assert second.fingerprint != first.fingerprint
    (data_set,) = second.validation_sets()
    for record, image in data_set:
        assert image.shape == (record.height, record.width, 3) and record.masks
    other = TrainingData.open([out], validation=0.25, seed=1)
    assert paths_aside(other) != paths_aside(second)
    # Independent of the hash by which images are held out: that has taken the smallest.
    split(out, 16)
    rest = TrainingData.open([out], validation=0.25)
    assert 3 <= rest.runs[0].validation_images < rest.runs[0].images


def test_validation_takes_one_image_of_few(many: Path, tmp_path: Path) -> None:
    for path in sorted(many.iterdir())[2:]:
        path.unlink()
    out = make_run(many, tmp_path / "out", quarter)
    for share_aside in (0.001, 0.999):
        data = TrainingData.open([out], validation=share_aside)
        assert (len(data), data.runs[0].validation_images) == (1, 1)
        assert paths_of(data, out) | paths_aside(data) == {"000.png", "001.png"}
    assert TrainingData.open([out]).validation_sets() == []
    with pytest.raises(TrainingDataError, match="expected a share"):
        TrainingData.open([out], validation=1.0)
    # Of copies of one photo none can be kept aside: the others would be trained on.
    (many / "001.png").write_bytes((many / "000.png").read_bytes())
    same = TrainingData.open([make_run(many, tmp_path / "same", quarter)], validation=0.001)
    assert (len(same), same.runs[0].validation_images) == (2, 0)


def test_the_fingerprint_is_of_the_photos_and_masks(many: Path, tmp_path: Path) -> None:
    outs = [make_run(many, tmp_path / name, draw, **options) for name, draw, options in (
        ("a", quarter, {}), ("bare", quarter, {"write_images": False}), ("sized", quarter, {"shard_size": 3}),
        ("other", lambda key, h, w: [("manual", share(h, w, of=0.3))], {}))]  # fmt: skip
    one, bare, sized, other = (TrainingData.open([out]) for out in outs)
    assert one.fingerprint == bare.fingerprint == sized.fingerprint != other.fingerprint
    both = TrainingData.open([outs[0], outs[3]])
    assert [run.fingerprint for run in both.runs] == [x.runs[0].fingerprint for x in (one, other)]
    assert [run.name for run in both.runs] == ["a", "other"]
    assert both.fingerprint != one.fingerprint
    assert one.runs[0].fingerprint == open_data(outs[0], "a").fingerprint
    for table in (table for _, table in iter_tables(outs[0], ARROW_SCHEMA.names)):
        for record, digest in zip(records_of(table, outs[0]), image_digests(table), strict=True):
            lines = [f"{record.image_id} {record.width} {record.height} {record.sha256}"]
            lines += [f"{mask.id} {mask.segmentation['counts']}" for mask in record.masks]
            assert digest == hashlib.sha256("\n".join(lines).encode()).hexdigest()


def records_of(table: Any, out: Path) -> list[ImageRecord]:
    ids = set(table.column("image_id").to_pylist())
    return [record for record in iter_records(out) if record.image_id in ids]


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
