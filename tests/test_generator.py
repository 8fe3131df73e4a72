"""Automatic mask generation by the paper's rules, with the real weights; parity has its own file."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from parity.reference import photo

from sa_engine import rle
from sa_engine.generator import GeneratedMask, MaskGenerator
from sa_engine.images import resize_image
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.option_groups import MaskConfig
from sa_engine.predictor import Predictor

QUICK = MaskConfig(points_per_side=6, crop_n_layers=0)


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_sam(resolve("vit_t")))


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return photo("coffee")


@pytest.fixture(scope="module")
def masks(predictor: Predictor, image: np.ndarray) -> list[GeneratedMask]:
    return MaskGenerator(predictor, QUICK).generate(image)


def xyxy(box: tuple[float, ...]) -> np.ndarray:
    x, y, width, height = box
    return np.array([x, y, x + width, y + height])


def test_masks_keep_what_they_promise(masks: list[GeneratedMask], image: np.ndarray) -> None:
    """Thresholds, area, SA-1B's box, the prompt inside its crop."""
    height, width = image.shape[:2]
    assert len(masks) >= 3
    for mask in masks:
        pixels = rle.decode(mask.segmentation)
        rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
        assert pixels.shape == (height, width)
        assert mask.area == pixels.sum() < 0.95 * height * width
        assert mask.bbox == (columns[0], rows[0], np.ptp(columns), np.ptp(rows))
        assert mask.predicted_iou >= 0.88
        assert mask.stability_score >= 0.95
        assert mask.crop_box == (0, 0, width, height)
        x, y = mask.point_coords
        assert (x * 12 / width) % 2 == pytest.approx(1)
        assert (y * 12 / height) % 2 == pytest.approx(1)
    assert [m.predicted_iou for m in masks] == sorted(
        (m.predicted_iou for m in masks), reverse=True
    )


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("pred_iou_thresh", 0.97),
        ("stability_score_thresh", 0.98),
        ("max_mask_coverage", 0.2),
        ("box_nms_thresh", 0.1),
    ],
)
def test_every_filter_filters(
    option: str,
    value: float,
    predictor: Predictor,
    image: np.ndarray,
    masks: list[GeneratedMask],
) -> None:
    """A stricter number leaves fewer masks, and (NMS apart) the same ones."""
    config = replace(QUICK, **{option: value})
    stricter = MaskGenerator(predictor, config).generate(image)
    assert len(stricter) < len(masks)
    if option == "pred_iou_thresh":
        assert stricter == [m for m in masks if m.predicted_iou >= value]
    if option == "max_mask_coverage":
        assert all(m.area < value * image.shape[0] * image.shape[1] for m in stricter)


def assert_same_masks(some: list[GeneratedMask], others: list[GeneratedMask]) -> None:
    """In the same order, to rounding."""
    overlap = rle.iou([m.segmentation for m in some], [m.segmentation for m in others])
    assert overlap.shape[0] == overlap.shape[1] > 0
    assert overlap.diagonal().min() > 0.999


def test_batch_sizes_do_not_change_the_masks(
    predictor: Predictor, image: np.ndarray, masks: list[GeneratedMask]
) -> None:
    """Prompts are independent, and so are crops; a GPU takes many of both at once."""
    at_once = MaskGenerator(predictor, replace(QUICK, points_per_batch=36)).generate(image)
    assert_same_masks(masks, at_once)
    generator = MaskGenerator(predictor, replace(QUICK, crop_n_layers=1))
    one_by_one = generator.generate(image)
    generator.crops_per_batch = 4
    assert_same_masks(one_by_one, generator.generate(image))


def test_crops_add_masks_and_stay_off_inner_edges(predictor: Predictor, image: np.ndarray) -> None:
    """Masks from crops come first, in crop order of zoom, and none is cut at an inner crop edge."""
    config = replace(QUICK, crop_n_layers=1)
    found = MaskGenerator(predictor, config).generate(image)
    zoomed = [m.crop_box[2:] != (600, 400) for m in found]
    assert any(zoomed) and not all(zoomed)
    assert zoomed == sorted(zoomed, reverse=True)
    for mask in found:
        box, crop = xyxy(mask.bbox), xyxy(mask.crop_box)
        inner = np.abs(crop - (0, 0, 600, 400)) > 20
        assert not (inner & (np.abs(box - crop) <= 20)).any()


def test_released_frame(predictor: Predictor, image: np.ndarray) -> None:
    """Masks come out at the released size; crops see the original's pixels, the whole image does not."""
    large = resize_image(image, 800, 1200)
    config = replace(QUICK, short_side=400, crop_n_layers=1)
    generator = MaskGenerator(predictor, config)
    seen: list[np.ndarray] = []
    embed = predictor.embed_pixels

    def watch(pixels, sizes):  # noqa: ANN001, ANN202
        seen.extend(pixels)
        return embed(pixels, sizes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(predictor, "embed_pixels", watch)
        found = generator.generate(large)
    assert {tuple(m.segmentation["size"]) for m in found} == {(400, 600)}
    released = resize_image(large, 400, 600)
    assert np.array_equal(seen[0], resize_image(released, 683, 1024))
    x1, y1 = (int(v) for v in (368 * 2, 268 * 2))  # the first 2x2 crop of 600x400, in the original
    assert np.array_equal(seen[1], resize_image(large[:y1, :x1], 746, 1024))


def test_an_image_without_masks_is_a_result(predictor: Predictor) -> None:
    """A pixel, a banner and a plain wall: nothing found, nothing raised."""
    strict = replace(
        QUICK, points_per_side=2, crop_n_layers=1, pred_iou_thresh=1.0, stability_score_thresh=1.0
    )
    for height, width in ((1, 1), (2, 3000), (64, 64)):
        config = strict if height == 1 else replace(strict, crop_n_layers=0)
        plain = np.full((height, width, 3), 127, np.uint8)
        assert MaskGenerator(predictor, config).generate(plain) == []


def test_two_runs_are_equal(
    predictor: Predictor, image: np.ndarray, masks: list[GeneratedMask]
) -> None:
    """Bit for bit, scores included."""
    torch.manual_seed(1)
    assert MaskGenerator(predictor, QUICK).generate(image) == masks
