"""COCO run-length encoding of binary masks; pycocotools does the compression.

An RLE is a dict ``{"size": [height, width], "counts": str}``: runs in column-major order, compressed as by COCO's API.
"""

from typing import TypedDict

import numpy as np
from pycocotools import mask as coco


class RLE(TypedDict):
    """A mask as COCO stores it."""

    size: list[int]
    counts: str


def encode(mask: np.ndarray) -> RLE:
    """Encode a (H, W) bool mask."""
    return encode_window(mask, 0, 0, *mask.shape)


def encode_window(window: np.ndarray, top: int, left: int, height: int, width: int) -> RLE:
    """Encode a (height, width) mask that is False outside a window, without building the whole mask.

    Args:
        window: (h, w) bool.
        top, left: where the window's first pixel lies in the mask.
        height, width: size of the whole mask.
    """
    columns = np.zeros((window.shape[1], height), dtype=bool)
    columns[:, top : top + window.shape[0]] = window.T
    flat = columns.reshape(-1)
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    first = [0] if flat.size and flat[0] else []
    last = [flat.size] if flat.size and flat[-1] else []
    edges = np.concatenate([first, changes, last]).astype(np.int64) + left * height
    counts = np.diff(edges, prepend=0, append=height * width)
    if last and edges[-1] == height * width:
        counts = counts[:-1]  # the mask ends with the image: no closing run of zeros
    compressed = coco.frPyObjects(
        {"size": [height, width], "counts": counts.tolist()}, height, width
    )
    return {"size": [height, width], "counts": compressed["counts"].decode("ascii")}


def decode(rle: RLE) -> np.ndarray:
    """The (H, W) bool mask of an RLE."""
    return coco.decode(_coco(rle)).astype(bool)


def area(rle: RLE) -> int:
    """Number of pixels of the mask."""
    return int(coco.area(_coco(rle)))


def iou(first: list[RLE], second: list[RLE]) -> np.ndarray:
    """Mask IoU of every pair: (len(first), len(second)) float64."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return coco.iou([_coco(r) for r in first], [_coco(r) for r in second], [0] * len(second))


def _coco(rle: RLE) -> dict[str, object]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
