"""What a round is measured on, while it is trained and by its gate: a fair sample of photos it has not seen."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from training import Masks, make_run, paths_aside, quarter, save, share

from sa_engine.cli import main
from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.holdout import split
from sa_engine.options import ConfigError
from sa_engine.reader import iter_sources
from sa_engine.records import ImageRecord
from sa_engine.rounds import Parent
from sa_engine.storage import RunPaths
from sa_engine.training import round
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.group import Group
from sa_engine.training.report import Plan
from sa_engine.training.validation import ValidationImages


def config(data: Path, *gate: Path, **options: float) -> RetrainConfig:
    gates = tuple(str(one) for one in gate)
    out = str(data.parent / "round")
    return RetrainConfig(data=(str(data),), gate=gates, out=out, validation=0.25, **options)  # type: ignore[arg-type]


def opened(wanted: RetrainConfig) -> tuple[TrainingData, tuple[DataSet, ...]]:
    _, data = round.open_round(wanted)
    return data, round.gate_sets(wanted, data)


def paths(out: Path, ids: object) -> set[str | None]:
    return {one.source_path for one in iter_sources(out) if one.image_id in set(ids)}  # type: ignore[call-overload]


@pytest.fixture
def copies(many: Path, tmp_path: Path) -> Path:
    """A folder of the same 24 pictures under other names."""
    (tmp_path / "copies").mkdir()
    for path in many.iterdir():
        shutil.copy(path, tmp_path / "copies" / f"copy-{path.name}")
    return tmp_path / "copies"


def test_copies_of_what_is_trained_on_are_not_in_the_gate(
    many: Path, copies: Path, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    gate = make_run(copies, tmp_path / "gate", quarter, shard_size=7)
    # Photos that are validated on are none for the gate either.
    with pytest.raises(
        ConfigError, match=r"gate .*/gate has no photo .* all its 24 images .*--holdout N"
    ):
        opened(config(out, gate))
    for number in (30, 31, 32):
        save(copies, number, photos)
    make_run(copies, gate, quarter, shard_size=7)
    data, (left,) = opened(config(out, gate))
    assert paths(gate, left.image_ids) == {"030.png", "031.png", "032.png"}
    assert (left.left_out, left.masks, left.name) == (24, 3, "gate")
    assert left.fingerprint != open_data(gate, "gate").fingerprint
    parent = Parent(name="vit_t", fingerprint="", sha256="")
    plan = Plan("retrain", config(out), RunPaths(out), data, parent, "f", (left,), (1, 1))
    assert "gate: gate, 3 images; 24 left out, which are in the data\n" in str(plan)


def test_what_a_gate_holds_out_is_not_trained_on(many: Path, copies: Path, tmp_path: Path) -> None:
    out = make_run(many, tmp_path / "out", quarter)
    gate = make_run(copies, tmp_path / "gate", quarter)
    held_out = {str(one["source_path"]) for one in split(gate, 5).images}
    data, (judged,) = opened(config(out, gate))
    assert paths(gate, judged.image_ids) == held_out and judged.left_out == 0
    (summary,) = data.runs
    assert (summary.held_out, summary.images + summary.validation_images) == (5, 19)
    assert paths_aside(data).isdisjoint(path.removeprefix("copy-") for path in held_out)


def test_another_gate_is_other_data_only_if_it_holds_out_some_of_them(
    many: Path, copies: Path, tmp_path: Path, photos: list[np.ndarray]
) -> None:
    """What a round that was stopped compares before it goes on."""
    out = make_run(many, tmp_path / "out", quarter)
    (tmp_path / "others").mkdir()
    for number in range(30, 34):
        save(tmp_path / "others", number, photos)
    others = make_run(tmp_path / "others", tmp_path / "gate", quarter)
    split(others, 2)
    alone, beside = (opened(one)[0] for one in (config(out), config(out, others)))
    assert alone.fingerprint == beside.fingerprint
    # One photo that was only validated on counts too.
    kept = sorted(str(path) for path in paths_aside(alone))[1]
    for path in copies.iterdir():
        if path.name != f"copy-{kept}":
            path.unlink()
    one = make_run(copies, tmp_path / "one", quarter)
    split(one, 1)
    less, _ = opened(config(out, one))
    assert [run.fingerprint for run in less.runs] == [run.fingerprint for run in alone.runs]
    assert less.fingerprint != alone.fingerprint


def seen(sample: ValidationImages) -> list[int]:
    """Ids of a sample's images."""
    found: list[int] = []

    def score(name: str, record: ImageRecord, image: np.ndarray) -> tuple[list[float], int]:
        found.append(record.image_id)
        return [0.0], 1

    sample.means(1, score)
    return found


class OneOf(Group):
    """One of several workers, without the others."""

    def sum(self, values: object) -> list[float]:
        return list(values)  # type: ignore[call-overload]


def test_a_sample_is_random_and_workers_share_it(many: Path, tmp_path: Path) -> None:
    """Photos in the order of their names may be of one scene after another."""
    data = open_data(make_run(many, tmp_path / "out", quarter), "out")
    whole = seen(ValidationImages([data], 8, Group()))
    assert whole == sorted(set(whole)) and len(whole) == 8
    assert max(whole) > 16 and min(whole) <= 8, "from all over"
    assert seen(ValidationImages([data], 8, Group())) == whole
    shares = [seen(ValidationImages([data], 8, OneOf(rank, 3))) for rank in range(3)]
    assert sorted(one for share in shares for one in share) == whole and max(map(len, shares)) == 3
    assert set(seen(ValidationImages([data], 4, Group()))) < set(whole)
    assert seen(ValidationImages([data], 99, Group())) == list(data.image_ids)


