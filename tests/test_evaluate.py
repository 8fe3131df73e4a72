"""`evaluate`: means, intervals and differences against numpy, and the command end to end."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner, Result
from PIL import Image

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.interactive import Evaluation, EvaluationError, ImageScores, Protocol
from sa_engine.evaluation.results import (
    RESAMPLES,
    ModelResult,
    Report,
    by_size,
    estimate,
    short_names,
)
from sa_engine.holdout import split
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.reader import iter_records
from sa_engine.storage import RunError

PROTOCOL = Protocol(points=(1, 3))


def scores(*counts: int, seed: int = 0, shift: float = 0.0) -> Evaluation:
    """Images with so many masks of random IoU, alike within an image."""
    rng = np.random.default_rng(seed)
    images = []
    for number, count in enumerate(counts, 1):
        level = rng.uniform(0.2, 0.7)
        iou = {metric: level + rng.uniform(0, 0.2, count) + shift for metric in PROTOCOL.metrics}
        areas = rng.integers(1, 20_000, count)
        ids = tuple(range(number * 10_000, number * 10_000 + count))
        images.append(ImageScores(number, f"{number}.jpg", ids, areas, iou))
    return Evaluation(PROTOCOL, tuple(images))


def report(*models: list[Evaluation]) -> Report:
    data = tuple(
        DataSet(f"set{i}", Path(f"/runs/set{i}"), tuple(range(len(one.images))), one.masks, "f")
        for i, one in enumerate(models[0])
    )
    results = tuple(
        ModelResult(f"model{i}", f"{i}" * 64, 1.0, tuple(evaluations))
        for i, evaluations in enumerate(models)
    )
    return Report(protocol=PROTOCOL, data=data, models=results, settings={})


def test_a_data_sets_mean_is_over_masks_and_its_interval_over_images() -> None:
    evaluation = scores(1, 30, 4, 9, 2)
    found = estimate(evaluation, (7,))
    masks = [np.stack([image.iou[m] for m in ("1", "oracle", "3")]) for image in evaluation.images]
    assert np.allclose(found.values, np.concatenate(masks, axis=1).mean(axis=1))
    rng = np.random.default_rng((7,))
    means = [
        np.concatenate([masks[i] for i in rng.integers(5, size=5)], axis=1).mean(axis=1)
        for _ in range(RESAMPLES)
    ]
    assert np.allclose(found.interval, np.percentile(means, [2.5, 97.5], axis=0))
    assert evaluation.mean("3") == pytest.approx(found.values[2])


def test_the_interval_is_that_of_the_theory() -> None:
    """Many images of one mask each: 1.96 standard errors on either side."""
    evaluation = scores(*[1] * 400)
    found = estimate(evaluation)
    error = np.std([image.iou["1"][0] for image in evaluation.images]) / np.sqrt(400)
    low, high = found.interval[:, 0] - found.values[0]
    assert (-low, high) == pytest.approx((1.96 * error, 1.96 * error), rel=0.12)


def test_data_sets_count_the_same_and_models_are_compared_in_pairs() -> None:
    large, small = scores(*[5] * 30), scores(2, 3, seed=1)
    better = [scores(*[5] * 30, shift=0.05), scores(2, 3, seed=1, shift=0.01)]
    found = report([large, small], better)
    (first, second, mean), (_, _, other_mean) = found.estimates()
    assert np.allclose(mean.values, (first.values + second.values) / 2)
    difference = other_mean - mean
    assert np.allclose(difference.values, 0.03)
    # Every image is better by the same, whichever are drawn: pairs leave nothing to chance.
    assert np.allclose(difference.interval, 0.03)
    assert np.ptp(mean.interval[:, 0]) > 0.05
    # The data sets are drawn one by one.
    assert abs(np.corrcoef(first.resampled[:, 0], second.resampled[:, 0])[0, 1]) < 0.15


def test_the_dict_is_enough_to_bootstrap_again() -> None:
    found = report([scores(4, 2, 8), scores(1, 1, seed=1)], [scores(4, 2, 8, seed=2)] * 2)
    content = json.loads(json.dumps(found.to_dict()))
    first, second = content["models"]
    assert "minus_first" not in first
    for name in ("set0", "set1"):
        images = first["images"][name]
        for metric in ("1", "oracle", "3"):
            told = first["miou"][name][metric]
            total = sum(image["sum_iou"][metric] for image in images)
            assert told["value"] == pytest.approx(total / sum(image["masks"] for image in images))
            assert told["low"] <= told["value"] <= told["high"]
            difference = second["minus_first"][name][metric]["value"]
            assert difference == pytest.approx(
                second["miou"][name][metric]["value"] - told["value"]
            )
    assert [data["name"] for data in content["data"]] == ["set0", "set1"]
    assert set(first["miou"]) == {"set0", "set1", "mean"}


def test_sizes_are_cocos() -> None:
    areas = np.array([1023, 1024, 9215, 9216, 50_000])
    iou = {metric: np.array([0.1, 0.2, 0.4, 0.6, 0.8]) for metric in PROTOCOL.metrics}
    image = ImageScores(1, None, tuple(range(5)), areas, iou)
    found = by_size(Evaluation(PROTOCOL, (image,)))
    assert {name: count for name, (count, _) in found.items()} == {
        "small": 1,
        "medium": 2,
        "large": 2,
    }
    assert [float(mean[0]) for _, mean in found.values() if mean is not None] == pytest.approx(
        [0.1, 0.3, 0.7]
    )
    one = ImageScores(1, None, (0,), areas[:1], {metric: iou[metric][:1] for metric in iou})
    assert by_size(Evaluation(PROTOCOL, (one,)))["large"] == (0, None)


def test_the_table_has_a_row_for_the_mean_of_several_sets_only() -> None:
    one, two = scores(3, 4), scores(2, 3, seed=1)
    assert "mean" not in str(report([one]))
    lines = str(report([one, two], [two, one])).splitlines()
    assert lines[0] == "model0  (000000000000)"
    assert lines[1].split() == ["data", "set", "images", "masks", "1", "point", "oracle", "3", "points"]  # fmt: skip
    assert lines[2].split()[:3] == ["set0", "2", "7"]
    assert "model1 minus model0" in lines
    assert sum(line.startswith("mean") for line in lines) == 3
    assert max(map(len, lines)) <= 80


@pytest.mark.parametrize(
    ("paths", "names"),
    [
        (["/a/coco", "/a/ade"], ["coco", "ade"]),
        (["/a/val", "/b/val"], ["/a/val", "/b/val"]),
        (["/a/mean", "/a/ade"], ["/a/mean", "/a/ade"]),  # the table has a mean of its own
        (["vit_t", "round1/last.pt"], ["vit_t", "last.pt"]),
    ],
)
def test_names_are_short_where_they_differ(paths: list[str], names: list[str]) -> None:
    assert short_names(paths) == names


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    """Three ingested photos: one with two masks, one with one, one without."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "photos").mkdir()
    images, annotations = [], []
    for number, photo in enumerate(photos[:3]):
        height, width = photo.shape[:2]
        Image.fromarray(photo).save(folder / "photos" / f"{number}.png")
        images.append(
            {"id": number, "file_name": f"{number}.png", "height": height, "width": width}
        )
        rows, columns = np.indices((height, width))
        middle = np.hypot(columns / width - 0.5, rows / height - 0.45) < 0.25
        corner = (columns < width // 3) & (rows < height // 3)
        for mask in (middle, corner)[: 2 - number]:
            annotations.append(
                {"id": len(annotations), "image_id": number, "segmentation": rle.encode(mask)}
            )
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    assert ingest(folder, folder / "shards").exit_code == 0
    return folder / "shards"


def ingest(folder: Path, out: Path, *more: str) -> Result:
    command = ["ingest", f"--images={folder / 'photos'}", f"--annotations={folder / 'coco.json'}"]
    return CliRunner().invoke(main, [*command, f"--out={out}", "--local", *more])


def evaluate(*arguments: Any) -> Result:
    return CliRunner().invoke(main, ["evaluate", "--threads=1", *map(str, arguments)])


def test_the_command_end_to_end(shards: Path, tmp_path: Path) -> None:
    sam = load_sam(resolve("vit_t"))
    with torch.no_grad():
        for weight in sam.mask_decoder.parameters():
            weight.mul_(1 + 0.1 * torch.randn(weight.shape, generator=torch.manual_seed(0)))
    torch.save(sam.state_dict(), tmp_path / "worse.pt")
    out = tmp_path / "new" / "results"
    result = evaluate("--data", shards, "--checkpoint=vit_t", "--checkpoint", tmp_path / "worse.pt",
                      "--points=2,1", "--boxes", "--out", out)  # fmt: skip
    assert result.exit_code == 0, result.output
    assert result.stderr == ""  # no bar where there is no terminal
    content = json.loads((out / "evaluate.json").read_text())
    assert content["protocol"]["metrics"] == ["1", "oracle", "2", "box"]
    assert content["settings"]["threads"] == 1
    assert content["data"][0]["name"] == "shards"
    assert (content["data"][0]["images"], content["data"][0]["masks"]) == (2, 3)
    first, second = content["models"]
    assert [first["name"], second["name"]] == ["vit_t", "worse.pt"]
    assert first["fingerprint"] != second["fingerprint"]
    differences = second["minus_first"]["shards"]
    assert differences["box"]["low"] < differences["box"]["high"]
    assert differences["box"]["value"] != 0
    assert [image["masks"] for image in first["images"]["shards"]] == [2, 1]
    row = result.stdout.splitlines()[2].split()
    assert row[:3] == ["shards", "2", "3"]
    assert row[3:] == [f"{first['miou']['shards'][m]['value']:.3f}" for m in ("1", "oracle", "2", "box")]  # fmt: skip
    picture = Image.open(out / "evaluate.png")
    assert picture.size[0] > 300
    assert sorted(path.name for path in out.iterdir()) == ["evaluate.json", "evaluate.png"]


def test_json_to_the_terminal_of_a_run_without_pictures(shards: Path, tmp_path: Path) -> None:
    assert ingest(shards.parent, tmp_path / "bare", "--no-images").exit_code == 0
    options = ("--points=1", "--max-masks=1", "--limit-images=1", "--json")
    with_pictures, without = (
        json.loads(evaluate("--data", data, *options).stdout)
        for data in (shards, tmp_path / "bare")
    )
    for one in (with_pictures, without):
        assert [image["masks"] for image in one["models"][0]["images"][one["data"][0]["name"]]] == [1]  # fmt: skip
    assert with_pictures["data"][0]["fingerprint"] == without["data"][0]["fingerprint"]
    # The photo and its JPEG of quality 95.
    a, b = (one["models"][0]["miou"]["mean"]["1"]["value"] for one in (with_pictures, without))
    assert a == pytest.approx(b, abs=0.1)


def test_splits_and_samples_choose_images(shards: Path, tmp_path: Path) -> None:
    out = tmp_path / "shards"
    shutil.copytree(shards, out)
    with pytest.raises(RunError, match=r"no split: .*sa-engine split"):
        open_data(out, "a", "holdout")
    held_out = split(out, 1).image_ids
    with_masks = {record.image_id for record in iter_records(out) if record.masks}
    every = open_data(out, "a")
    assert set(every.image_ids) == with_masks
    rest = open_data(out, "a", "rest")
    assert set(rest.image_ids) == with_masks - held_out
    for data in (every, rest):
        found = list(data)
        assert [record.image_id for record, _ in found] == list(data.image_ids)
        assert sum(len(record.masks) for record, _ in found) == data.masks
        assert all(image.shape == (r.height, r.width, 3) for r, image in found)
    samples = {seed: open_data(out, "a", limit=1, seed=seed) for seed in range(8)}
    assert {len(one.image_ids) for one in samples.values()} == {1}
    assert {one.image_ids for one in samples.values()} == {(1,), (2,)}
    assert len({one.fingerprint for one in (every, *samples.values())}) == 3


def test_mistakes_are_told(shards: Path, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("in the way")
    for arguments, words in (
        (["--data", tmp_path / "none"], "is not the output of a run"),
        (["--data", shards, "--data", shards], "names a folder twice"),
        (["--data", shards, "--checkpoint=vit_x"], "vit_x: there is no such file"),
        (["--data", shards, "--checkpoint", file], "cannot read checkpoint"),
        (["--data", shards, "--split=rest"], "sa-engine split"),
        (["--data", shards, "--points=0,1"], "expected numbers from 1 on"),
        (["--data", shards, "--points=one"], "expected numbers from 1 on"),
        (["--data", shards, "--device=cuda:7"], "device cuda:7 is not available"),
        (["--data", shards, "--out", file], "name a folder that can be written"),
        ([], "Missing option '--data'"),
    ):
        result = evaluate(*arguments)
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert "Traceback" not in result.stderr


def test_runs_that_cannot_be_evaluated(shards: Path, tmp_path: Path) -> None:
    content = json.loads((shards.parent / "coco.json").read_text())
    shutil.copytree(shards.parent / "photos", tmp_path / "photos")
    (tmp_path / "coco.json").write_text(json.dumps({**content, "annotations": []}))
    assert ingest(tmp_path, tmp_path / "no_masks").exit_code == 0
    with pytest.raises(EvaluationError, match="none of its 3 finished images has any"):
        open_data(tmp_path / "no_masks", "a")
    damaged = tmp_path / "damaged"
    shutil.copytree(shards, damaged)
    for tar in damaged.glob("*.tar"):
        tar.write_bytes(tar.read_bytes()[:3000])
    result = evaluate("--data", damaged, "--points=1")
    assert result.exit_code == 2
    assert "sa-engine verify" in result.stderr
