"""RLE against pycocotools."""

import numpy as np
import pytest
from pycocotools import mask as coco

from sa_engine import rle

FRAME = (37, 53)


def whole(window: np.ndarray, top: int, left: int) -> np.ndarray:
    mask = np.zeros(FRAME, dtype=bool)
    mask[top : top + window.shape[0], left : left + window.shape[1]] = window
    return mask


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 37, 53), (5, 7, 10, 20), (0, 0, 1, 1), (36, 52, 1, 1), (0, 50, 37, 3), (30, 0, 7, 2)],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_a_window_encodes_like_the_whole_mask(
    top: int, left: int, height: int, width: int, share: float
) -> None:
    """Also where runs meet the first or the last pixel, and for empty and full windows."""
    window = np.random.default_rng(0).random((height, width)) < share
    mask = whole(window, top, left)
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = rle.encode_window(window, top, left, *FRAME)
    assert found["counts"] == expected["counts"].decode()
    assert found["size"] == list(FRAME)
    assert np.array_equal(rle.decode(found), mask)
    assert rle.area(found) == mask.sum()
    assert rle.encode(mask) == found


def test_iou_of_every_pair() -> None:
    full, half = np.ones(FRAME, dtype=bool), whole(np.ones((37, 26), dtype=bool), 0, 0)
    first, second = [rle.encode(full), rle.encode(half)], [rle.encode(half)]
    assert rle.iou(first, second).round(6).tolist() == [[round(26 / 53, 6)], [1.0]]
    assert rle.iou([], second).shape == (0, 1)
