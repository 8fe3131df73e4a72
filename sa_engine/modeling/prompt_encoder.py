"""Prompt encoder (paper §3, §A): points and boxes to tokens, masks to a dense embedding."""

import math

import torch
from torch import Tensor, nn

from sa_engine.modeling.layers import LayerNorm2d

# Point labels; 2 and 3 are box corners, used inside this module only.
BACKGROUND, FOREGROUND, TOP_LEFT, BOTTOM_RIGHT = range(4)
PADDING = -1


class PromptEncoder(nn.Module):
    """Encode prompts given in the frame of the padded model input (``image_size`` pixels square).

    Args:
        width: channels of a token.
        image_size: side of the model input in pixels.
        embedding_size: side of the image embedding.
        mask_channels: channels inside the mask prompt's convolutions.
    """

    def __init__(
        self,
        width: int = 256,
        image_size: int = 1024,
        embedding_size: int = 64,
        mask_channels: int = 16,
    ) -> None:
        super().__init__()
        self.image_size = image_size
        self.embedding_size = embedding_size
        self.pe_layer = FourierEncoding(width // 2)
        self.point_embeddings = nn.ModuleList(nn.Embedding(1, width) for _ in range(4))
        self.not_a_point_embed = nn.Embedding(1, width)
        self.mask_downscaling = nn.Sequential(
            nn.Conv2d(1, mask_channels // 4, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels // 4),
            nn.GELU(),
            nn.Conv2d(mask_channels // 4, mask_channels, kernel_size=2, stride=2),
            LayerNorm2d(mask_channels),
            nn.GELU(),
            nn.Conv2d(mask_channels, width, kernel_size=1),
        )
        self.no_mask_embed = nn.Embedding(1, width)

    @property
    def mask_size(self) -> int:
        """Side of a mask prompt: a quarter of the model input (256 for 1024)."""
        return 4 * self.embedding_size

    def forward(
        self,
        points: Tensor | None,
        labels: Tensor | None,
        boxes: Tensor | None,
        masks: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """Encode a batch of B prompts; every kind that is given must have B rows.

        Args:
            points: (B, N, 2) x, y in pixels of the model input, or None.
            labels: (B, N) 1 foreground, 0 background, -1 padding; given exactly when ``points`` is.
            boxes: (B, 4) XYXY in pixels of the model input, or None.
            masks: (B, 1, 256, 256) logits of a previous prediction, or None.

        Returns:
            Tokens (B, T, width), T = 0 for a mask alone, and the dense embedding (B or 1, width, 64, 64).
        """
        tokens = []
        if points is not None and labels is not None:
            if boxes is None:
                # The released models were trained with a padding point wherever no box is given.
                points = torch.cat([points, points.new_zeros(len(points), 1, 2)], dim=1)
                labels = torch.cat([labels, labels.new_full((len(labels), 1), PADDING)], dim=1)
            tokens.append(self.encode_points(points, labels))
        if boxes is not None:
            corners = boxes.reshape(-1, 2, 2)
            kinds = torch.tensor([TOP_LEFT, BOTTOM_RIGHT], device=boxes.device)
            tokens.append(self.encode_points(corners, kinds.expand(len(boxes), 2)))
        dense = self.no_mask() if masks is None else self.mask_downscaling(masks)
        if tokens:
            return torch.cat(tokens, dim=1), dense
        width = self.no_mask_embed.embedding_dim
        return dense.new_zeros(len(dense), 0, width), dense

    def no_mask(self) -> Tensor:
        """Dense embedding (1, width, 64, 64) of prompts without a mask."""
        size = self.embedding_size
        return self.no_mask_embed.weight.reshape(1, -1, 1, 1).expand(-1, -1, size, size)

    def encode_points(self, points: Tensor, labels: Tensor) -> Tensor:
        """Positional encoding of each point's pixel centre plus the learned embedding of its label."""
        encoded = self.pe_layer((points + 0.5) / self.image_size)
        learned = torch.cat(list(self.point_embeddings.parameters()))
        is_point = (labels != PADDING).unsqueeze(-1)
        kinds = learned[labels.clamp(min=0).long()]
        return torch.where(is_point, encoded + kinds, self.not_a_point_embed.weight)

    def dense_positions(self) -> Tensor:
        """Positional encoding of the image embedding's cells: (1, width, 64, 64)."""
        size = self.embedding_size
        matrix = self.pe_layer.positional_encoding_gaussian_matrix
        centres = (torch.arange(size, device=matrix.device, dtype=torch.float32) + 0.5) / size
        y, x = torch.meshgrid(centres, centres, indexing="ij")
        return self.pe_layer(torch.stack([x, y], dim=-1)).permute(2, 0, 1)[None]


class FourierEncoding(nn.Module):
    """Random Fourier features of positions: (..., 2) x, y in [0, 1] -> (..., 2 * features)."""

    positional_encoding_gaussian_matrix: Tensor

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("positional_encoding_gaussian_matrix", torch.randn(2, features))

    def forward(self, positions: Tensor) -> Tensor:
        # Angles reach hundreds of radians: float32 even where the model runs in bfloat16.
        matrix = self.positional_encoding_gaussian_matrix
        with torch.autocast(positions.device.type, enabled=False):
            angles = 2 * math.pi * ((2 * positions.float() - 1) @ matrix.float())
            encoding = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return encoding.to(matrix.dtype)
