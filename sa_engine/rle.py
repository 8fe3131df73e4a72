"""COCO run-length encoding of binary masks; pycocotools does the compression, we check it.

An RLE is a dict ``{"size": [height, width], "counts": str}``: runs in column-major order, compressed as by COCO's API.
"""

from typing import TypedDict

import numpy as np
from pycocotools import mask as coco

# COCO writes 5 bits of a number in each character, from "0" on; bit 5 says that more follow, and
# bit 4 of the last is the sign. More characters than these hold no number of pixels.
_ZERO, _MORE, _SIGN = 48, 32, 16
_LONGEST_NUMBER = 7


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


def decode_window(rle: RLE) -> tuple[np.ndarray, int, int] | None:
    """The part of a mask that has pixels, without building the whole mask.

    Returns:
        The (h, w) bool window, and the (top, left) of its first pixel in the mask; None for an empty mask.

    Raises:
        ValueError: as `runs`.
    """
    height, lengths = rle["size"][0], runs(rle)
    box = extent(lengths, height)
    if box is None:
        return None
    left, top, right, bottom = box
    ends = lengths.cumsum().clip(left * height, (right + 1) * height)
    inside = np.diff(ends, prepend=left * height)
    columns = np.repeat(np.arange(len(inside)) % 2 == 1, inside).reshape(-1, height)
    return columns[:, top : bottom + 1].T, top, left


def area(rle: RLE) -> int:
    """Number of pixels of the mask."""
    return int(coco.area(_coco(rle)))


def iou(first: list[RLE], second: list[RLE]) -> np.ndarray:
    """Mask IoU of every pair: (len(first), len(second)) float64."""
    if not first or not second:
        return np.zeros((len(first), len(second)))
    return coco.iou([_coco(r) for r in first], [_coco(r) for r in second], [0] * len(second))


def boxes(rles: list[RLE]) -> np.ndarray:
    """Boxes around masks: (N, 4) float64 XYXY, the right and lower edges outside; zeros for an empty mask."""
    if not rles:
        return np.zeros((0, 4))
    found = coco.toBbox([_coco(one) for one in rles])
    return np.hstack([found[:, :2], found[:, :2] + found[:, 2:]])


def runs(rle: RLE) -> np.ndarray:
    """Lengths of an RLE's runs, decompressed with every character checked.

    pycocotools trusts what it gets and reads or writes out of bounds; this may get anything. Runs
    of length 0 are fine, as they are for COCO.

    Returns:
        (N,) int64, of zeros and ones in turn, zeros first, in column-major order; their sum is
        height * width.

    Raises:
        ValueError: the size is not two whole numbers, or the counts are not such runs.
    """
    size, counts = rle["size"], rle["counts"]
    if len(size) != 2 or not all(type(side) is int and side >= 0 for side in size):
        raise ValueError(f"its size is {size}, expected [height, width]")
    pixels = size[0] * size[1]
    lengths = _decompress(counts.encode("ascii"))
    # Before the sum, which huge runs would overflow.
    least, most = lengths.min(initial=0), lengths.max(initial=0)
    if least < 0 or most > pixels:
        wrong = least if least < 0 else most
        raise ValueError(f"its counts have a run of {wrong} pixels, expected 0 to {pixels}")
    if lengths.sum() != pixels:
        raise ValueError(f"its runs are {lengths.sum()} pixels long, expected {pixels}")
    return lengths


def extent(runs: np.ndarray, height: int) -> tuple[int, int, int, int] | None:
    """Where a mask's pixels lie: the first and last column and row that have any.

    Args:
        runs: as from `runs`.
        height: of the mask.

    Returns:
        (xmin, ymin, xmax, ymax), all inclusive; None for an empty mask.
    """
    ends = runs.cumsum()[1::2]
    starts = ends - runs[1::2]
    filled = ends > starts
    first, last = starts[filled], ends[filled] - 1
    if not len(first):
        return None
    left, top = divmod(first, height)
    right, bottom = divmod(last, height)
    if (left != right).any():  # from the foot of a column to the head of the next
        return int(left[0]), 0, int(right[-1]), height - 1
    return int(left[0]), int(top.min()), int(right[-1]), int(bottom.max())


def _decompress(counts: bytes) -> np.ndarray:
    """The numbers of COCO's compressed counts: (N,) int64, of any sign. Raises ValueError."""
    codes = np.frombuffer(counts, np.uint8) - np.uint8(_ZERO)  # what is less comes out above
    if codes.max(initial=0) >= 2 * _MORE:
        raise ValueError("its counts have a character outside of COCO's 0 to o")
    last = (codes < _MORE).nonzero()[0]
    if len(codes) and codes[-1] >= _MORE:
        raise ValueError("its counts end within a number")
    if not len(last):
        return last
    first = np.concatenate([[0], last[:-1] + 1])
    lengths = last - first + 1
    if lengths.max() > _LONGEST_NUMBER:
        raise ValueError(f"its counts have a number of {lengths.max()} characters")
    digits = (codes & (_MORE - 1)).astype(np.int64)
    digits[last] = (digits[last] ^ _SIGN) - _SIGN
    digits <<= 5 * (np.arange(len(codes)) - first.repeat(lengths))
    numbers = np.add.reduceat(digits, first)
    # From the fourth on they are differences to the number before the last.
    numbers[1::2] = numbers[1::2].cumsum()
    numbers[2::2] = numbers[2::2].cumsum()
    return numbers


def _coco(rle: RLE) -> dict[str, object]:
    return {"size": rle["size"], "counts": rle["counts"].encode("ascii")}
