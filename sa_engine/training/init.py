"""The model that a round starts from: another one's weights, if wanted with another encoder or a deeper decoder."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from sa_engine.modeling.image_encoder import ImageEncoderViT
from sa_engine.modeling.sam import (
    ARCHITECTURES,
    CheckpointError,
    Sam,
    build_sam,
    detect_architecture,
    load_sam,
    model_fingerprint,
    read_checkpoint,
    read_state_dict,
)
from sa_engine.modeling.weights import resolve
from sa_engine.rounds import FRESH, Parent
from sa_engine.storage import sha256_file
from sa_engine.training.mae import encoder_from_mae, mae_architecture, mae_state

_ENCODER, _LAYERS = "image_encoder.", "mask_decoder.transformer.layers."
_STD = 0.02  # of fresh weights, as ViTs have it


def initial_model(
    init: str,
    *,
    architecture: str | None = None,
    encoder_init: str | None = None,
    decoder_depth: int | None = None,
    dropout: float = 0.0,
    drop_path: float = 0.0,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> tuple[Sam, Parent]:
    """The model that training starts from, in eval mode, and what it was made of.

    Without further options all weights are those of `init`. The paper changed from ViT-B to ViT-H between rounds (§4):
    prompt encoder and mask decoder stay, the image encoder is another one's.

    Args:
        init: a SAM: model name, file or round.
        architecture: of the image encoder; None: that of `encoder_init`, else of `init`.
        encoder_init: where the image encoder comes from: a SAM of that architecture, by name, file or round, or a
            file of MAE as released; None: from `init` if it has that architecture, else it is fresh.
        decoder_depth: layers of the mask decoder, 3 for the data-generation model (§B); None: those of `init`. Layers
            it has not are copies of its last. With vit_t, masks of a third layer that is a copy have an IoU of 0.81
            with those of two layers (mean of 225 masks of 3 photos); with a fresh layer it is 0.58.
        dropout, drop_path: see `build_sam`.
        seed: of fresh weights.
        device: where the model goes.

    Raises:
        WeightsError, RoundError: no such checkpoint.
        CheckpointError: a file that cannot be used for what it was named for.
    """
    path = resolve(init)
    rates = {"dropout": dropout, "drop_path": drop_path}
    sam = _load(path, rates)
    facts = {"name": init, "fingerprint": model_fingerprint(sam), "sha256": sha256_file(path)}
    state = sam.state_dict()
    own = detect_architecture(state, path)
    depth = len(sam.mask_decoder.transformer.layers)
    notes = []
    if encoder_init is not None or architecture not in (None, own):
        own, encoder, note = _other_encoder(architecture, encoder_init)
        rest = {key: value for key, value in state.items() if not key.startswith(_ENCODER)}
        state = {**rest, **{_ENCODER + key: value for key, value in encoder.items()}}
        facts["encoder"] = encoder_init or FRESH
        if encoder_init is not None:
            facts["encoder_sha256"] = sha256_file(resolve(encoder_init))
        notes.append(note)
    if decoder_depth not in (None, depth):
        state = _deepened(state, depth, decoder_depth, path)
        notes.append(f"decoder layers {depth + 1} to {decoder_depth} are copies of layer {depth}")
        depth = decoder_depth
    if notes:
        sam = _fresh_sam(own, depth, rates, seed)
        sam.load_state_dict({**sam.state_dict(), **state})
    return sam.to(device), Parent(**facts, notes=tuple(notes))


def _load(path: Path, rates: dict[str, float]) -> Sam:
    try:
        return load_sam(path, "cpu", **rates)
    except CheckpointError:
        if mae_state(read_checkpoint(path)) is None:
            raise
        raise CheckpointError(
            f"{path} is an image encoder alone (MAE), expected a whole SAM: name it as the encoder's "
            "initial weights (encoder_init), beside a SAM whose prompt encoder and mask decoder are taken"
        ) from None


def _other_encoder(
    architecture: str | None, encoder_init: str | None
) -> tuple[str, Mapping[str, Tensor], str]:
    """An image encoder's architecture, the weights that are not to be fresh, and a sentence about it."""
    if architecture not in (None, *ARCHITECTURES):
        raise CheckpointError(
            f"architecture {architecture}: expected one of {', '.join(ARCHITECTURES)}"
        )
    if encoder_init is None:
        assert architecture is not None
        note = f"the image encoder {architecture} is fresh: nothing of it has been trained"
        return architecture, {}, note
    path = resolve(encoder_init)
    mae = mae_state(read_checkpoint(path))
    found = (
        detect_architecture(read_state_dict(path), path)
        if mae is None
        else mae_architecture(mae, path)
    )
    if architecture not in (None, found):
        raise CheckpointError(
            f"{encoder_init} has an image encoder {found}, expected {architecture}: name another file "
            "or leave the architecture out"
        )
    if mae is None:
        encoder = load_sam(path).image_encoder.state_dict()
        return found, encoder, f"the image encoder {found} is that of {encoder_init}"
    encoder = encoder_from_mae(mae, found, path)
    note = (
        f"the image encoder {found} is that of {encoder_init} (MAE): {len(encoder)} tensors, with "
        "positions interpolated to 64x64; relative positions are zero and the neck is fresh"
    )
    return found, encoder, note


def _fresh_sam(architecture: str, depth: int, rates: dict[str, float], seed: int) -> Sam:
    """A new SAM whose image encoder begins as ViTs do: truncated normal, but convolutions as PyTorch has them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        sam = build_sam(architecture, depth, **rates)
        for name, module in sam.image_encoder.named_modules():
            if isinstance(module, nn.Linear) or name == "patch_embed.proj":
                nn.init.trunc_normal_(module.weight, std=_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        if isinstance(sam.image_encoder, ImageEncoderViT):
            nn.init.trunc_normal_(sam.image_encoder.pos_embed, std=_STD)
    return sam


def _deepened(
    state: Mapping[str, Tensor], depth: int, wanted: int, path: Path
) -> dict[str, Tensor]:
    """A state dict with more decoder layers: copies of the last. Raises CheckpointError."""
    if wanted < depth:
        raise CheckpointError(
            f"{path} has {depth} decoder layers, expected at most the {wanted} of decoder_depth: "
            "layers can be added, not taken away"
        )
    last = f"{_LAYERS}{depth - 1}."
    copies = {
        f"{_LAYERS}{layer}.{key.removeprefix(last)}": value
        for key, value in state.items()
        if key.startswith(last)
        for layer in range(depth, wanted)
    }
    return {**state, **copies}
