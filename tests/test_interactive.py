"""Clicking on masks with the real model: the same numbers as the released predictor's, and what follows from them."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import mobile_sam
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from parity.clicking import click_through, error_center
from parity.reference import load_reference, photo

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.evaluation.data import open_data
from sa_engine.evaluation.interactive import (
    EvaluationError,
    Protocol,
    evaluate_image,
    evaluate_model,
    evaluate_models,
)
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor
from sa_engine.records import ImageRecord, MaskRecord

THREE = Protocol(points=(1, 2, 3))


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_sam(resolve("vit_t")))


@pytest.fixture(scope="module")
def reference() -> mobile_sam.SamPredictor:
    return mobile_sam.SamPredictor(load_reference("vit_t")[0])


@pytest.fixture(scope="session")
def ingested(shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Gives the shards of a shared data set's val images."""
    folder = tmp_path_factory.mktemp("ingested")

    def shards(name: str) -> Path:
        source, out = shared_data / name / "val", folder / name
        command = ["ingest", f"--images={source / 'images'}", f"--out={out}", "--local"]
        command += [f"--annotations={source / 'annotations.json'}", "--threads-per-worker=1"]
        result = CliRunner().invoke(main, command)
        assert result.exit_code == 0, result.output
        return out

    return shards


@pytest.mark.parametrize("name", ["coco", "bbbc038"])
def test_scores_equal_the_released_predictors(
    name: str,
    predictor: Predictor,
    reference: mobile_sam.SamPredictor,
    ingested: Callable[[str], Path],
) -> None:
    protocol = replace(THREE, max_masks=3)
    compared = 0
    for record, image in open_data(ingested(name), name, limit=1):
        reference.set_image(image)
        ours = evaluate_image(predictor, record, image, protocol)
        masks = {mask.id: mask for mask in record.masks}
        for index, mask_id in enumerate(ours.mask_ids):
            truth = rle.decode(masks[mask_id].segmentation)
            theirs = click_through(reference, truth, 3)
            found = [ours.iou[metric][index] for metric in ("1", "2", "3", "oracle")]
            assert np.allclose(found, [*theirs.iou, theirs.oracle], atol=1e-3)
            compared += 1
    assert compared >= 3


@pytest.mark.parity_full
@pytest.mark.parametrize("name", ["coco", "bsds500", "bbbc038"])
def test_whole_data_sets_equal_the_released_predictors(
    name: str,
    predictor: Predictor,
    reference: mobile_sam.SamPredictor,
    ingested: Callable[[str], Path],
) -> None:
    protocol = Protocol(points=(1, 3))
    ours, theirs = [], []
    for record, image in open_data(ingested(name), name):
        reference.set_image(image)
        scores = evaluate_image(predictor, record, image, protocol)
        ours += zip(*(scores.iou[metric] for metric in ("1", "oracle", "3")), strict=True)
        for mask in record.masks:
            clicked = click_through(reference, rle.decode(mask.segmentation), 3)
            theirs.append((clicked.iou[0], clicked.oracle, clicked.iou[2]))
    a, b = np.array(ours), np.array(theirs)
    print(f"\n{name}: {len(a)} masks; 1 point, oracle, 3 points: ours {a.mean(axis=0).round(5)}, "
          f"theirs {b.mean(axis=0).round(5)}, masks that differ by more than 0.001: "
          f"{(abs(a - b) > 1e-3).sum(axis=0)}, largest difference {abs(a - b).max(axis=0)}", flush=True)  # fmt: skip
    assert len(a) >= 500
    assert np.abs(a.mean(axis=0) - b.mean(axis=0)).max() < 0.002


def record_of(*masks: np.ndarray) -> ImageRecord:
    height, width = masks[0].shape
    return ImageRecord(
        image_id=1,
        width=width,
        height=height,
        file_name="sa_1.jpg",
        source_path="coffee.png",
        sha256=None,
        masks=tuple(
            MaskRecord(
                id=10_000 + index,
                segmentation=rle.encode(mask),
                area=int(mask.sum()),
                bbox=[0.0, 0.0, 0.0, 0.0],
                predicted_iou=None,
                stability_score=None,
                point_coords=None,
                crop_box=None,
            )
            for index, mask in enumerate(masks)
        ),
    )


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return photo("coffee")


@pytest.fixture(scope="module")
def record(image: np.ndarray) -> ImageRecord:
    """The cup, the spoon's half of the table, and a few pixels of nothing."""
    rows, columns = np.indices(image.shape[:2])
    cup = ((columns - 300) / 150) ** 2 + ((rows - 190) / 150) ** 2 <= 1
    return record_of(cup, columns > 420, (rows > 390) & (columns < 9))


