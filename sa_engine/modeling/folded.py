"""The mask decoder for inference: same result to rounding, a quarter of the work.

A prompt has about 7 tokens but 4,096 image positions, and the plain decoder projects all positions, from 256 channels
to 128, ten times a prompt. Here the projections go to the side of the few tokens instead:

- scores ``(W_k x) . q`` become ``x . (W_k^T q)``, sums of values ``sum_n a_n (W_v x_n)`` become ``W_v sum_n a_n x_n``;
- where the image attends to the tokens, ``W_q`` goes into the keys and the output projection into the values;
- in the first layer the image is the same for all prompts, so there its projections are computed once per image.

Biases added to all keys alike cancel in the softmax and are left out. Everything keeps the layout
(B, positions, width), in which the transposed convolutions of the upscaling are plain matrix products.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.modeling.layers import LayerNorm2d
from sa_engine.modeling.mask_decoder import Attended, MaskDecoder
from sa_engine.modeling.transformer import Attention, TwoWayBlock

PIXELS = 16  # 4x4 pixels of the low-resolution logits come from every position
# Numbers as wide as two logits.
PAIRS = {torch.float32: torch.int64, torch.bfloat16: torch.int32}
# Positions worked on at once on a CPU: 1 MB of 256 channels, what a core's second-level cache holds.
CPU_POSITIONS = 1024

Norm = tuple[Tensor, Tensor, float]


@dataclass(frozen=True)
class SharedImage:
    """What all prompts on one image have in common; B is 1, or the number of mask prompts.

    ``image`` is the embedding with the dense prompt added, ``keys`` and ``values`` (tokens to image) and ``queries``
    (image to tokens) are the first layer's projections of it, split by head.
    """

    image: Tensor  # (B, N, width)
    keys: Tensor  # (B, heads, N, inner / heads)
    values: Tensor  # (B, heads, N, inner / heads)
    queries: Tensor  # (B, heads, inner / heads, N)


class FoldedDecoder:
    """Inference view of a :class:`MaskDecoder`; folds its weights as they are now.

    Args:
        decoder: the decoder, on its device, in eval mode.
        image_pe: (1, width, h, w) positional encoding of the image embedding's cells.
    """

    def __init__(self, decoder: MaskDecoder, image_pe: Tensor) -> None:
        self.decoder = decoder
        # What autocast computes in a lower precision is kept in this one.
        self.dtype = image_pe.dtype
        self.image_pe = image_pe.flatten(2).transpose(1, 2).contiguous()
        self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        first, norm, _, second, _ = decoder.output_upscaling
        assert isinstance(norm, LayerNorm2d)
        self.upscaling = (*as_linear(first), *as_linear(second))
        self.upscaling_norm = (norm.weight, norm.bias, norm.eps)

    def share(self, image: Tensor, dense: Tensor) -> SharedImage:
        """Project the image for the first layer.

        Args:
            image: (1, width, h, w) image embedding.
            dense: (1 or B, width, h, w) dense prompt embedding.
        """
        source = (image + dense).flatten(2).transpose(1, 2).contiguous()
        key = source + self.image_pe
        block = self.decoder.transformer.blocks[0]
        to_image, to_tokens = block.cross_attn_token_to_image, block.cross_attn_image_to_token
        return SharedImage(
            source.to(self.dtype),
            heads(to_image.k_proj(key), to_image).contiguous(),
            heads(to_image.v_proj(source), to_image).contiguous(),
            heads(to_tokens.q_proj(key), to_tokens).to(self.dtype).transpose(2, 3).contiguous(),
        )

    def attend(self, shared: SharedImage, prompt_tokens: Tensor) -> Attended:
        """Run the transformer for (B, T, width) prompt tokens; see :meth:`MaskDecoder.attend`.

        A layer's update of the image waits for the next attention from tokens to image, which depends on tokens
        only: the image is then visited once for both.
        """
        transformer = self.decoder.transformer
        batch = max(len(prompt_tokens), len(shared.image))
        outputs = self.output_tokens.expand(batch, -1, -1)
        token_pe = torch.cat([outputs, prompt_tokens.expand(batch, -1, -1)], dim=1)
        first, *others = transformer.blocks
        tokens = self._first_tokens(first, shared, token_pe)
        update = self._first_update(first, shared, tokens, token_pe)
        before = shared.image.expand(batch, -1, -1)
        image = torch.empty(before.shape, dtype=before.dtype, device=before.device)
        for block in others:
            query = tokens + token_pe
            tokens = block.norm1(tokens + block.self_attn(query, query, tokens))
            attention = block.cross_attn_token_to_image
            attended = self._visit(attention, tokens + token_pe, update, before, image)
            tokens = block.norm2(tokens + attended)
            tokens = block.norm3(tokens + block.mlp(tokens))
            update, before = self._update(block, tokens, token_pe), image
        attention = transformer.final_attn_token_to_image
        attended = self._visit(attention, tokens + token_pe, update, before, image)
        tokens = transformer.norm_final_attn(tokens + attended)
        return Attended(tokens[:, 0], tokens[:, 1 : len(self.output_tokens)], image)

    def predict_iou(self, attended: Attended) -> Tensor:
        """Predicted IoU (B, 4); reads tokens only, so it can decide what is upscaled."""
        return self.decoder.predict_iou(attended)

    def predict_masks(self, attended: Attended, wanted: slice = slice(None)) -> Tensor:
        """Low-resolution logits (B, M, 256, 256) of the ``wanted`` mask tokens."""
        image = attended.image
        batch, positions, _ = image.shape
        side = round(positions**0.5)
        networks = list(self.decoder.output_hypernetworks_mlps)
        chosen = range(len(networks))[wanted]
        weights = torch.stack([networks[i](attended.mask_tokens[:, i]) for i in chosen], dim=1)
        weights = weights.to(self.dtype)
        logits = image.new_empty(batch, len(chosen), positions, PIXELS)
        for prompts, tiles in _tiles(image):
            for cells in tiles:
                upscaled = self._upscale(image[prompts, cells])
                products = _product(weights[prompts], upscaled.transpose(1, 2))
                logits[prompts, :, cells] = products.unflatten(2, (-1, PIXELS))
        # Every position became 4x4 pixels in two 2x2 steps: back to rows and columns, neighbours moving as one number.
        pairs = logits.view(PAIRS[logits.dtype]).reshape(batch, len(chosen), side, side, 2, 2, 2)
        pixels = pairs.permute(0, 1, 2, 4, 6, 3, 5).contiguous().view(logits.dtype)
        return pixels.reshape(batch, len(chosen), 4 * side, 4 * side)

    def _first_tokens(self, block: TwoWayBlock, shared: SharedImage, token_pe: Tensor) -> Tensor:
        """Tokens (B, T, width) after the first layer, in which they are their own encoding."""
        tokens = block.norm1(block.self_attn(token_pe, token_pe, token_pe))
        attention = block.cross_attn_token_to_image
        query = attention.q_proj(tokens + token_pe)
        # Prompts without a mask see the same image: their tokens attend to it as if they were one prompt's.
        together = query.view(len(shared.keys), -1, query.shape[2])
        attended = F.scaled_dot_product_attention(
            heads(together, attention), shared.keys, shared.values
        )
        attended = attended.transpose(1, 2).reshape(query.shape)
        tokens = block.norm2(tokens + attention.out_proj(attended))
        return block.norm3(tokens + block.mlp(tokens))

    def _first_update(
        self, block: TwoWayBlock, shared: SharedImage, tokens: Tensor, token_pe: Tensor
    ) -> "ImageUpdate":
        """The first layer's update, whose queries are the same for all prompts."""
        attention = block.cross_attn_image_to_token
        key = scaled_heads(attention.k_proj, tokens + token_pe, attention).to(self.dtype)
        queries = shared.queries.expand(len(key), -1, -1, -1)

        def scores(image: Tensor, prompts: slice, cells: slice) -> Tensor:
            return key[prompts] @ queries[prompts, :, :, cells]

        return ImageUpdate(scores, *self._update_parts(block, tokens))

    def _update(self, block: TwoWayBlock, tokens: Tensor, token_pe: Tensor) -> "ImageUpdate":
        """A later layer's update: its query projection is folded into the keys."""
        attention = block.cross_attn_image_to_token
        key = scaled_heads(attention.k_proj, tokens + token_pe, attention)
        folded = fold(key, attention.q_proj.weight).to(self.dtype)
        bias = (key * head_rows(attention.q_proj.bias, attention)).sum(-1).flatten(1)
        bias = bias[..., None].to(self.dtype)
        heads = key.shape[1:3]

        def scores(image: Tensor, prompts: slice, cells: slice) -> Tensor:
            image_key = image + self.image_pe[:, cells]
            products = _product(folded[prompts], image_key.transpose(1, 2))
            return products.add_(bias[prompts]).unflatten(1, heads)

        return ImageUpdate(scores, *self._update_parts(block, tokens))

    def _update_parts(self, block: TwoWayBlock, tokens: Tensor) -> tuple[Tensor, Norm]:
        """Values (B, heads * T, width) with the output projection folded in, and the norm after them."""
        attention = block.cross_attn_image_to_token
        values = heads(attention.v_proj(tokens), attention)
        outputs = attention.out_proj.weight.unflatten(1, (attention.heads, -1)).permute(1, 2, 0)
        # Every head's weights sum to 1, so the bias can go into the values.
        folded = values @ outputs + attention.out_proj.bias / attention.heads
        norm = block.norm4
        return folded.flatten(1, 2).to(self.dtype), (
            norm.weight,
            norm.bias,
            norm.eps,
        )

    def _visit(
        self,
        attention: Attention,
        query: Tensor,
        update: "ImageUpdate",
        before: Tensor,
        image: Tensor,
    ) -> Tensor:
        """Update the image, then attend to it from the tokens, projections on the token side.

        Args:
            attention: from tokens to image.
            query: (B, T, width) tokens.
            update: of the image, by the layer before.
            before: (B, N, width) image before the update.
            image: (B, N, width) receives the image after it; may be ``before``.

        Returns:
            (B, T, width) what the tokens gathered.
        """
        split = scaled_heads(attention.q_proj, query, attention)
        folded = fold(split, attention.k_proj.weight).to(self.dtype)
        scores = image.new_empty(*folded.shape[:2], image.shape[1])
        gathered = torch.empty_like(folded)
        for prompts, tiles in _tiles(image):
            for cells in tiles:
                after = update(before[prompts, cells], prompts, cells)
                image[prompts, cells] = after
                image_key = after + self.image_pe[:, cells]
                scores[prompts, :, cells] = _product(folded[prompts], image_key.transpose(1, 2))
            gathered[prompts] = scores[prompts].softmax(dim=-1) @ image[prompts]
        # (heads, inner / heads, width)
        projections = attention.v_proj.weight.unflatten(0, (attention.heads, -1))
        by_head = gathered.to(query.dtype).unflatten(1, split.shape[1:3])
        out = (by_head @ projections.transpose(1, 2)).transpose(1, 2).flatten(2)
        return attention.out_proj(out + attention.v_proj.bias)

    def _upscale(self, image: Tensor) -> Tensor:
        """Image (B, n, width) -> (B, 16 n, width / 8): the 4x4 pixels of every position."""
        first, first_bias, second, second_bias = self.upscaling
        weight, bias, eps = self.upscaling_norm
        x = F.linear(image, first, first_bias).unflatten(-1, (4, -1))
        x = F.gelu(F.layer_norm(x, weight.shape, weight, bias, eps))
        x = F.gelu(F.linear(x, second, second_bias))
        return x.reshape(len(image), -1, len(second) // 4)


class ImageUpdate(NamedTuple):
    """How a layer's tokens change the image, at every position by itself.

    ``scores`` gives (b, heads, T, n) for (b, n, width) positions of the image, the prompts and the positions these
    are: positions last, so that the softmax over few tokens runs along memory.
    """

    scores: Callable[[Tensor, slice, slice], Tensor]
    values: Tensor  # (B, heads * T, width), output projection folded in
    norm: Norm

    def __call__(self, image: Tensor, prompts: slice, cells: slice) -> Tensor:
        """The image attends to the tokens; residual and norm."""
        weights = self.scores(image, prompts, cells).softmax(dim=2).flatten(1, 2)
        added = torch.baddbmm(image, weights.transpose(1, 2), self.values[prompts])
        weight, bias, eps = self.norm
        return F.layer_norm(added, weight.shape, weight, bias, eps)


def _tiles(image: Tensor) -> Iterator[tuple[slice, list[slice]]]:
    """Prompts of (B, N, width), and the positions to work on at once: what a CPU's cache holds, else all."""
    batch, positions, _ = image.shape
    on_cpu = image.device.type == "cpu"
    prompts_at_once, step = (1, CPU_POSITIONS) if on_cpu else (batch, positions)
    tiles = [slice(start, start + step) for start in range(0, positions, step)]
    for prompt in range(0, batch, prompts_at_once):
        yield slice(prompt, prompt + prompts_at_once), tiles


def _product(left: Tensor, right: Tensor) -> Tensor:
    """Matrix product (B, m, k) by (B, k, n).

    For B of 1 as a plain product: the batched one of bf16 takes twice as long on a CPU when ``right`` is transposed.
    """
    return (left[0] @ right[0])[None] if len(left) == 1 else left @ right


def scaled_heads(projection: nn.Linear, x: Tensor, attention: Attention) -> Tensor:
    """Project (B, T, width), split by head, and scale as attention's scores are: (B, heads, T, inner / heads)."""
    return heads(projection(x), attention) * (len(projection.weight) / attention.heads) ** -0.5


def fold(split: Tensor, projection: Tensor) -> Tensor:
    """(B, heads, T, d) vectors against a projection's rows (heads * d, width) -> (B, heads * T, width)."""
    return (split @ projection.unflatten(0, split.shape[1::2])).flatten(1, 2)


def heads(x: Tensor, attention: Attention) -> Tensor:
    """(B, T, inner) -> (B, heads, T, inner / heads)."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def head_rows(bias: Tensor, attention: Attention) -> Tensor:
    """(inner,) -> (heads, 1, inner / heads)."""
    return bias.unflatten(0, (attention.heads, 1, -1))


def as_linear(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """A 2x2 stride-2 transposed convolution as weight (4 * out, in) and bias (4 * out); rows by output pixel."""
    assert isinstance(convolution, nn.ConvTranspose2d) and convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    return weight, convolution.bias.repeat(4)
