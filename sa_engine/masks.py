"""Pure functions on masks (paper appendix B): edge test, box NMS, clean-up.

Boxes of masks are XYXY with inclusive corners: the first and last column and row that the mask touches.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class WindowMask:
    """A mask kept only inside its box, a bit per pixel: thousands of candidates fit in memory.

    ``bits`` is (h, ceil(w / 8)) uint8 as of ``numpy.packbits``; ``top`` and ``left`` place it in its frame.
    """

    bits: np.ndarray
    width: int
    top: int
    left: int

    @classmethod
    def of(cls, window: np.ndarray, top: int, left: int) -> "WindowMask | None":
        """Pack what is set in a (h, w) bool window whose first pixel is at (top, left) of the frame.

        The box is that of the set pixels; None if there are none.
        """
        rows, columns = np.flatnonzero(window.any(axis=1)), np.flatnonzero(window.any(axis=0))
        if not rows.size:
            return None
        y0, x0 = int(rows[0]), int(columns[0])
        inside = window[y0 : rows[-1] + 1, x0 : columns[-1] + 1]
        return cls(np.packbits(inside, axis=1), inside.shape[1], top + y0, left + x0)

    @property
    def window(self) -> np.ndarray:
        """The (h, w) bool pixels inside the box."""
        return np.unpackbits(self.bits, axis=1, count=self.width).view(bool)

    @property
    def box(self) -> tuple[int, int, int, int]:
        """XYXY in the frame, inclusive corners."""
        return (self.left, self.top, self.left + self.width - 1, self.top + len(self.bits) - 1)


def touches_crop_edge(
    boxes: Tensor, crop: tuple[int, int, int, int], height: int, width: int, tolerance: float
) -> Tensor:
    """Which boxes end at a crop's inner edge, so that the object goes on outside the crop.

    Args:
        boxes: (N, 4) XYXY in the frame of the image.
        crop: XYXY of the crop in the same frame.
        height, width: size of the image; its own edges do not count.
        tolerance: pixels from an edge that still touch it (20 in the reference).

    Returns:
        (N,) bool.
    """
    to_crop = (boxes - torch.tensor(crop, device=boxes.device)).abs() <= tolerance
    to_image = (boxes - torch.tensor((0, 0, width, height), device=boxes.device)).abs() <= tolerance
    return (to_crop & ~to_image).any(dim=1)


def greedy_nms(boxes: Sequence[Sequence[int]], order: np.ndarray, threshold: float) -> list[int]:
    """Greedy box NMS in an explicit order, so that ties fall the same way on every machine.

    Args:
        boxes: N times XYXY.
        order: (N,) indices from most to least preferred.
        threshold: a box is dropped when its IoU with a kept one is above this.

    Returns:
        Indices of the kept boxes in the given order.
    """
    # Our own, because importing torchvision costs every worker 165 MB. In float32, as torchvision computes IoU.
    ordered = np.array(boxes, np.float32).reshape(-1, 4)[order]
    x0, y0, x1, y1 = ordered.T.copy()
    areas = (x1 - x0) * (y1 - y0)
    left, kept = np.arange(len(order)), []
    while left.size:
        best, others = left[0], left[1:]
        kept.append(best)
        widths = np.minimum(x1[best], x1[others]) - np.maximum(x0[best], x0[others])
        heights = np.minimum(y1[best], y1[others]) - np.maximum(y0[best], y0[others])
        inter = widths.clip(min=0) * heights.clip(min=0)
        # A union of 0 makes an IoU that is not a number, which is above no threshold.
        with np.errstate(invalid="ignore"):
            iou = inter / (areas[best] + areas[others] - inter)
        left = others[~(iou.astype(np.float64) > threshold)]
    return order[kept].tolist() if kept else []


def clean_up(
    mask: WindowMask, height: int, width: int, min_area: int, rules: str
) -> WindowMask | None:
    """Remove small components and fill small holes (§B), both 8-connected, inside a (height, width) frame.

    ``rules`` "paper": components under ``min_area`` pixels go, the whole mask (None) if that is all of it; then holes.
    "reference", as the released code: holes first, and the largest component always stays.
    """
    y0, x0, y1, x1 = _margins(mask, height, width, min_area)
    window = np.pad(mask.window, ((mask.top - y0, y1 - mask.top - len(mask.bits)),
                                  (mask.left - x0, x1 - mask.left - mask.width)))  # fmt: skip
    steps: tuple[Literal["islands", "holes"], ...] = ("islands", "holes")
    cleaned = window
    for step in steps if rules == "paper" else reversed(steps):
        cleaned = _without_small(cleaned, min_area, step, keep_largest=rules == "reference")
    return mask if cleaned is window else WindowMask.of(cleaned, y0, x0)


def _margins(mask: WindowMask, height: int, width: int, min_area: int) -> tuple[int, int, int, int]:
    """The box grown so that background outside the mask, cut off by the window, never looks like a small hole."""
    margin = -(-min_area // min(len(mask.bits), mask.width))
    x0, y0, x1, y1 = mask.box
    return (
        max(0, y0 - margin),
        max(0, x0 - margin),
        min(height, y1 + 1 + margin),
        min(width, x1 + 1 + margin),
    )


def _without_small(
    window: np.ndarray, min_area: int, kind: Literal["islands", "holes"], keep_largest: bool
) -> np.ndarray:
    """Drop islands or fill holes under ``min_area`` pixels; the same array when there are none."""
    holes = kind == "holes"
    region = (~window if holes else window).astype(np.uint8)
    _, labels, stats, _ = cv2.connectedComponentsWithStats(region, connectivity=8)
    areas = stats[:, cv2.CC_STAT_AREA]
    small = areas < min_area
    small[0] = False  # label 0 is what lies around the components
    if not small.any():
        return window
    if keep_largest and not holes and small[1:].all():
        small[1 + int(areas[1:].argmax())] = False
    return window | small[labels] if holes else window & ~small[labels]