def test_the_batch_changes_nothing(
    predictor: Predictor, record: ImageRecord, image: np.ndarray
) -> None:
    protocol = Protocol(points=(1, 2), boxes=True)
    one, all_three = (
        evaluate_image(predictor, record, image, replace(protocol, masks_per_batch=size))
        for size in (1, 3)
    )
    assert list(one.iou) == ["1", "oracle", "2", "box"]
    for metric, values in one.iou.items():
        assert np.allclose(values, all_three.iou[metric], atol=1e-4)
    assert one.areas.tolist() == [mask.area for mask in record.masks]
    assert (one.iou["oracle"] >= one.iou["1"]).all()
    # The three masks are told apart, and the cup is found from its box.
    assert len({round(value, 3) for value in one.iou["1"]}) == 3
    assert one.iou["box"][0] > 0.6


def test_random_points_and_samples_depend_on_the_seed_alone(
    predictor: Predictor, record: ImageRecord, image: np.ndarray
) -> None:
    protocol = Protocol(points=(1,), first_point="random", seed=3)
    whole = evaluate_image(predictor, record, image, protocol)
    again = evaluate_image(predictor, record, image, replace(protocol, max_masks=2))
    assert len(again.mask_ids) == 2
    assert set(again.mask_ids) < set(whole.mask_ids)
    at = [whole.mask_ids.index(mask) for mask in again.mask_ids]
    assert np.allclose(again.iou["1"], whole.iou["1"][at], atol=1e-4)
    other = evaluate_image(predictor, record, image, replace(protocol, seed=4))
    assert not np.allclose(other.iou["1"], whole.iou["1"], atol=1e-3)


def test_a_mask_without_an_error_gets_no_click(predictor: Predictor, image: np.ndarray) -> None:
    """A mask that the model finds from the click in its middle: it stays perfect."""
    embedding = predictor.embed(image)
    x, y = 300, 190
    for _ in range(20):
        points, labels = np.array([[[x, y]]]), np.ones((1, 1))
        logits, scores = predictor.predict(embedding, points, labels)
        mask = (predictor.upsample(logits, embedding)[0, scores.argmax()] > 0).numpy()
        found = error_center(mask, np.zeros_like(mask))
        assert found is not None
        if found[:2] == (x, y):
            break
        x, y = found[:2]
    else:
        pytest.fail("no mask has its own click in its middle")
    record = record_of(mask, np.roll(mask, 40, axis=1))
    scores_ = evaluate_image(predictor, record, image, Protocol(points=(1, 2, 3)))
    for metric in ("1", "2", "3"):
        assert scores_.iou[metric][0] == 1
        assert scores_.iou[metric][1] < 1


def test_a_model_on_many_images(
    predictor: Predictor, record: ImageRecord, image: np.ndarray
) -> None:
    seen = []
    empty = replace(record, masks=())
    found = evaluate_model(
        predictor, [(empty, image), (record, image)], Protocol(points=(1,)), lambda: seen.append(1)
    )
    assert (len(found.images), found.masks, len(seen)) == (1, 3, 2)
    assert found.mean("1") == found.images[0].iou["1"].mean()


def test_models_with_one_encoder_share_its_embedding(
    record: ImageRecord, image: np.ndarray
) -> None:
    """And have the scores that each has alone; another encoder embeds for itself."""
    sams = [load_sam(resolve("vit_t")) for _ in range(3)]
    with torch.no_grad():
        sams[1].mask_decoder.mask_tokens.weight.mul_(1.1)
        sams[2].image_encoder.neck[-1].weight.mul_(1.1)
    embedded = [0, 0, 0]
    predictors = [Predictor(sam) for sam in sams]
    for index, sam in enumerate(sams):
        sam.image_encoder.register_forward_hook(partial(_count, embedded, index))
    seconds = [0.0] * 3
    found = evaluate_models(predictors, [(record, image)], THREE, seconds=seconds)
    assert embedded == [1, 0, 1]
    assert all(spent > 0 for spent in seconds)
    alone = [evaluate_model(one, [(record, image)], THREE) for one in predictors]
    for together, by_itself in zip(found, alone, strict=True):
        for metric, values in by_itself.images[0].iou.items():
            assert np.array_equal(together.images[0].iou[metric], values)
    assert len({one.mean("1") for one in found}) == 3


def _count(counts: list[int], index: int, *_: object) -> None:
    counts[index] += 1


def test_what_cannot_be_evaluated_is_told(
    predictor: Predictor, record: ImageRecord, image: np.ndarray
) -> None:
    nothing = record_of(np.zeros(image.shape[:2], bool))
    for images, reason in (
        ([], "no masks"),
        ([(replace(record, masks=()), image)], "no masks"),
        ([(record, image[:, 1:])], "599x400 pixels.*600x400"),
        ([(nothing, image)], "mask 10000 has no pixel"),
    ):
        with pytest.raises(EvaluationError, match=reason):
            evaluate_model(predictor, images, THREE)


def test_a_damaged_model_is_told(record: ImageRecord, image: np.ndarray) -> None:
    sam = load_sam(resolve("vit_t"))
    with torch.no_grad():
        sam.image_encoder.neck[0].weight[0, 0] = torch.nan
    with pytest.raises(EvaluationError, match="image 1: .*the checkpoint is damaged"):
        evaluate_model(Predictor(sam), [(record, image)], THREE)
