"""Where a simulated annotator clicks (paper §7.1, §D.1): pure functions on masks.

The rules are those of the interactive-segmentation literature (RITM), which SAM 2's evaluation follows too: the
point of a region that is farthest from its boundary; of missing and surplus pixels, where that distance is larger.
The image's border is a boundary like any other. Ties go to the first pixel in row order, and a tie between missing
and surplus pixels to the surplus.
"""

from typing import NamedTuple

import cv2
import numpy as np

from sa_engine.masks import WindowMask


class Click(NamedTuple):
    """A pixel, x and y in the frame of the masks, and whether it is of the object."""

    x: int
    y: int
    positive: bool


def center_click(truth: WindowMask) -> Click:
    """The first click: the point of the mask farthest from its boundary."""
    x, y, _ = _farthest(truth.window)
    return Click(truth.left + x, truth.top + y, True)


def random_click(truth: WindowMask, rng: np.random.Generator) -> Click:
    """Another first click: any pixel of the mask, each equally likely."""
    rows, columns = truth.window.nonzero()
    chosen = int(rng.integers(len(rows)))
    return Click(truth.left + int(columns[chosen]), truth.top + int(rows[chosen]), True)


def next_click(truth: WindowMask, predicted: WindowMask | None) -> Click | None:
    """The next click: the point farthest from the boundary of what is wrong.

    Args:
        truth: the mask wanted.
        predicted: the mask so far, in the same frame; None: it is empty.

    Returns:
        A positive click in the missing pixels or a negative one in the surplus; None if the masks are equal.
    """
    if predicted is None:
        return center_click(truth)
    x, y, missing = _farthest(truth.window & ~_seen_from(truth, predicted))
    found = Click(truth.left + x, truth.top + y, True)
    x, y, surplus = _farthest(predicted.window & ~_seen_from(predicted, truth))
    if missing <= surplus:
        found = Click(predicted.left + x, predicted.top + y, False)
    return found if max(missing, surplus) > 0 else None


def mask_iou(first: WindowMask, second: WindowMask | None) -> float:
    """IoU of two masks of one frame, of which the second may be empty."""
    if second is None:
        return 0.0
    areas = int(first.window.sum()) + int(second.window.sum())
    both = int((first.window & _seen_from(first, second)).sum())
    return both / (areas - both)


def _farthest(region: np.ndarray) -> tuple[int, int, int]:
    """The pixel of a (h, w) bool region farthest from its boundary: x, y, squared distance; 0 for an empty region."""
    padded = np.pad(region.view(np.uint8), 1)
    distances = cv2.distanceTransform(padded, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)[1:-1, 1:-1]
    # Squares are whole numbers. OpenCV's roots differ in the last bit from place to place, and would decide ties.
    squares = np.rint(np.square(distances, dtype=np.float64))
    y, x = divmod(int(squares.argmax()), region.shape[1])
    return x, y, int(squares[y, x])


def _seen_from(mask: WindowMask, other: WindowMask) -> np.ndarray:
    """The pixels of ``other`` inside the box of ``mask``: bool of the size of that box."""
    pixels = np.zeros((len(mask.bits), mask.width), dtype=bool)
    x0, y0 = max(mask.left, other.left), max(mask.top, other.top)
    x1, y1 = np.minimum(mask.box[2:], other.box[2:]) + 1
    if x0 < x1 and y0 < y1:
        here = np.s_[y0 - mask.top : y1 - mask.top, x0 - mask.left : x1 - mask.left]
        there = np.s_[y0 - other.top : y1 - other.top, x0 - other.left : x1 - other.left]
        pixels[here] = other.window[there]
    return pixels
