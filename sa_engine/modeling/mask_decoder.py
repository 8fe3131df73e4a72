"""Mask decoder (paper §3 and §A): ambiguity-aware masks and their predicted IoU.

The work is split where mask generation can save it: :meth:`MaskDecoder.attend` and :meth:`MaskDecoder.predict_iou`
need tokens only, :meth:`MaskDecoder.predict_masks` upscales just the prompts and masks that are still wanted.
"""

from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from sa_engine.modeling.layers import LayerNorm2d
from sa_engine.modeling.transformer import TwoWayTransformer

MULTIMASK_OUTPUTS = 3


class Attended(NamedTuple):
    """What the transformer returns for B prompts."""

    iou_token: Tensor  # (B, width)
    mask_tokens: Tensor  # (B, 4, width): token 0 for the single mask, 1 to 3 for the ambiguous ones
    image: Tensor  # (B, 64 * 64, width)


class MaskDecoder(nn.Module):
    """Masks from image embedding and prompt tokens.

    Args:
        depth: layers of the two-way transformer.
        width: channels of tokens and image embedding.
        dropout: see :class:`TwoWayTransformer`.
    """

    def __init__(self, depth: int = 2, width: int = 256, dropout: float = 0.0) -> None:
        super().__init__()
        outputs = MULTIMASK_OUTPUTS + 1
        self.transformer = TwoWayTransformer(depth, width, dropout=dropout)
        self.iou_token = nn.Embedding(1, width)
        self.mask_tokens = nn.Embedding(outputs, width)
        self.output_upscaling = nn.Sequential(
            nn.ConvTranspose2d(width, width // 4, kernel_size=2, stride=2),
            LayerNorm2d(width // 4),
            nn.GELU(),
            nn.ConvTranspose2d(width // 4, width // 8, kernel_size=2, stride=2),
            nn.GELU(),
        )
        self.output_hypernetworks_mlps = nn.ModuleList(
            MLP(width, width, width // 8, layers=3) for _ in range(outputs)
        )
        self.iou_prediction_head = MLP(width, 256, outputs, layers=3)

    def forward(
        self, image: Tensor, image_pe: Tensor, tokens: Tensor, dense: Tensor, multimask: bool
    ) -> tuple[Tensor, Tensor]:
        """Masks and predicted IoU of B prompts on one image.

        Args:
            image: (1 or B, width, 64, 64) image embedding.
            image_pe: (1, width, 64, 64) positional encoding of its cells.
            tokens: (B, T, width) prompt tokens.
            dense: (1 or B, width, 64, 64) dense prompt embedding.
            multimask: three masks for an ambiguous prompt, else the single one.

        Returns:
            Logits (B, M, 256, 256) and predicted IoU (B, M); M is 3 or 1.
        """
        attended = self.attend(image, image_pe, tokens, dense)
        wanted = slice(1, None) if multimask else slice(0, 1)
        return self.predict_masks(attended, wanted), self.predict_iou(attended)[:, wanted]

    def attend(self, image: Tensor, image_pe: Tensor, tokens: Tensor, dense: Tensor) -> Attended:
        """Run the transformer; shapes as in :meth:`forward`."""
        outputs = torch.cat([self.iou_token.weight, self.mask_tokens.weight])
        batch = max(len(tokens), len(dense))
        tokens = torch.cat([outputs.expand(batch, -1, -1), tokens], dim=1)
        source = (image + dense).flatten(2).transpose(1, 2).expand(batch, -1, -1)
        tokens, source = self.transformer(source, image_pe.flatten(2).transpose(1, 2), tokens)
        return Attended(tokens[:, 0], tokens[:, 1 : len(outputs)], source)

    def predict_iou(self, attended: Attended) -> Tensor:
        """Predicted IoU (B, 4) of the single mask and the three ambiguous ones."""
        return self.iou_prediction_head(attended.iou_token)

    def predict_masks(self, attended: Attended, wanted: slice = slice(None)) -> Tensor:
        """Low-resolution logits (B, M, 256, 256) of the ``wanted`` mask tokens."""
        batch, positions, width = attended.image.shape
        side = round(positions**0.5)
        image = attended.image.transpose(1, 2).reshape(batch, width, side, side)
        upscaled = self.output_upscaling(image)
        heads = range(len(self.output_hypernetworks_mlps))[wanted]
        weights = torch.stack(
            [self.output_hypernetworks_mlps[i](attended.mask_tokens[:, i]) for i in heads], dim=1
        )
        return (weights @ upscaled.flatten(2)).unflatten(2, upscaled.shape[2:])


class MLP(nn.Module):
    """Linear layers with ReLU between them."""

    def __init__(self, inputs: int, hidden: int, outputs: int, layers: int) -> None:
        super().__init__()
        widths = [inputs, *[hidden] * (layers - 1), outputs]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers[:-1]:
            x = torch.relu(layer(x))
        return self.layers[-1](x)
