"""MAE checkpoints as image encoders: the initial weights of SAM's ViTs (paper §3, §A).

The layout is that of facebookresearch/mae's `mae_pretrain_vit_{base,large,huge}.pth`, which is timm's: plain global
attention over the 14x14 patches of a 224x224 image (ViT-H: 16x16 patches of 14x14 pixels) and a class token.
"""

import re
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from sa_engine.modeling.sam import VIT_ENCODERS, CheckpointError, build_sam, is_state_dict

# What only MAE's own decoder, the class token or a classifier needs.
_UNUSED = re.compile(r"cls_token|mask_token|(decoder_|norm\.|fc_norm\.|head\.).*")
_RENAMED = {"mlp.fc1.": "mlp.lin1.", "mlp.fc2.": "mlp.lin2."}


def mae_state(content: object) -> Mapping[str, Tensor] | None:
    """The tensors of an MAE checkpoint, out of what its file holds; None if it is something else."""
    if isinstance(content, Mapping) and is_state_dict(content.get("model")):
        content = content["model"]
    if isinstance(content, Mapping) and "blocks.0.attn.qkv.weight" in content:
        return content if is_state_dict(content) else None
    return None


def mae_architecture(state: Mapping[str, Tensor], path: Path) -> str:
    """Name of the SAM architecture with this encoder. Raises CheckpointError."""
    width = state["blocks.0.attn.qkv.weight"].shape[1]
    depth = len({key.split(".")[1] for key in state if key.startswith("blocks.")})
    known = {name: (vit["width"], vit["depth"]) for name, vit in VIT_ENCODERS.items()}
    for name, size in known.items():
        if size == (width, depth):
            return name
    expected = ", ".join(f"{name} {w} and {d}" for name, (w, d) in known.items())
    raise CheckpointError(
        f"{path} is a ViT of width {width} and {depth} blocks, which no SAM has; expected {expected}"
    )


def encoder_from_mae(
    state: Mapping[str, Tensor], architecture: str, path: Path
) -> dict[str, Tensor]:
    """Weights of a SAM image encoder from an MAE's: all but the relative positions and the neck, which MAE has not.

    Positions are interpolated to SAM's 64x64 patches, 14x14 patches are enlarged to 16x16. With relative positions of
    zero, as they are in a new encoder, a block computes what MAE's does.

    Args:
        state: of the MAE, see `mae_state`.
        architecture: of it, see `mae_architecture`.
        path: of the checkpoint, for messages.

    Raises:
        CheckpointError: tensors that are missing, unknown or of another shape.
    """
    with torch.device("meta"):  # names and shapes alone
        encoder = build_sam(architecture).image_encoder.state_dict()
    found = {_renamed(key): value for key, value in state.items() if not _UNUSED.fullmatch(key)}
    wanted = {key for key in encoder if "rel_pos" not in key and not key.startswith("neck.")}
    if unlike := sorted(found.keys() ^ wanted):
        word = "has no" if unlike[0] in encoder else "has an unknown"
        raise CheckpointError(
            f"{path} {word} {unlike[0]} ({len(unlike)} such tensors); expected an MAE checkpoint as "
            "facebookresearch/mae released them"
        )
    found["pos_embed"] = _positions(found["pos_embed"], encoder["pos_embed"].shape[1], path)
    side = encoder["patch_embed.proj.weight"].shape[-1]
    found["patch_embed.proj.weight"] = resize_patches(found["patch_embed.proj.weight"], side)
    for key, value in found.items():
        if value.shape != encoder[key].shape:
            raise CheckpointError(
                f"{path}: {key} is {tuple(value.shape)}, expected {tuple(encoder[key].shape)}"
            )
    return found


def _renamed(key: str) -> str:
    for old, new in _RENAMED.items():
        key = key.replace(old, new)
    return key


def _positions(embedding: Tensor, side: int, path: Path) -> Tensor:
    """(1, 1 + n * n, C), the class token's first -> (1, side, side, C), bicubic."""
    grid = embedding[:, 1:].float()
    old = round(grid.shape[1] ** 0.5)
    if old * old != grid.shape[1]:
        raise CheckpointError(
            f"{path}: pos_embed is {tuple(embedding.shape)}, expected a class token and a square grid"
        )
    grid = grid.reshape(1, old, old, -1).permute(0, 3, 1, 2)
    grid = F.interpolate(grid, (side, side), mode="bicubic", align_corners=False)
    return grid.permute(0, 2, 3, 1).contiguous()


def resize_patches(kernel: Tensor, side: int) -> Tensor:
    """A patch embedding's kernel (C, 3, p, p) for patches of `side` pixels, at least p.

    A patch enlarged to `side` (bicubic) has the token that it had (the pseudo-inverse of FlexiViT, arXiv 2212.08013).
    To enlarge the kernel itself would enlarge the tokens: by (16 / 14) ** 2.
    """
    old = kernel.shape[-1]
    if old == side:
        return kernel
    pixels = torch.eye(old * old).reshape(-1, 1, old, old)
    enlarged = F.interpolate(pixels, (side, side), mode="bicubic", align_corners=False).flatten(1)
    return (kernel.float().flatten(2) @ torch.linalg.pinv(enlarged).T).unflatten(2, (side, side))
