"""Predicted IoUs on the scale that thresholds were chosen for.

A model that is taught what people draw becomes honest about how often it misses it: its predicted IoUs rank masks,
but hardly any reaches the 0.88 that automatic generation asks for. So their quartiles become those of the model
that training started from, by one scale and shift in the last layer of the IoU head: no order among a click's masks, no
choice and no mask changes.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sa_engine.grids import point_grid
from sa_engine.modeling.sam import Sam
from sa_engine.predictor import Predictor
from sa_engine.training.data import Sample

POINTS_PER_SIDE = 8
_QUARTILES = (0.25, 0.75)


@dataclass(frozen=True)
class Line:
    """predicted IoU -> scale * predicted IoU + shift."""

    scale: float
    shift: float


@dataclass(frozen=True)
class Calibration:
    """What was done to the IoU head; None where there was too little to go by.

    Attributes:
        multimask: to the three masks of an ambiguous prompt, from a grid of points.
        single: to the single mask, from boxes of the true masks.
    """

    multimask: Line | None
    single: Line | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return asdict(self)


def calibrate(
    sam: Sam, parent: Sam, samples: Iterable[Sample], precision: str = "fp32"
) -> Calibration:
    """Change the last layer of ``sam``'s IoU head so that its predicted IoUs have the quartiles of the parent's.

    Args:
        sam: the model, on its device; left in eval mode.
        parent: the model that training started from, on the same device.
        samples: images with pixels and masks, the same for both.
        precision: of the models.
    """
    models = Predictor(sam, precision), Predictor(parent, precision)
    found: list[list[tuple[Tensor, Tensor]]] = [[], []]
    for sample in samples:
        for values, predictor in zip(found, models, strict=True):
            values.append(_predicted_ious(predictor, sample))
    lines = []
    for part in (0, 1):
        own, parents = (torch.cat([one[part] for one in values]) for values in found)
        lines.append(_line(own, parents))
    done = Calibration(*lines)
    _apply(sam, done)
    return done


def _predicted_ious(predictor: Predictor, sample: Sample) -> tuple[Tensor, Tensor]:
    """Of an image, predicted IoUs of the three masks of each grid point, and of the mask of each true mask's box."""
    assert sample.pixels is not None
    (embedding,) = predictor.embed_pixels([sample.pixels], [sample.size])
    points = point_grid(POINTS_PER_SIDE) * np.array(sample.size[::-1])
    boxes = np.array([_box(mask) for mask in sample.masks], np.float64)
    at_once, of_points, of_boxes = predictor.prompts_at_once, [], []
    # Without the masks, which take as long as all the rest.
    for start in range(0, len(points), at_once):
        some = points[start : start + at_once, None]
        iou = predictor.predict_iou(embedding, points=some, labels=np.ones((len(some), 1)))
        of_points.append(iou.flatten())
    for start in range(0, len(boxes), at_once):
        some = boxes[start : start + at_once]
        of_boxes.append(predictor.predict_iou(embedding, boxes=some, multimask=False).flatten())
    return torch.cat(of_points).cpu(), torch.cat(of_boxes).cpu()


def _box(mask: np.ndarray) -> tuple[int, int, int, int]:
    """XYXY from the first to the last pixel of a mask that has some."""
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    return columns[0], rows[0], columns[-1], rows[-1]


def _line(own: Tensor, parents: Tensor) -> Line | None:
    levels = torch.tensor(_QUARTILES, dtype=torch.float64)
    low, high = own.double().quantile(levels).tolist()
    low_before, high_before = parents.double().quantile(levels).tolist()
    if high - low < 1e-6 or high_before - low_before < 1e-6:
        return None
    scale = (high_before - low_before) / (high - low)
    return Line(scale, low_before - scale * low)


@torch.no_grad()
def _apply(sam: Sam, calibration: Calibration) -> None:
    last = sam.mask_decoder.iou_prediction_head.layers[-1]
    assert isinstance(last, nn.Linear)
    for rows, line in ((slice(0, 1), calibration.single), (slice(1, None), calibration.multimask)):
        if line is not None:
            last.weight[rows] *= line.scale
            last.bias[rows] = line.scale * last.bias[rows] + line.shift
