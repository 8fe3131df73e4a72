"""TinyViT-5M image encoder as distilled by MobileSAM: convolutions first, then windowed attention, output 64x64."""

from itertools import islice, product

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.modeling.image_encoder import EMBEDDING_CHANNELS, join_windows, split_windows
from sa_engine.modeling.layers import DropPath, drop_path_rates, neck

WIDTHS = (64, 128, 160, 320)
DEPTHS = (2, 2, 6, 2)
HEADS = (2, 4, 5, 10)
WINDOWS = (7, 7, 14, 7)
# MobileSAM keeps the last merge at stride 1, so that 1024 pixels end as a 64x64 embedding.
MERGE_STRIDES = (2, 2, 1)
# 32 rows of 256 positions with 256 channels are 8 MB.
CPU_STRIP_ROWS = 32


class TinyViT(nn.Module):
    """Images (B, 3, 1024, 1024) -> image embeddings (B, 256, 64, 64).

    Args:
        image_size: side of the square input in pixels.
        drop_path: stochastic depth rate of the last block; earlier blocks rise linearly to it (training only).
    """

    def __init__(self, image_size: int = 1024, drop_path: float = 0.0) -> None:
        super().__init__()
        self.image_size = image_size
        self.patch_embed = PatchEmbed(WIDTHS[0])
        rates = iter(drop_path_rates(drop_path, sum(DEPTHS)))
        self.layers = nn.ModuleList(
            Layer(i, list(islice(rates, depth))) for i, depth in enumerate(DEPTHS)
        )
        # Classification head of the original network: unused, kept because the released state dict holds it.
        self.norm_head = nn.LayerNorm(WIDTHS[-1])
        self.head = nn.Linear(WIDTHS[-1], 1000)
        self.neck = neck(WIDTHS[-1], EMBEDDING_CHANNELS)

    def forward(self, x: Tensor) -> Tensor:
        # Attention works on (B, H, W, C): with channels last, going there and back copies nothing.
        x = self.patch_embed(x.contiguous(memory_format=torch.channels_last))
        for layer in self.layers:
            x = layer(x)
        return self.neck(x)


