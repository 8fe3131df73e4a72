"""The mask decoder for inference: same result to rounding, a quarter of the work.

A prompt has about 7 tokens but 4,096 image positions, and the plain decoder projects all positions, from 256 channels
to 128, ten times a prompt. Here the projections go to the side of the few tokens instead:

- scores ``(W_k x) . q`` become ``x . (W_k^T q)``, sums of values ``sum_n a_n (W_v x_n)`` become ``W_v sum_n a_n x_n``;
- where the image attends to the tokens, ``W_q`` goes into the keys and the output projection into the values;
- in the first layer the image is the same for all prompts, so there its projections are computed once per image.

Biases added to all keys alike cancel in the softmax and are left out. Everything keeps the layout
(B, positions, width), in which the transposed convolutions of the upscaling are plain matrix products.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.modeling.layers import LayerNorm2d
from sa_engine.modeling.mask_decoder import Attended, MaskDecoder
from sa_engine.modeling.transformer import Attention, TwoWayBlock


@dataclass(frozen=True)
class SharedImage:
    """What all prompts on one image have in common; B is 1, or the number of mask prompts.

    ``image`` is the embedding with the dense prompt added, ``keys`` and ``values`` (tokens to image) and ``queries``
    (image to tokens) are the first layer's projections of it, split by head.
    """

    image: Tensor  # (B, N, width)
    keys: Tensor  # (B, heads, N, inner / heads)
    values: Tensor  # (B, heads, N, inner / heads)
    queries: Tensor  # (B, heads, N, inner / heads)


class FoldedDecoder:
    """Inference view of a :class:`MaskDecoder`; folds its weights as they are now.

    Args:
        decoder: the decoder, on its device, in eval mode.
        image_pe: (1, width, h, w) positional encoding of the image embedding's cells.
    """

    def __init__(self, decoder: MaskDecoder, image_pe: Tensor) -> None:
        self.decoder = decoder
        self.image_pe = image_pe.flatten(2).transpose(1, 2).contiguous()
        self.output_tokens = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
        first, _, _, second, _ = decoder.output_upscaling
        self.upscaling = [_as_linear(first), _as_linear(second)]

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
            source,
            _heads(to_image.k_proj(key), to_image).contiguous(),
            _heads(to_image.v_proj(source), to_image).contiguous(),
            _heads(to_tokens.q_proj(key), to_tokens).contiguous(),
        )

    def attend(self, shared: SharedImage, prompt_tokens: Tensor) -> Attended:
        """Run the transformer for (B, T, width) prompt tokens; see :meth:`MaskDecoder.attend`."""
        transformer = self.decoder.transformer
        batch = max(len(prompt_tokens), len(shared.image))
        outputs = self.output_tokens.expand(batch, -1, -1)
        token_pe = torch.cat([outputs, prompt_tokens.expand(batch, -1, -1)], dim=1)
        first, *others = transformer.blocks
        tokens, image = self._first_layer(first, shared, token_pe)
        for block in others:
            tokens, image = self._layer(block, tokens, image, token_pe)
        last = transformer.final_attn_token_to_image
        attended = _tokens_to_image(last, tokens + token_pe, image + self.image_pe, image)
        tokens = transformer.norm_final_attn(tokens + attended)
        return Attended(tokens[:, 0], tokens[:, 1 : len(self.output_tokens)], image)

    def predict_iou(self, attended: Attended) -> Tensor:
        """Predicted IoU (B, 4); reads tokens only, so it can decide what is upscaled."""
        return self.decoder.predict_iou(attended)

    def predict_masks(self, attended: Attended, wanted: slice = slice(None)) -> Tensor:
        """Low-resolution logits (B, M, 256, 256) of the ``wanted`` mask tokens."""
        batch, positions, _ = attended.image.shape
        side = round(positions**0.5)
        heads = range(len(self.decoder.output_hypernetworks_mlps))[wanted]
        weights = torch.stack(
            [self.decoder.output_hypernetworks_mlps[i](attended.mask_tokens[:, i]) for i in heads],
            dim=1,
        )
        logits = weights @ self._upscale(attended.image).transpose(1, 2)
        # Every position became 4x4 pixels in two 2x2 steps: back to rows and columns.
        cells = logits.reshape(batch, len(heads), side, side, 2, 2, 2, 2)
        return cells.permute(0, 1, 2, 4, 6, 3, 5, 7).reshape(batch, len(heads), 4 * side, 4 * side)

    def _first_layer(
        self, block: TwoWayBlock, shared: SharedImage, token_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The layer in which the tokens are their own encoding and the image is shared."""
        tokens = block.norm1(block.self_attn(token_pe, token_pe, token_pe))
        attention = block.cross_attn_token_to_image
        query = _heads(attention.q_proj(tokens + token_pe), attention)
        attended = F.scaled_dot_product_attention(query, shared.keys, shared.values)
        tokens = block.norm2(tokens + attention.out_proj(attended.transpose(1, 2).flatten(2)))
        tokens = block.norm3(tokens + block.mlp(tokens))
        attention = block.cross_attn_image_to_token
        key = _heads(attention.k_proj(tokens + token_pe), attention)
        scores = key @ shared.queries.transpose(2, 3) * key.shape[-1] ** -0.5
        return tokens, _add_attended(block, shared.image, scores, tokens)

    def _layer(
        self, block: TwoWayBlock, tokens: Tensor, image: Tensor, token_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        query = tokens + token_pe
        tokens = block.norm1(tokens + block.self_attn(query, query, tokens))
        image_key = image + self.image_pe
        attended = _tokens_to_image(
            block.cross_attn_token_to_image, tokens + token_pe, image_key, image
        )
        tokens = block.norm2(tokens + attended)
        tokens = block.norm3(tokens + block.mlp(tokens))
        attention = block.cross_attn_image_to_token
        key = _heads(attention.k_proj(tokens + token_pe), attention)
        folded = _fold(key, attention.q_proj.weight)
        bias = (key * _head_rows(attention.q_proj.bias, attention)).sum(-1, keepdim=True)
        scores = (folded @ image_key.transpose(1, 2)).unflatten(1, key.shape[1:3])
        scores = (scores + bias) * key.shape[-1] ** -0.5
        return tokens, _add_attended(block, image, scores, tokens)

    def _upscale(self, image: Tensor) -> Tensor:
        """Image (B, N, width) -> (B, 16 N, width / 8): the 4x4 pixels of every position."""
        _, norm, activation, _, last_activation = self.decoder.output_upscaling
        assert isinstance(norm, LayerNorm2d)
        (first, first_bias), (second, second_bias) = self.upscaling
        x = F.linear(image, first, first_bias).unflatten(-1, (4, -1))
        x = activation(F.layer_norm(x, x.shape[-1:], norm.weight, norm.bias, norm.eps))
        return last_activation(F.linear(x, second, second_bias)).reshape(
            len(image), -1, len(second) // 4
        )


def _tokens_to_image(attention: Attention, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
    """Cross attention from (B, T, width) tokens to (B, N, width) positions, projections on the token side."""
    split = (
        _heads(attention.q_proj(query), attention)
        * (len(attention.q_proj.weight) / attention.heads) ** -0.5
    )
    weights = (_fold(split, attention.k_proj.weight) @ key.transpose(1, 2)).softmax(dim=-1)
    gathered = (weights @ value).unflatten(1, split.shape[1:3])  # (B, heads, T, width)
    projections = attention.v_proj.weight.unflatten(
        0, (attention.heads, -1)
    )  # (heads, inner / heads, width)
    out = (gathered @ projections.transpose(1, 2)).transpose(1, 2).flatten(2)
    return attention.out_proj(out + attention.v_proj.bias)


def _add_attended(block: TwoWayBlock, image: Tensor, scores: Tensor, tokens: Tensor) -> Tensor:
    """Update the image from the tokens: softmax over them, values with the output projection folded in.

    ``scores`` is (B, heads, T, N): positions last, so that the softmax over few tokens runs along memory.
    """
    attention = block.cross_attn_image_to_token
    weights = scores.softmax(dim=2).flatten(1, 2)
    values = _heads(attention.v_proj(tokens), attention)
    outputs = attention.out_proj.weight.unflatten(1, (attention.heads, -1)).permute(1, 2, 0)
    folded = (values @ outputs).flatten(1, 2)
    image = image + attention.out_proj.bias
    updated = torch.baddbmm(image.expand(len(folded), -1, -1), weights.transpose(1, 2), folded)
    return block.norm4(updated)


def _fold(split: Tensor, projection: Tensor) -> Tensor:
    """(B, heads, T, d) vectors against a projection's rows (heads * d, width) -> (B, heads * T, width)."""
    return (split @ projection.unflatten(0, split.shape[1::2])).flatten(1, 2)


def _heads(x: Tensor, attention: Attention) -> Tensor:
    """(B, T, inner) -> (B, heads, T, inner / heads)."""
    return x.unflatten(-1, (attention.heads, -1)).transpose(1, 2)


def _head_rows(bias: Tensor, attention: Attention) -> Tensor:
    """(inner,) -> (heads, 1, inner / heads)."""
    return bias.unflatten(0, (attention.heads, 1, -1))


def _as_linear(convolution: nn.Module) -> tuple[Tensor, Tensor]:
    """A 2x2 stride-2 transposed convolution as weight (4 * out, in) and bias (4 * out); rows by output pixel."""
    assert isinstance(convolution, nn.ConvTranspose2d) and convolution.bias is not None
    weight = convolution.weight.permute(2, 3, 1, 0).flatten(0, 2).contiguous()
    return weight, convolution.bias.repeat(4)
