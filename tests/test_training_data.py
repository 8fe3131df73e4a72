"""What a training sees: which images and masks of real shards, and in which order."""

import hashlib
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from training import Masks, make_run, paths_aside, quarter, save, share

from sa_engine.evaluation.data import open_data
from sa_engine.finished import image_digests
from sa_engine.holdout import split
from sa_engine.reader import iter_records, iter_sources, iter_tables
from sa_engine.records import ARROW_SCHEMA, ImageRecord
from sa_engine.training.data import Sample, TrainingData, TrainingDataError


def records_of(table: Any, out: Path) -> list[ImageRecord]:
    ids = set(table.column("image_id").to_pylist())
    return [record for record in iter_records(out) if record.image_id in ids]


def paths_of(data: TrainingData, out: Path) -> set[str | None]:
    """Source paths of all images of an epoch, of the first run."""
    keys = {source.image_id: source.source_path for source in iter_sources(out)}
    rng = np.random.default_rng(0)
    samples = [data.load(index, rng, image_size=32) for index in range(len(data))]
    return {keys[one.image_id] for one in samples if one is not None and one.run == 0}


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


@pytest.mark.parametrize("name", ["box", "iteration"])
def test_a_run_may_be_called_as_a_figure_of_a_validation(
    many: Path, tmp_path: Path, name: str
) -> None:
    out = make_run(many, tmp_path / name, quarter)
    (kept,) = TrainingData.open([out], validation=0.3).validation_sets()
    assert kept.name == f"{name} (data)"