class ConvBN(nn.Sequential):
    """Convolution without bias, then batch norm; ``c`` and ``bn`` in the state dict."""

    def __init__(
        self, inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1
    ) -> None:
        super().__init__()
        padding = kernel // 2
        self.c = nn.Conv2d(inputs, outputs, kernel, stride, padding, groups=groups, bias=False)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve; outside of training the batch norm is folded into the weights, a pass over memory less."""
        mean, variance = self.bn.running_mean, self.bn.running_var
        if self.bn.training or mean is None or variance is None:
            return self.bn(self.c(x))
        scale = self.bn.weight * torch.rsqrt(variance + self.bn.eps)
        weight, bias = self.c.weight * scale[:, None, None, None], self.bn.bias - mean * scale
        return F.conv2d(x, weight, bias, self.c.stride, self.c.padding, groups=self.c.groups)


class PatchEmbed(nn.Module):
    """Two stride-2 convolutions: (B, 3, S, S) -> (B, width, S/4, S/4)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.seq = nn.Sequential(
            ConvBN(3, width // 2, 3, 2), nn.GELU(), ConvBN(width // 2, width, 3, 2)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.seq(x)


class Layer(nn.Module):
    """One stage: its blocks over (B, C, H, W), then the merge to the next stage's width."""

    def __init__(self, stage: int, drop_paths: list[float]) -> None:
        super().__init__()
        width = WIDTHS[stage]
        if stage == 0:
            self.blocks = nn.ModuleList(MBConv(width, rate) for rate in drop_paths)
        else:
            self.blocks = nn.ModuleList(
                TinyViTBlock(width, HEADS[stage], WINDOWS[stage], rate) for rate in drop_paths
            )
        self.downsample: nn.Module = nn.Identity()
        if stage < len(MERGE_STRIDES):
            self.downsample = PatchMerging(width, WIDTHS[stage + 1], MERGE_STRIDES[stage])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.downsample(x)


class MBConv(nn.Module):
    """Inverted bottleneck: widen 4x, depth-wise 3x3, narrow, add."""

    def __init__(self, width: int, drop_path: float) -> None:
        super().__init__()
        hidden = 4 * width
        self.conv1 = ConvBN(width, hidden)
        self.conv2 = ConvBN(hidden, hidden, 3, groups=hidden)
        self.conv3 = ConvBN(hidden, width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        if self.training or x.device.type != "cpu":
            return self._forward(x, slice(None))
        # Strip by strip, so that the widened activations stay in cache; the convolution sees a row around each.
        height, strips = x.shape[2], []
        for top in range(0, height, CPU_STRIP_ROWS):
            first = max(0, top - 1)
            rows = slice(top - first, min(top + CPU_STRIP_ROWS, height) - first)
            strips.append(self._forward(x[:, :, first : top + CPU_STRIP_ROWS + 1], rows))
        return torch.cat(strips, dim=2)

    def _forward(self, x: Tensor, rows: slice) -> Tensor:
        """The ``rows`` of x that have their neighbours in x, or the image's border, around them."""
        inner = F.gelu(self.conv2(F.gelu(self.conv1(x)))[:, :, rows])
        return F.gelu(x[:, :, rows] + self.drop_path(self.conv3(inner)))


class PatchMerging(nn.Module):
    """Change of width between stages, halving the resolution where ``stride`` is 2."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvBN(inputs, outputs)
        self.conv2 = ConvBN(outputs, outputs, 3, stride, groups=outputs)
        self.conv3 = ConvBN(outputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv3(F.gelu(self.conv2(F.gelu(self.conv1(x)))))


class TinyViTBlock(nn.Module):
    """Windowed attention, depth-wise 3x3 convolution, MLP, over (B, C, H, W)."""

    def __init__(self, width: int, heads: int, window: int, drop_path: float) -> None:
        super().__init__()
        self.window = window
        self.attn = Attention(width, heads, window)
        self.local_conv = ConvBN(width, width, 3, groups=width)
        self.mlp = Mlp(width)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        windows = split_windows(x.permute(0, 2, 3, 1), self.window)
        attended = self.attn(windows.flatten(1, 2))
        attended = join_windows(attended, self.window, height, width).permute(0, 3, 1, 2)
        x = self.local_conv(x + self.drop_path(attended))
        tokens = x.permute(0, 2, 3, 1)
        tokens = tokens + self.drop_path(self.mlp(tokens))
        return tokens.permute(0, 3, 1, 2)


class Mlp(nn.Module):
    """Pre-norm MLP, 4x wide: (..., width) -> (..., width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(self.norm(x))))


class Attention(nn.Module):
    """Pre-norm multi-head attention inside a window, with a learned bias per absolute (row, column) offset."""

    attention_bias_idxs: Tensor

    def __init__(self, width: int, heads: int, window: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.attention_biases = nn.Parameter(torch.zeros(heads, window * window))
        self.register_buffer("attention_bias_idxs", offset_indices(window), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(self.norm(x)).reshape(batch, tokens, self.heads, 3, width // self.heads)
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        # With its batch dimension, which the fast kernels ask for.
        bias = self.attention_biases[None, :, self.attention_bias_idxs]
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=bias.to(query.dtype))
        return self.proj(out.transpose(1, 2).reshape(batch, tokens, width))


def offset_indices(side: int) -> Tensor:
    """Index (side**2, side**2) into the bias table: offsets |dy|, |dx| numbered in order of first appearance."""
    points = list(product(range(side), range(side)))
    numbers: dict[tuple[int, int], int] = {}
    indices = [
        numbers.setdefault((abs(y1 - y0), abs(x1 - x0)), len(numbers))
        for y0, x0 in points
        for y1, x1 in points
    ]
    return torch.tensor(indices).reshape(len(points), len(points))
