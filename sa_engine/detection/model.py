"""The class-agnostic box detector (paper §4, "Semi-automatic stage"): Faster R-CNN with one class, "object".

Its default backbone is a small pyramid over the frozen SAM's image embedding: one encode serves boxes and masks, and
training costs only the heads. ResNet-50 and MobileNetV3 look at the pixels themselves. Boxes are XYXY in pixels of the
model-input frame: the image scaled to `image_size` by its longest side, at the top left of a padded square.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign

from sa_engine.detection.config import SAM_BACKBONE
from sa_engine.detection.objectness import IouProposals, IouRoIHeads
from sa_engine.modeling.layers import LayerNorm2d
from sa_engine.rounds import FRESH

EMBEDDING_CHANNELS = 256
_WIDTH, _HIDDEN = 128, 512  # of the pyramid and of the box head over it
_SIZES = ((32,), (64,), (128,), (256,), (512,))  # of anchors, by level
_RATIOS = (0.5, 1.0, 2.0)
_MOST = 300  # boxes of an image


class Detected(NamedTuple):
    """Boxes of an image, by falling score."""

    boxes: Tensor  # (N, 4) XYXY
    scores: Tensor  # (N,) 0 to 1


class EmbeddingPyramid(nn.Module):
    """Maps of strides 8 to 128 from SAM's embedding of stride 16, each by itself (as ViTDet has it)."""

    def __init__(self, channels: int = _WIDTH) -> None:
        super().__init__()
        self.out_channels = channels
        self.levels = nn.ModuleList(
            nn.Sequential(
                scale,
                nn.Conv2d(width, channels, 1, bias=False),
                LayerNorm2d(channels),
                nn.Conv2d(channels, channels, 3, padding=1, bias=False),
                LayerNorm2d(channels),
            )
            for scale, width in (
                (nn.ConvTranspose2d(EMBEDDING_CHANNELS, channels, 2, stride=2), channels),
                (nn.Identity(), EMBEDDING_CHANNELS),
                (nn.MaxPool2d(2), EMBEDDING_CHANNELS),
                (nn.MaxPool2d(4), EMBEDDING_CHANNELS),
                (nn.MaxPool2d(8), EMBEDDING_CHANNELS),
            )
        )

    def forward(self, embedding: Tensor) -> "OrderedDict[str, Tensor]":
        """Maps of a (B, 256, S, S) embedding, the finest first."""
        return OrderedDict((str(i), level(embedding)) for i, level in enumerate(self.levels))


class _SquareRoIAlign(MultiScaleRoIAlign):
    """RoI align that knows the padded size: from a content's size it would guess wrong scales."""

    def __init__(self, levels: Sequence[str], image_size: int) -> None:
        super().__init__(list(levels), output_size=7, sampling_ratio=2)
        self.image_size = image_size

    def forward(self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: object) -> Tensor:
        return super().forward(x, boxes, [(self.image_size, self.image_size)] * len(boxes))


