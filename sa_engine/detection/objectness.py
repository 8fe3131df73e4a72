"""Objectness as IoU (object localisation network, OLN): what is not drawn is not taught to be no object.

Annotators draw what is prominent and move on (paper §4), so that much of what a detector finds besides is an object
too. Here only boxes that overlap a drawn object teach a score, and it is their IoU with it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection._utils import BoxCoder
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork


def decoded_iou(coder: BoxCoder, first: Tensor, second: Tensor) -> Tensor:
    """IoU of the boxes that two (N, 4) sets of deltas mean: (N,). The reference box does not matter."""
    unit = first.new_tensor([[0.0, 0.0, 1.0, 1.0]]).expand(len(first), 4)
    a, b = (coder.decode_single(deltas, unit) for deltas in (first, second))
    sides = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0)
    areas = [(box[:, 2:] - box[:, :2]).prod(1) for box in (a, b)]
    shared = sides.prod(1)
    return shared / (areas[0] + areas[1] - shared)


class IouProposals(RegionProposalNetwork):
    """Region proposals whose score is their IoU."""

    def compute_loss(
        self,
        objectness: Tensor,
        pred_bbox_deltas: Tensor,
        labels: list[Tensor],
        regression_targets: list[Tensor],
    ) -> tuple[Tensor, Tensor]:
        """Losses of score and place, over sampled anchors that overlap an object."""
        sampled, _ = self.fg_bg_sampler(labels)
        rows = torch.cat(sampled).nonzero()[:, 0]
        deltas, wanted = pred_bbox_deltas[rows], torch.cat(regression_targets)[rows]
        if not len(rows):
            return objectness.sum() * 0, deltas.sum() * 0
        iou = decoded_iou(self.box_coder, deltas.detach(), wanted)
        score = F.binary_cross_entropy_with_logits(objectness[rows, 0], iou)
        return score, F.smooth_l1_loss(deltas, wanted, beta=1 / 9)


class IouRoIHeads(RoIHeads):
    """Box heads whose score is the IoU of the box they give."""

    def forward(
        self,
        features: dict[str, Tensor],
        proposals: list[Tensor],
        image_shapes: list[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """As torchvision's; while training, losses over sampled boxes that overlap an object."""
        if not self.training:
            return super().forward(features, proposals, image_shapes)
        proposals, _, labels, wanted = self.select_training_samples(proposals, targets)
        pooled = self.box_head(self.box_roi_pool(features, proposals, image_shapes))
        logits, deltas = self.box_predictor(pooled)
        rows = torch.cat(labels).nonzero()[:, 0]
        deltas, place = deltas[rows, 4:], torch.cat(wanted)[rows]
        iou = decoded_iou(self.box_coder, deltas.detach(), place)
        score = F.binary_cross_entropy_with_logits((logits[:, 1] - logits[:, 0])[rows], iou)
        return [], {
            "loss_classifier": score,
            "loss_box_reg": F.smooth_l1_loss(deltas, place, beta=1 / 9),
        }
