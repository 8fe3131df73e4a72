"""Compare two sets of masks of one photo: one-to-one matching by mask IoU, and why what is left differs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torchvision.ops import box_iou

from sa_engine import rle

Annotation = dict[str, Any]
LEAST_IOU = 0.99


@dataclass(frozen=True)
class Match:
    """Outcome for one photo."""

    ours: int
    theirs: int
    matched: int
    mismatches: tuple[str, ...]

    def __add__(self, other: "Match") -> "Match":
        """Pool two photos."""
        return Match(
            self.ours + other.ours,
            self.theirs + other.theirs,
            self.matched + other.matched,
            self.mismatches + other.mismatches,
        )

    def __str__(self) -> str:
        """Counts, then a line a mismatch."""
        head = f"ours {self.ours}, reference {self.theirs}, matched at IoU >= {LEAST_IOU}: {self.matched}"
        return "\n".join([head, *self.mismatches])


def match(
    name: str,
    ours: Sequence[Annotation],
    theirs: Sequence[Annotation],
    thresholds: dict[str, float],
) -> Match:
    """Match two mask sets one to one at mask IoU >= 0.99.

    ``thresholds`` has ``pred_iou``, ``stability`` and ``nms``: a mismatch is listed with its distance from each.
    """
    overlap = rle.iou([a["segmentation"] for a in ours], [b["segmentation"] for b in theirs])
    rows, columns = linear_sum_assignment(-(overlap >= LEAST_IOU).astype(float))
    good = overlap[rows, columns] >= LEAST_IOU
    only_ours = set(range(len(ours))) - set(rows[good].tolist())
    only_theirs = set(range(len(theirs))) - set(columns[good].tolist())
    lines = [
        f"{name} only ours: " + _why(ours[i], theirs, overlap[i], thresholds)
        for i in sorted(only_ours)
    ]
    lines += [
        f"{name} only reference: " + _why(theirs[j], ours, overlap[:, j], thresholds)
        for j in sorted(only_theirs)
    ]
    return Match(len(ours), len(theirs), int(good.sum()), tuple(lines))


def _why(
    mask: Annotation, others: Sequence[Annotation], overlap: np.ndarray, limits: dict[str, float]
) -> str:
    boxes = torch.tensor([_xyxy(o["bbox"]) for o in others]).reshape(-1, 4)
    shares = box_iou(torch.tensor([_xyxy(mask["bbox"])]), boxes)[0]
    nearest = float((shares - limits["nms"]).abs().min()) if len(shares) else float("nan")
    return (
        f"area {mask['area']}, best mask IoU {overlap.max(initial=0):.4f}, distance from thresholds: "
        f"predicted IoU {mask['predicted_iou'] - limits['pred_iou']:+.2e}, "
        f"stability {mask['stability_score'] - limits['stability']:+.2e}, "
        f"box NMS {nearest:.2e} (nearest pair)"
    )


def _xyxy(box: Sequence[float]) -> list[float]:
    x, y, width, height = (float(v) for v in box)
    return [x, y, x + width, y + height]
