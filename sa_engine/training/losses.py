"""Losses of predicted masks and of predicted IoU (paper §3, §A). Pure functions; always in float32."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossRules:
    """Weights of the losses, the paper's by default.

    Attributes:
        focal, dice, iou: weights of the focal, dice and IoU losses.
        alpha, gamma: of the focal loss. The paper does not state them; these are RetinaNet's.
        iou_of_all: the predicted IoU of every mask is trained, not only that of the best of three. The paper does not
            say it; a head that ranks masks has to know the bad ones too.
        temperature: logits are divided by it before the losses of masks see them. Where a truth is drawn unsharply the
            best logits are small ones, and the stability score of every mask falls; above 1 they are that much larger.
    """

    focal: float = 20.0
    dice: float = 1.0
    iou: float = 1.0
    alpha: float = 0.25
    gamma: float = 2.0
    iou_of_all: bool = True
    temperature: float = 1.0


class Losses(NamedTuple):
    """What B prompts cost, by part; (B,) float32 each, unweighted but for ``total``."""

    total: Tensor
    focal: Tensor  # of the best mask
    dice: Tensor  # of the best mask
    iou: Tensor  # mean squared error of the predicted IoU
    best: Tensor  # int64 index of the mask that is trained
    true_iou: Tensor  # (B, M) of all masks


def prompt_losses(
    logits: Tensor,
    predicted_iou: Tensor,
    outputs: Tensor,
    masks: Tensor,
    rules: LossRules,
) -> Losses:
    """Losses of the masks that came of each of B prompts: of the best of them, by focal and dice loss.

    Args:
        logits: (B, M, H, W).
        predicted_iou: (B, M).
        outputs: (B, M) bool, which of the M masks are a prompt's output; the others cost nothing.
        masks: (B, H, W) bool, the truth.
        rules: weights.
    """
    logits, predicted_iou = logits.float(), predicted_iou.float()
    truth = masks[:, None].expand_as(logits)
    tempered = logits / rules.temperature
    focal = focal_loss(tempered, truth, rules.alpha, rules.gamma)
    dice = dice_loss(tempered, truth)
    weighted = rules.focal * focal + rules.dice * dice
    best = weighted.detach().masked_fill(~outputs, torch.inf).argmin(dim=1, keepdim=True)
    true_iou = mask_iou(logits.detach() > 0, truth)
    squared = (predicted_iou - true_iou) ** 2
    every = (squared * outputs).sum(dim=1) / outputs.sum(dim=1)
    iou = every if rules.iou_of_all else _take(squared, best)
    total = _take(weighted, best) + rules.iou * iou
    return Losses(total, _take(focal, best), _take(dice, best), iou, best[:, 0], true_iou)


def focal_loss(logits: Tensor, masks: Tensor, alpha: float, gamma: float) -> Tensor:
    """Sigmoid focal loss (Lin et al. 2017) of (..., H, W) logits and bool masks, mean over pixels: (...)."""
    truth = masks.to(logits.dtype)
    cross_entropy = F.binary_cross_entropy_with_logits(logits, truth, reduction="none")
    wrong = torch.where(masks, torch.sigmoid(-logits), torch.sigmoid(logits))  # 1 - p of the truth
    balance = torch.where(masks, alpha, 1 - alpha)
    return (balance * wrong**gamma * cross_entropy).mean(dim=(-2, -1))


def dice_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """1 - (2 |p t| + 1) / (|p| + |t| + 1) of (..., H, W) logits and bool masks: (...). Milletari et al. 2016."""
    truth = masks.to(logits.dtype)
    probability = logits.sigmoid()
    both = (probability * truth).sum(dim=(-2, -1))
    sums = probability.sum(dim=(-2, -1)) + truth.sum(dim=(-2, -1))
    return 1 - (2 * both + 1) / (sums + 1)


def mask_iou(predicted: Tensor, masks: Tensor) -> Tensor:
    """IoU of (..., H, W) bool masks: (...) float32; 0 where both are empty."""
    both = (predicted & masks).sum(dim=(-2, -1))
    either = (predicted | masks).sum(dim=(-2, -1))
    return both / either.clamp(min=1)


def _take(values: Tensor, index: Tensor) -> Tensor:
    """(B, M) values at (B, 1) indices: (B,)."""
    return values.gather(1, index)[:, 0]
