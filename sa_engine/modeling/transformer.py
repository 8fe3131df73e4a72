"""Two-way transformer of the mask decoder (paper §A, figure 14): tokens attend to the image, it to the tokens."""

import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.modeling.layers import MLPBlock


class TwoWayTransformer(nn.Module):
    """Decoder layers, then one last attention from the tokens to the image.

    Args:
        depth: number of layers (2 in the released models, 3 for the data-generation model of §B).
        width: channels of tokens and image embedding.
        heads: attention heads.
        mlp_hidden: hidden width of the token MLP.
        dropout: rate after every attention and MLP (0.1 when training, §A).
    """

    def __init__(
        self,
        depth: int = 2,
        width: int = 256,
        heads: int = 8,
        mlp_hidden: int = 2048,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            TwoWayBlock(width, heads, mlp_hidden, dropout, first=i == 0) for i in range(depth)
        )
        self.final_attn_token_to_image = Attention(width, heads, width // 2)
        self.norm_final_attn = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    @property
    def blocks(self) -> "list[TwoWayBlock]":
        """The layers, typed."""
        return [block for block in self.layers if isinstance(block, TwoWayBlock)]

    def forward(self, image: Tensor, image_pe: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Attend both ways.

        Args:
            image: (B, HW, width) image embedding with the dense prompt added.
            image_pe: (1, HW, width) positional encoding of its positions, added again at every attention.
            tokens: (B, T, width) output tokens then prompt tokens; they serve as their own encoding.

        Returns:
            Updated tokens (B, T, width) and image (B, HW, width).
        """
        token_pe = tokens
        for block in self.blocks:
            tokens, image = block(tokens, image, token_pe, image_pe)
        attended = self.final_attn_token_to_image(tokens + token_pe, image + image_pe, image)
        return self.norm_final_attn(tokens + self.dropout(attended)), image


class TwoWayBlock(nn.Module):
    """Token self-attention, tokens to image, token MLP, image to tokens; residual and norm after each."""

    def __init__(
        self, width: int, heads: int, mlp_hidden: int, dropout: float, first: bool
    ) -> None:
        super().__init__()
        self.first = first
        self.self_attn = Attention(width, heads, width)
        self.norm1 = nn.LayerNorm(width)
        self.cross_attn_token_to_image = Attention(width, heads, width // 2)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = MLPBlock(width, mlp_hidden, nn.ReLU)
        self.norm3 = nn.LayerNorm(width)
        self.cross_attn_image_to_token = Attention(width, heads, width // 2)
        self.norm4 = nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, tokens: Tensor, image: Tensor, token_pe: Tensor, image_pe: Tensor
    ) -> tuple[Tensor, Tensor]:
        if self.first:
            # In the first layer the tokens are their own encoding: nothing to add, no residual.
            tokens = self.dropout(self.self_attn(tokens, tokens, tokens))
        else:
            query = tokens + token_pe
            tokens = tokens + self.dropout(self.self_attn(query, query, tokens))
        tokens = self.norm1(tokens)
        image_key = image + image_pe
        attended = self.cross_attn_token_to_image(tokens + token_pe, image_key, image)
        tokens = self.norm2(tokens + self.dropout(attended))
        tokens = self.norm3(tokens + self.dropout(self.mlp(tokens)))
        attended = self.cross_attn_image_to_token(image_key, tokens + token_pe, tokens)
        return tokens, self.norm4(image + self.dropout(attended))


class Attention(nn.Module):
    """Multi-head attention whose projections may narrow the width (``inner``; half for cross attention)."""

    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, inner)
        self.k_proj = nn.Linear(width, inner)
        self.v_proj = nn.Linear(width, inner)
        self.out_proj = nn.Linear(inner, width)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(B, Q, width) queries over (B, K, width) keys and values -> (B, Q, width)."""
        q = self.split_heads(self.q_proj(query))
        k = self.split_heads(self.k_proj(key))
        v = self.split_heads(self.v_proj(value))
        out = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(out.transpose(1, 2).flatten(2))

    def split_heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)
