"""Where to click, on masks whose answer is known, and against the published rule written anew with scipy."""

import cv2
import numpy as np
import pytest
from parity.clicking import error_center

from sa_engine.evaluation.clicks import Click, center_click, mask_iou, next_click, random_click
from sa_engine.masks import WindowMask

SHAPE = (40, 60)
rows, columns = np.indices(SHAPE)


def disc(x: int, y: int, radius: float) -> np.ndarray:
    return (columns - x) ** 2 + (rows - y) ** 2 <= radius**2


def box(x0: int, y0: int, x1: int, y1: int) -> np.ndarray:
    """With inclusive corners."""
    return (columns >= x0) & (columns <= x1) & (rows >= y0) & (rows <= y1)


def packed(mask: np.ndarray) -> WindowMask:
    found = WindowMask.of(mask, 0, 0)
    assert found is not None
    return found


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (disc(30, 20, 10), (30, 20)),
        (disc(10, 12, 6) | disc(40, 20, 9), (40, 20)),  # the thicker part
        (disc(10, 12, 6) | disc(40, 30, 6), (10, 12)),  # of two alike the upper one
        (disc(40, 20, 6) | disc(10, 20, 6), (10, 20)),  # beside each other, the left one
        (box(7, 9, 7, 9), (7, 9)),  # one pixel
        (box(0, 0, 59, 39), (19, 19)),  # the whole image: its border is a boundary
        (box(0, 10, 8, 18), (4, 14)),  # at the border, which is no mirror
        (box(50, 30, 59, 39), (54, 34)),  # in the corner; even sides: the first of four pixels
        (box(3, 5, 40, 5), (3, 5)),  # a line is all boundary
    ],
)
def test_the_first_click_is_in_the_middle(mask: np.ndarray, expected: tuple[int, int]) -> None:
    assert center_click(packed(mask)) == Click(*expected, True)
    assert error_center(mask, np.zeros_like(mask)) == (*expected, 1)
    assert next_click(packed(mask), None) == Click(*expected, True)


def test_a_ring_is_clicked_inside_its_band() -> None:
    ring = disc(30, 20, 15) & ~disc(30, 20, 8)
    x, y, positive = center_click(packed(ring))
    assert positive
    assert ring[y, x]
    assert 10.5 < np.hypot(x - 30, y - 20) < 13.5


@pytest.mark.parametrize(
    ("truth", "predicted", "expected"),
    [
        (box(10, 10, 30, 30), box(10, 10, 20, 30), (25, 14, True)),  # a third is missing
        (box(10, 10, 20, 30), box(10, 10, 30, 30), (25, 14, False)),  # a third is too much
        (box(10, 10, 18, 18), box(40, 20, 44, 24), (14, 14, True)),  # apart: the thicker
        (box(10, 10, 14, 14), box(40, 20, 48, 28), (44, 24, False)),
        (box(10, 10, 14, 14), box(40, 20, 44, 24), (42, 22, False)),  # a tie is surplus
        (disc(30, 20, 9), disc(30, 20, 9), None),
    ],
)
def test_the_next_click_is_in_the_worst_of_what_is_wrong(
    truth: np.ndarray, predicted: np.ndarray, expected: tuple[int, int, bool] | None
) -> None:
    assert next_click(packed(truth), packed(predicted)) == expected
    assert error_center(truth, predicted) == expected


def test_real_shapes_give_the_published_rules_clicks() -> None:
    """Blobs with holes and parts, many at the border, of all kinds of overlap."""
    rng = np.random.default_rng(0)
    kinds = set()
    for _ in range(200):
        smooth = [cv2.GaussianBlur(rng.normal(size=SHAPE), (0, 0), rng.uniform(1, 5)) for _ in "ab"]
        truth, predicted = (one > one.std() * rng.uniform(-0.5, 1.5) for one in smooth)
        found = next_click(packed(truth), packed(predicted))
        assert found == error_center(truth, predicted)
        kinds.add(found and found.positive)
        overlap = (truth & predicted).sum() / (truth | predicted).sum()
        assert mask_iou(packed(truth), packed(predicted)) == overlap
    assert kinds == {True, False}
    assert mask_iou(packed(truth), None) == 0


def test_random_clicks_hit_every_pixel_alike() -> None:
    mask = box(3, 4, 4, 5) | box(50, 39, 50, 39)
    rng = np.random.default_rng(0)
    clicks = [random_click(packed(mask), rng) for _ in range(2000)]
    hit, counts = np.unique([click[:2] for click in clicks], axis=0, return_counts=True)
    assert [tuple(pixel) for pixel in hit] == [(3, 4), (3, 5), (4, 4), (4, 5), (50, 39)]
    assert counts.min() > 340
    assert all(click.positive for click in clicks)