def drawn(key: str, height: int, width: int) -> Masks:
    """Every third picture has a mask without pixels besides."""
    empty: Masks = [("manual", share(height, width, of=0))] if int(key[:3]) % 3 == 0 else []
    return [("automatic", share(height, width, of=0.25)), *empty]


def test_images_with_empty_masks_are_trained_on_but_not_measured(
    many: Path, tmp_path: Path
) -> None:
    out = make_run(many, tmp_path / "out", drawn)
    data = TrainingData.open([out], validation=0.9)
    (summary,) = data.runs
    assert (summary.images + summary.validation_images, summary.empty_masks) == (24, 8)
    assert 8 <= summary.images < 16
    assert all(int(str(path)[:3]) % 3 for path in paths_aside(data))
    # A copy without such a mask is not validated on either: the photo is trained on.
    aside = sorted(str(path) for path in paths_aside(data))[:1]
    (many / f"051{aside[0]}").write_bytes((many / aside[0]).read_bytes())
    assert paths_aside(data) - paths_aside(
        TrainingData.open([make_run(many, tmp_path / "more", drawn)], validation=0.9)
    ) >= set(aside)
    # Where no other mask is asked for, it does no harm.
    some = TrainingData.open([out], validation=0.9, sources=("automatic",))
    assert any(int(str(path)[:3]) % 3 == 0 for path in paths_aside(some))


def test_one_photo_that_can_be_measured_is_enough(many: Path, tmp_path: Path) -> None:
    for path in sorted(many.iterdir())[2:]:
        path.unlink()
    data = TrainingData.open([make_run(many, tmp_path / "out", drawn)], validation=0.01)
    assert paths_aside(data) == {"001.png"} and len(data) == 1
    (many / "001.png").unlink()
    (many / "001.png").write_bytes((many / "000.png").read_bytes())
    with pytest.raises(ConfigError, match="expected two photos, one of them without empty masks"):
        round.open_round(config(make_run(many, tmp_path / "same", drawn)))


def test_an_empty_mask_is_told_before_anything_is_measured(many: Path, tmp_path: Path) -> None:
    out = make_run(many, tmp_path / "out", drawn)
    (first, *_) = (one.image_id for one in iter_sources(out) if one.source_path == "000.png")
    told = rf"out, image {first}: mask {first}0001 has no pixel.*`sa-engine verify .*out`"
    with pytest.raises(EvaluationError, match=told):
        open_data(out, "out")
    result = CliRunner().invoke(main, ["evaluate", f"--data={out}", "--checkpoint=nowhere"])
    assert result.exit_code == 2 and "has no pixel" in result.stderr
    verified = CliRunner().invoke(main, ["verify", str(out)])
    assert f"mask {first}0001" in verified.output.replace(",", "")
    other = tmp_path / "many2"
    other.mkdir()
    (other / "a.png").write_bytes((many / "001.png").read_bytes())
    trained = make_run(other, tmp_path / "trained", quarter)
    with pytest.raises(EvaluationError, match=told):
        round.gate_sets(config(trained, out), TrainingData.open([trained]))
    # Of a sample that has none, nothing is said.
    counts = {len(open_data(out, "out", limit=1, seed=seed).image_ids) for seed in unharmed(out)}
    assert counts == {1}


def unharmed(out: Path) -> list[int]:
    """Some seeds whose sample of one image is one without empty masks."""
    fine = {one.image_id for one in iter_sources(out) if int(str(one.source_path)[:3]) % 3}
    ids = [one.image_id for one in iter_sources(out)]
    drawn = {s: np.random.default_rng(s).choice(ids, 1, replace=False)[0] for s in range(9)}
    return [seed for seed, image_id in drawn.items() if image_id in fine]


def test_masks_of_some_sources_alone(many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        sources = ("manual", "automatic", "automatic", None)[: 1 + int(key[:3]) % 4]
        shares: Masks = [
            (one, share(height, width, of=0.2 + 0.1 * i)) for i, one in enumerate(sources)
        ]
        if key == "000.png":
            shares = [("automatic", share(height, width, of=1.0))]
        return (
            [*shares, ("semi-automatic", share(height, width, of=0.8))] if key > "012" else shares
        )

    out = make_run(many, tmp_path / "out", draw)
    every = TrainingData.open([out], validation=0.3)
    assert every.runs[0].other_masks == 0 and every.runs[0].large_masks == 1
    data = TrainingData.open([out], validation=0.3, sources=("manual", "semi-automatic"))
    (summary,) = data.runs
    assert (summary.without_usable_masks, summary.large_masks, summary.empty_masks) == (1, 0, 0)
    assert summary.other_masks == 6 * (1 + 2 + 3) + 1
    assert summary.masks + summary.validation_masks == 23 + 12
    (kept,) = data.validation_sets()
    records = [record for record, _ in kept]
    assert kept.masks == summary.validation_masks == sum(len(one.masks) for one in records)
    assert {mask.source for one in records for mask in one.masks} == {"manual", "semi-automatic"}
    samples = [data.load(i, np.random.default_rng(0), image_size=32) for i in range(len(data))]
    assert sum(len(one.masks) for one in samples if one is not None) == summary.masks
    assert sum(len(data.boxes(i, 32).boxes) for i in range(len(data))) == summary.masks
    left_out = {"large": 0, "empty": 0, "other sources": summary.other_masks}
    assert round.trained_on(data)[0].left_out == left_out
    with pytest.raises(ConfigError, match="sources = manuel: expected some of manual, assisted"):
        RetrainConfig(data=("-",), out="-", sources=("manuel",))
    with pytest.raises(
        Exception, match=r"no image to train on; .*\(\d+ masks are of other sources"
    ):
        TrainingData.open([out], sources=("assisted",))
