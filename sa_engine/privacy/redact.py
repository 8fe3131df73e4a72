"""Redaction of boxes in a picture, and how much of a box it covers.

Whoever sees the result learns of a box no more than 25 colours (`mosaic`) or nothing (`solid`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np

Method = Literal["mosaic", "solid", "gaussian"]
Box = tuple[int, int, int, int]

_GRID = 5  # cells per side of a mosaic, whatever its size
_LEAST_SIDE = 8  # pixels


@dataclass(frozen=True)
class Growth:
    """By what share of its width and height a box grows, on each side."""

    sideways: float
    upright: float


GROWTH: Mapping[str, Growth] = {
    "face": Growth(0.2, 0.2),
    # The last character of a plate is what detectors cut off.
    "plate": Growth(0.3, 0.15),
    "manual": Growth(0.0, 0.0),
}


def grow(box: Sequence[float], kind: str, height: int, width: int) -> Box:
    """Grow a box XYXY and round it outwards to whole pixels, at least 8 a side, inside the picture.

    Returns:
        Left, top, right, bottom; right and bottom are the first pixels outside. Of a box that lies
        outside of the picture, nothing: no width or no height.
    """
    growth = GROWTH[kind]
    x0, y0, x1, y1 = box
    x = max(growth.sideways * (x1 - x0), (_LEAST_SIDE - (x1 - x0)) / 2)
    y = max(growth.upright * (y1 - y0), (_LEAST_SIDE - (y1 - y0)) / 2)
    return (
        min(width, max(0, math.floor(x0 - x))),
        min(height, max(0, math.floor(y0 - y))),
        max(0, min(width, math.ceil(x1 + x))),
        max(0, min(height, math.ceil(y1 + y))),
    )


def redact(
    image: np.ndarray, boxes: Sequence[Box], method: Method, soft_edge: int = 0
) -> np.ndarray:
    """Redact boxes of a picture.

    Where boxes overlap, the second is made of what the first has left.

    Args:
        image: (H, W, 3) uint8; it is not changed.
        boxes: left, top, right, bottom, as `grow` gives them.
        method: "mosaic": 5x5 cells of their mean colours; "solid": black; "gaussian": blurred, which
            can be undone in part.
        soft_edge: pixels outside of a box over which it fades into the picture.

    Returns:
        (H, W, 3) uint8.
    """
    result = image.copy()
    boxes = [(x0, y0, x1, y1) for x0, y0, x1, y1 in boxes if x1 > x0 and y1 > y0]
    for x0, y0, x1, y1 in boxes:
        result[y0:y1, x0:x1] = _filling(result[y0:y1, x0:x1], method)
    if soft_edge:
        free = ~redacted_area(boxes, *image.shape[:2])
        for box in boxes:
            _fade(result, box, free, soft_edge)
    return result


def redacted_area(boxes: Sequence[Box], height: int, width: int) -> np.ndarray:
    """The pixels that boxes cover: (height, width) bool."""
    covered = np.zeros((height, width), bool)
    for x0, y0, x1, y1 in boxes:
        covered[y0:y1, x0:x1] = True
    return covered


def coverage(box: Sequence[float], covered: np.ndarray) -> float:
    """Share of a box XYXY that is covered, of its part inside the picture; 1 if that is nothing.

    A box that is narrower than a pixel counts as the pixels that it touches.
    """
    height, width = covered.shape
    part = covered[_pixels(box[1], box[3], height), _pixels(box[0], box[2], width)]
    return float(part.mean()) if part.size else 1.0


def _pixels(low: float, high: float, size: int) -> slice:
    """The pixels of which at least half lies in an interval; if there is none, those that it touches."""
    first, end = math.floor(low + 0.5), math.floor(high + 0.5)
    if end <= first:
        first, end = math.floor(low), max(math.ceil(high), math.floor(low) + 1)
    return slice(min(max(0, first), size), max(0, min(size, end)))


def _filling(pixels: np.ndarray, method: Method) -> np.ndarray:
    height, width = pixels.shape[:2]
    if method == "solid":
        return np.zeros_like(pixels)
    if method == "gaussian":
        sigma = max(height, width) / 8
        return cv2.GaussianBlur(pixels, (0, 0), sigma, borderType=cv2.BORDER_REPLICATE)
    cells = (min(_GRID, width), min(_GRID, height))
    means = cv2.resize(pixels, cells, interpolation=cv2.INTER_AREA)
    return cv2.resize(means, (width, height), interpolation=cv2.INTER_NEAREST)


def _fade(image: np.ndarray, box: Box, free: np.ndarray, soft: int) -> None:
    """Mix a box's edge colours into the free pixels around it, less with every pixel."""
    x0, y0, x1, y1 = box
    height, width = image.shape[:2]
    left, top = min(soft, x0), min(soft, y0)
    right, bottom = min(soft, width - x1), min(soft, height - y1)
    around = (slice(y0 - top, y1 + bottom), slice(x0 - left, x1 + right))
    edge = cv2.BORDER_REPLICATE
    wide = cv2.copyMakeBorder(image[y0:y1, x0:x1], top, bottom, left, right, edge)
    outside = np.ones(wide.shape[:2], np.uint8)
    outside[top : top + y1 - y0, left : left + x1 - x0] = 0
    distance = cv2.distanceTransform(outside, cv2.DIST_L2, 5)
    weight = (1 - distance / (soft + 1)).clip(0)[..., None]
    mixed = (wide * weight + image[around] * (1 - weight) + 0.5).astype(np.uint8)
    image[around][free[around]] = mixed[free[around]]
