"""Which masks are confident, stable, and not the whole image (paper §4, appendix B), whatever prompted them."""

import torch
from torch import Tensor

from sa_engine.option_groups import FilterConfig
from sa_engine.upsampling import Measures


def passes_iou(predicted_iou: Tensor, config: FilterConfig) -> Tensor:
    """Which of any number of predicted IoUs reach the threshold: bools of the same shape."""
    threshold = config.pred_iou_thresh
    if threshold == 0:
        return torch.ones_like(predicted_iou, dtype=torch.bool)
    strict = config.rules == "reference"
    return predicted_iou > threshold if strict else predicted_iou >= threshold


def passes(seen: Measures, config: FilterConfig, height: int, width: int) -> Tensor:
    """Which of N masks are there, are stable, and do not cover the (height, width) image: (N,) bool."""
    keep = seen.areas > 0
    if config.stability_score_thresh > 0:
        keep &= seen.stability >= config.stability_score_thresh
    if config.max_mask_coverage is not None:
        keep &= seen.areas < config.max_mask_coverage * height * width
    return keep
