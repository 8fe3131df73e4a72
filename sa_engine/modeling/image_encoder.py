"""ViT image encoders B, L and H (paper §A): 14x14 windowed attention with four global blocks, relative positions."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.modeling.layers import DropPath, MLPBlock, drop_path_rates, neck

# Relative-position bias computed at once: that of one head of one image of 64x64 positions.
BIAS_NUMBERS = 64**4
EMBEDDING_CHANNELS = 256


class ImageEncoderViT(nn.Module):
    """Plain ViT backbone of SAM.

    Args:
        width: channels of a token.
        depth: number of blocks.
        heads: attention heads per block.
        global_blocks: indices of the blocks that attend over the whole image; the others use windows.
        image_size: side of the square input in pixels.
        patch_size: side of a patch in pixels.
        window_size: side of an attention window in tokens.
        drop_path: stochastic depth rate of the last block; earlier blocks rise linearly to it (training only).
    """

    def __init__(
        self,
        width: int,
        depth: int,
        heads: int,
        global_blocks: tuple[int, ...],
        image_size: int = 1024,
        patch_size: int = 16,
        window_size: int = 14,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        grid = image_size // patch_size
        self.image_size = image_size
        self.patch_embed = PatchEmbed(width, patch_size)
        self.pos_embed = nn.Parameter(torch.zeros(1, grid, grid, width))
        rates = drop_path_rates(drop_path, depth)
        self.blocks = nn.ModuleList(
            Block(width, heads, 0 if i in global_blocks else window_size, grid, rates[i])
            for i in range(depth)
        )
        self.neck = neck(width, EMBEDDING_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        """Embed images (B, 3, S, S), normalised and padded -> image embeddings (B, 256, S/16, S/16)."""
        x = self.patch_embed(x) + self.pos_embed
        for block in self.blocks:
            x = block(x)
        return self.neck(x.permute(0, 3, 1, 2))


class PatchEmbed(nn.Module):
    """Non-overlapping patches to tokens: (B, 3, S, S) -> (B, S/p, S/p, width)."""

    def __init__(self, width: int, patch_size: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, width, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).permute(0, 2, 3, 1)


class Block(nn.Module):
    """Pre-norm transformer block over (B, H, W, C) tokens; ``window`` 0 means global attention."""

    def __init__(self, width: int, heads: int, window: int, grid: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.attn = Attention(width, heads, window or grid)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp = MLPBlock(width, 4 * width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        attended = self.norm1(x)
        if self.window:
            height, width = x.shape[1:3]
            windows = split_windows(attended, self.window)
            attended = join_windows(self.attn(windows), self.window, height, width)
        else:
            attended = self.attn(attended)
        x = x + self.drop_path(attended)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Attention(nn.Module):
    """Multi-head self-attention over a side x side grid with decomposed relative positions (MViTv2)."""

    distance: Tensor

    def __init__(self, width: int, heads: int, side: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * side - 1, width // heads))
        steps = torch.arange(side)
        distance = steps[:, None] - steps[None, :] + side - 1
        self.register_buffer("distance", distance, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        qkv = self.qkv(x).reshape(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        # The bias of all heads at once would be 800 MB in ViT-B's global attention: as many heads as fit.
        some = max(1, BIAS_NUMBERS // (batch * (height * width) ** 2))
        split = zip(*(part.split(some, dim=1) for part in (query, key, value)), strict=True)
        attended = [
            F.scaled_dot_product_attention(q, k, v, attn_mask=self.relative_bias(q, height, width))
            for q, k, v in split
        ]
        out = torch.cat(attended, dim=1)
        return self.proj(out.transpose(1, 2).reshape(batch, height, width, channels))

    def relative_bias(self, query: Tensor, height: int, width: int) -> Tensor:
        """Additive attention bias (B, heads, H*W, H*W): one term per row distance, one per column distance."""
        batch, heads = query.shape[:2]
        grid = query.reshape(batch, heads, height, width, -1)
        rows = torch.einsum("bnhwc,hkc->bnhwk", grid, self.rel_pos_h[self.distance])
        columns = torch.einsum("bnhwc,wkc->bnhwk", grid, self.rel_pos_w[self.distance])
        bias = rows[..., :, None] + columns[..., None, :]
        return bias.reshape(batch, heads, height * width, height * width)


def split_windows(x: Tensor, side: int) -> Tensor:
    """Cut (B, H, W, C) into (B * windows, side, side, C), zero-padded at the right and bottom."""
    batch, height, width, channels = x.shape
    x = F.pad(x, (0, 0, 0, -width % side, 0, -height % side))
    rows, columns = x.shape[1] // side, x.shape[2] // side
    x = x.reshape(batch, rows, side, columns, side, channels).transpose(2, 3)
    return x.reshape(-1, side, side, channels)


def join_windows(windows: Tensor, side: int, height: int, width: int) -> Tensor:
    """Undo :func:`split_windows`: back to (B, height, width, C), padding removed."""
    rows, columns = -(-height // side), -(-width // side)
    x = windows.reshape(-1, rows, columns, side, side, windows.shape[-1]).transpose(2, 3)
    return x.reshape(x.shape[0], rows * side, columns * side, -1)[:, :height, :width]
