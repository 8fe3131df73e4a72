"""The point-prompt protocol written anew, on whole masks one at a time, for a predictor that is not ours."""

from typing import NamedTuple

import mobile_sam
import numpy as np
from scipy.ndimage import distance_transform_edt


class Clicked(NamedTuple):
    """What came of one mask."""

    points: list[tuple[int, int, int]]  # x, y, label
    iou: list[float]  # after 1, 2, ... clicks
    oracle: float


def error_center(truth: np.ndarray, mask: np.ndarray) -> tuple[int, int, int] | None:
    """SAM 2's `sample_one_point_from_error_center` as published, with scipy's distances; None without an error."""
    missing, surplus = (
        distance_transform_edt(np.pad(region, 1))[1:-1, 1:-1]
        for region in (truth & ~mask, mask & ~truth)
    )
    if not missing.any() and not surplus.any():
        return None
    positive = missing.max() > surplus.max()
    y, x = np.unravel_index((missing if positive else surplus).argmax(), truth.shape)
    return int(x), int(y), int(positive)


def click_through(predictor: mobile_sam.SamPredictor, truth: np.ndarray, clicks: int) -> Clicked:
    """Click on a (H, W) bool mask of the image that is set."""
    points: list[tuple[int, int, int]] = []
    found: list[float] = []
    mask, logits, oracle = np.zeros_like(truth), None, 0.0
    while len(found) < clicks:
        point = error_center(truth, mask)
        if point is None:
            found.append(found[-1])
            continue
        points.append(point)
        masks, scores, low = predictor.predict(
            point_coords=np.array([p[:2] for p in points]),
            point_labels=np.array([p[2] for p in points]),
            mask_input=logits,
            multimask_output=len(points) == 1,
        )
        overlaps = [(truth & m).sum() / (truth | m).sum() for m in masks]
        best = int(scores.argmax())
        mask, logits = masks[best], low[best][None]
        found.append(float(overlaps[best]))
        if len(points) == 1:
            oracle = float(max(overlaps))
    return Clicked(points, found, oracle)
