"""Prompting against the released predictor, with the real weights."""

import json
from pathlib import Path

import mobile_sam
import numpy as np
import pytest
import torch
from parity.reference import load_reference, photo

from sa_engine import rle
from sa_engine.errors import SaEngineError
from sa_engine.images import decode_image
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Embedding, Predictor


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return photo("coffee")


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_sam(resolve("vit_t")))


@pytest.fixture(scope="module")
def embedding(predictor: Predictor, image: np.ndarray) -> Embedding:
    return predictor.embed(image)


@pytest.fixture(scope="module")
def reference(image: np.ndarray) -> mobile_sam.SamPredictor:
    found = mobile_sam.SamPredictor(load_reference("vit_t")[0])
    found.set_image(image)
    return found


POINTS = np.array([[300.0, 180.0], [520.0, 60.0]])
LABELS = np.array([1, 0])
BOX = np.array([90.0, 30.0, 480.0, 340.0])


@pytest.mark.parametrize("multimask", [True, False])
@pytest.mark.parametrize("prompt", ["points", "box", "points and box", "mask and points"])
def test_masks_equal_the_released_predictor(
    prompt: str,
    multimask: bool,
    predictor: Predictor,
    embedding: Embedding,
    reference: mobile_sam.SamPredictor,
) -> None:
    """The same prompts, in pixels of the photo, give the same masks, scores and logits."""
    with_points, with_box = "points" in prompt, "box" in prompt
    previous = predictor.predict(embedding, boxes=BOX[None], multimask=False).logits
    with_mask = "mask" in prompt
    masks, scores, logits = reference.predict(
        point_coords=POINTS if with_points else None,
        point_labels=LABELS if with_points else None,
        box=BOX if with_box else None,
        mask_input=previous[0].numpy() if with_mask else None,
        multimask_output=multimask,
    )
    found = predictor.predict(
        embedding,
        points=POINTS[None] if with_points else None,
        labels=LABELS[None] if with_points else None,
        boxes=BOX[None] if with_box else None,
        masks=previous if with_mask else None,
        multimask=multimask,
    )
    assert np.abs(found.logits[0].numpy() - logits).max() <= 1e-3
    assert np.abs(found.iou[0].numpy() - scores).max() <= 1e-5
    full = predictor.upsample(found.logits, embedding)[0].numpy() > 0
    assert full.shape == masks.shape
    assert masks.any()
    assert (full != masks).mean() < 1e-5


def test_a_batch_of_prompts_equals_one_at_a_time(
    predictor: Predictor, embedding: Embedding
) -> None:
    """Prompts do not see each other, and a padding point changes nothing."""
    points = np.array([[[100.0, 50.0]], [[300.0, 180.0]], [[550.0, 350.0]]])
    labels = np.ones((3, 1))
    together = predictor.predict(embedding, points=points, labels=labels)
    for i in range(3):
        alone = predictor.predict(embedding, points=points[i : i + 1], labels=labels[i : i + 1])
        assert np.allclose(alone.logits[0], together.logits[i], atol=1e-3)
    assert not np.allclose(together.logits[0], together.logits[1], atol=1)


@pytest.mark.parametrize(
    "prompt",
    [
        {},
        {"points": np.zeros((1, 1, 2))},
        {"points": np.zeros((2, 1, 2)), "labels": np.ones((2, 1)), "boxes": np.zeros((1, 4))},
    ],
)
def test_incomplete_prompts_are_refused(
    prompt: dict[str, np.ndarray], predictor: Predictor, embedding: Embedding
) -> None:
    with pytest.raises(ValueError, match="prompt"):
        predictor.predict(embedding, **prompt)


def test_boxes_give_what_people_drew(predictor: Predictor, shared_data: Path) -> None:
    """Box prompts on COCO photos give the masks of human annotators, roughly."""
    coco = json.loads((shared_data / "coco" / "val" / "annotations.json").read_text())
    overlaps = []
    for entry in coco["images"][:6]:
        drawn = [a for a in coco["annotations"] if a["image_id"] == entry["id"]]
        drawn = [a for a in drawn if a["area"] > 2000][:8]
        if not drawn:
            continue
        path = shared_data / "coco" / "val" / "images" / entry["file_name"]
        embedding = predictor.embed(decode_image(path.read_bytes()))
        x, y, width, height = np.array([a["bbox"] for a in drawn]).T
        boxes = np.stack([x, y, x + width, y + height], axis=1)
        logits = predictor.predict(embedding, boxes=boxes, multimask=False).logits
        for full, annotation in zip(predictor.upsample(logits, embedding), drawn, strict=True):
            found, expected = rle.encode(full[0].numpy() > 0), annotation["segmentation"]
            overlaps.append(rle.iou([found], [expected])[0, 0])
    assert len(overlaps) >= 20
    assert np.mean(overlaps) > 0.6  # 0.685 when written: things and stuff, 39 masks


def test_a_damaged_model_is_no_image_without_masks(image: np.ndarray) -> None:
    """NaN compares false with every threshold: without the check, every mask would just be missing."""
    sam = load_sam(resolve("vit_t"))
    with torch.no_grad():
        sam.image_encoder.neck[0].weight[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        Predictor(sam).embed(image)


@pytest.mark.slow
def test_a_compiled_encoder_embeds_the_same(
    predictor: Predictor, embedding: Embedding, image: np.ndarray
) -> None:
    compiled = Predictor(predictor.sam, compile=True).embed(image)
    assert (compiled.features - embedding.features).abs().max() < 1e-4


def test_compiling_without_a_compiler_is_refused_at_once(
    predictor: Predictor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(SaEngineError, match="g\\+\\+"):
        Predictor(predictor.sam, compile=True)