class BoxDetector(nn.Module):
    """Boxes of objects, whatever they are.

    Args:
        backbone: what it sees, as `DetectorConfig` has it.
        image_size: side of the square model input.
        objectness: what scores are: "class", the probability of an object, for which everything that is not drawn is
            none; "iou", the IoU that a box is thought to have with its object, learned from drawn objects alone (OLN).
        start: what a backbone on pixels began from, which decides its norms and which of its layers learn: "fresh", or
            the name of torchvision's weights; None: as detectors were built before this was written down.
        fetch: have torchvision fetch these weights; otherwise all weights are fresh, for others to be loaded.
    """

    def __init__(
        self,
        backbone: str = SAM_BACKBONE,
        image_size: int = 1024,
        objectness: str = "class",
        start: str | None = FRESH,
        fetch: bool = False,
    ) -> None:
        super().__init__()
        self.image_size, self.start = image_size, start
        self.takes_embedding = backbone == SAM_BACKBONE
        self.backbone, channels, levels, sizes, hidden = _backbone(backbone, start, fetch)
        iou = objectness == "iou"
        anchors = AnchorGenerator(sizes, (_RATIOS,) * len(sizes))
        proposals, heads = (IouProposals, IouRoIHeads) if iou else (RegionProposalNetwork, RoIHeads)
        # From 0.3 on an anchor shows part of an object, whose IoU can be learned.
        rpn_at, rois_at, share = (
            ((0.3, 0.3), (0.3, 0.3), 1.0) if iou else ((0.7, 0.3), (0.5, 0.5), 0.5)
        )
        self.rpn = proposals(
            anchors,
            RPNHead(channels, anchors.num_anchors_per_location()[0]),
            *rpn_at,
            batch_size_per_image=256,
            positive_fraction=share,
            pre_nms_top_n={"training": 1000, "testing": 1000},
            post_nms_top_n={"training": 1000, "testing": 1000},
            nms_thresh=0.8,
        )
        self.roi_heads = heads(
            _SquareRoIAlign(levels, image_size),
            TwoMLPHead(channels * 7 * 7, hidden),
            FastRCNNPredictor(hidden, 2),
            *rois_at,
            batch_size_per_image=128,
            positive_fraction=1.0 if iou else 0.25,
            bbox_reg_weights=None,
            score_thresh=0.01,
            nms_thresh=0.7,  # torchvision's 0.5 would drop parts of objects
            detections_per_img=_MOST,
        )

    def losses(
        self, inputs: Tensor, sizes: Sequence[tuple[int, int]], boxes: Sequence[Tensor]
    ) -> dict[str, Tensor]:
        """The four losses of Faster R-CNN, means over the batch.

        Args:
            inputs: (B, 256, S/16, S/16) embeddings, or (B, 3, S, S) normalised and padded images.
            sizes: (h, w) of each image in the model input.
            boxes: (N, 4) of each image's objects.
        """
        targets = [
            {"boxes": one, "labels": torch.ones(len(one), dtype=torch.int64, device=one.device)}
            for one in boxes
        ]
        _, losses = self._run(inputs, sizes, targets)
        return losses

    def detect(self, inputs: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Detected]:
        """At most 300 boxes of each image; the arguments are those of `losses`."""
        found, _ = self._run(inputs, sizes, None)
        return [Detected(one["boxes"], one["scores"]) for one in found]

    def _run(
        self,
        inputs: Tensor,
        sizes: Sequence[tuple[int, int]],
        targets: list[dict[str, Tensor]] | None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        features = self.backbone(inputs)
        side = self.image_size
        frame = ImageList(inputs.new_empty(len(inputs), 0, side, side), list(sizes))
        proposals, rpn_losses = self.rpn(frame, features, targets)
        found, losses = self.roi_heads(features, proposals, list(sizes), targets)
        return found, {**rpn_losses, **losses}


def _backbone(
    name: str, start: str | None, fetch: bool
) -> tuple[nn.Module, int, list[str], tuple[tuple[int, ...], ...], int]:
    """A backbone, its channels, the maps that boxes are pooled from, sizes of anchors by map, and the head's width."""
    if name == SAM_BACKBONE:
        return EmbeddingPyramid(), _WIDTH, ["0", "1", "2", "3"], _SIZES, _HIDDEN
    learned = start not in (FRESH, None)  # on photos: it keeps its first layers
    weights = start if fetch and learned else None
    norm = _group_norm if start == FRESH else FrozenBatchNorm2d
    if name == "resnet50":
        net = resnet_fpn_backbone(
            backbone_name="resnet50",
            weights=weights,
            norm_layer=norm,
            trainable_layers=3 if learned else 5,
        )
        return net, 256, ["0", "1", "2", "3"], _SIZES, 1024
    net = mobilenet_backbone(
        backbone_name="mobilenet_v3_large",
        weights=weights,
        fpn=True,
        norm_layer=norm,
        trainable_layers=3 if learned else 6,
    )
    return net, 256, ["0", "1"], ((32, 64, 128, 256, 512),) * 3, 1024


def _group_norm(channels: int) -> nn.GroupNorm:
    """The norm of fresh layers, over groups of 8 channels, which divide every width of both backbones.

    Frozen batch norms would do nothing to fresh weights, so that signals fade or grow from layer to layer. Batch norms
    that learn would need many images at once, and depend on which of them a worker has.
    """
    return nn.GroupNorm(channels // 8, channels)
