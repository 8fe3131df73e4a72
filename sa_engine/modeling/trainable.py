"""The mask decoder for training: what :class:`MaskDecoder` computes, in an order that costs half as much.

A prompt has some 7 tokens and the image 4,096 positions. Projections of the image are therefore folded into the tokens,
as in :mod:`sa_engine.modeling.folded`, but in plain differentiable operations; the upscaling's transposed convolutions,
whose stride is their kernel, are matrix products at every position.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from sa_engine.modeling.folded import as_linear, fold, head_rows, heads, scaled_heads
from sa_engine.modeling.layers import LayerNorm2d
from sa_engine.modeling.mask_decoder import Attended, MaskDecoder
from sa_engine.modeling.transformer import Attention, TwoWayBlock


def attend(
    decoder: MaskDecoder, image: Tensor, image_pe: Tensor, prompt_tokens: Tensor
) -> Attended:
    """Run the transformer; dropout as the decoder's mode says.

    Args:
        decoder: the module.
        image: (1 or B, N, width) positions of the image embedding with the dense prompt added.
        image_pe: (1, N, width) their positional encoding.
        prompt_tokens: (B, T, width).
    """
    transformer = decoder.transformer
    batch = max(len(prompt_tokens), len(image))
    outputs = torch.cat([decoder.iou_token.weight, decoder.mask_tokens.weight])
    parts = [outputs.expand(batch, -1, -1), prompt_tokens.expand(batch, -1, -1)]
    tokens = token_pe = torch.cat(parts, dim=1)
    image = image.expand(batch, -1, -1)
    for block in transformer.blocks:
        tokens, image = _block(block, tokens, image, token_pe, image_pe)
    attention = transformer.final_attn_token_to_image
    attended = _gather(attention, tokens + token_pe, image + image_pe, image)
    tokens = transformer.norm_final_attn(tokens + transformer.dropout(attended))
    return Attended(tokens[:, 0], tokens[:, 1 : len(outputs)], image)


def predict_masks(decoder: MaskDecoder, attended: Attended, wanted: slice = slice(None)) -> Tensor:
    """Low-resolution logits (B, M, 256, 256) of the ``wanted`` mask tokens."""
    first, norm, _, second, _ = decoder.output_upscaling
    assert isinstance(norm, LayerNorm2d)
    (weight, bias), (last_weight, last_bias) = as_linear(first), as_linear(second)
    x = F.linear(attended.image, weight, bias).unflatten(-1, (4, -1))
    x = F.gelu(F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps))
    x = F.gelu(F.linear(x, last_weight, last_bias))
    networks = list(decoder.output_hypernetworks_mlps)
    chosen = range(len(networks))[wanted]
    hyper = torch.stack([networks[i](attended.mask_tokens[:, i]) for i in chosen], dim=1)
    side = round(x.shape[1] ** 0.5)
    logits = hyper @ x.reshape(len(x), -1, hyper.shape[-1]).transpose(1, 2)
    # Every position became 4x4 pixels in two steps of 2x2: back to rows and columns.
    pixels = logits.unflatten(2, (side, side, 2, 2, 2, 2)).permute(0, 1, 2, 4, 6, 3, 5, 7)
    return pixels.reshape(len(x), len(chosen), 4 * side, 4 * side)


def _block(
    block: TwoWayBlock, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
) -> tuple[Tensor, Tensor]:
    """One layer, as :class:`TwoWayBlock` computes it."""
    if block.first:
        tokens = block.dropout(block.self_attn(tokens, tokens, tokens))
    else:
        query = tokens + token_pe
        tokens = tokens + block.dropout(block.self_attn(query, query, tokens))
    tokens = block.norm1(tokens)
    key = image + image_pe
    attended = _gather(block.cross_attn_token_to_image, tokens + token_pe, key, image)
    tokens = block.norm2(tokens + block.dropout(attended))
    tokens = block.norm3(tokens + block.dropout(block.mlp(tokens)))
    spread = _spread(block.cross_attn_image_to_token, key, tokens + token_pe, tokens)
    return tokens, block.norm4(image + block.dropout(spread))


def _gather(attention: Attention, query: Tensor, key: Tensor, image: Tensor) -> Tensor:
    """Tokens (B, T, width) attend to the image (B, N, width), whose projections are folded into them."""
    split = scaled_heads(attention.q_proj, query, attention)
    # A bias of the keys is the same for all positions: it cancels in the softmax.
    scores = fold(split, attention.k_proj.weight) @ key.transpose(1, 2)
    gathered = scores.softmax(dim=-1) @ image
    projections = attention.v_proj.weight.unflatten(0, (attention.heads, -1))
    out = gathered.unflatten(1, split.shape[1:3]) @ projections.transpose(1, 2)
    return attention.out_proj(out.transpose(1, 2).flatten(2) + attention.v_proj.bias)


def _spread(attention: Attention, image_query: Tensor, key: Tensor, tokens: Tensor) -> Tensor:
    """The image (B, N, width) attends to tokens (B, T, width), into which its projections are folded."""
    split = scaled_heads(attention.k_proj, key, attention)
    bias = (split * head_rows(attention.q_proj.bias, attention)).sum(-1).flatten(1)
    scores = fold(split, attention.q_proj.weight) @ image_query.transpose(1, 2) + bias[..., None]
    weights = scores.unflatten(1, split.shape[1:3]).softmax(dim=2).flatten(1, 2)
    outputs = attention.out_proj.weight.unflatten(1, (attention.heads, -1)).permute(1, 2, 0)
    values = (heads(attention.v_proj(tokens), attention) @ outputs).flatten(1, 2)
    return weights.transpose(1, 2) @ values + attention.out_proj.bias
