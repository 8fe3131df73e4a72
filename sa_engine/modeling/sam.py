"""The shared SAM: image encoder, prompt encoder and mask decoder, built by name and loaded from released weights."""

import hashlib
import math
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sa_engine.errors import SaEngineError
from sa_engine.modeling.image_encoder import ImageEncoderViT
from sa_engine.modeling.mask_decoder import MaskDecoder
from sa_engine.modeling.prompt_encoder import PromptEncoder
from sa_engine.modeling.tiny_vit import TinyViT

IMAGE_SIZE = 1024
VIT_ENCODERS: dict[str, dict[str, Any]] = {
    "vit_b": {"width": 768, "depth": 12, "heads": 12, "global_blocks": (2, 5, 8, 11)},
    "vit_l": {"width": 1024, "depth": 24, "heads": 16, "global_blocks": (5, 11, 17, 23)},
    "vit_h": {"width": 1280, "depth": 32, "heads": 16, "global_blocks": (7, 15, 23, 31)},
}
ARCHITECTURES = ("vit_t", *VIT_ENCODERS)
PIXEL_MEAN = (123.675, 116.28, 103.53)
PIXEL_STD = (58.395, 57.12, 57.375)


class CheckpointError(SaEngineError):
    """A checkpoint file that cannot be read or does not fit a SAM architecture."""


class DeviceError(SaEngineError):
    """A device that is not there."""


class Sam(nn.Module):
    """Segment Anything Model (paper §3). State dict: the keys of the released checkpoints, nothing else."""

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self, image_encoder: nn.Module, prompt_encoder: PromptEncoder, mask_decoder: MaskDecoder
    ) -> None:
        super().__init__()
        self.image_encoder = image_encoder
        self.prompt_encoder = prompt_encoder
        self.mask_decoder = mask_decoder
        for name, values in (("pixel_mean", PIXEL_MEAN), ("pixel_std", PIXEL_STD)):
            self.register_buffer(name, torch.tensor(values).reshape(-1, 1, 1), persistent=False)

    @property
    def image_size(self) -> int:
        """Side of the square model input in pixels."""
        return self.prompt_encoder.image_size

    @property
    def device(self) -> torch.device:
        return self.pixel_mean.device

    def preprocess(self, image: Tensor) -> Tensor:
        """Normalise (..., 3, H, W) RGB values 0 to 255 and zero-pad right and bottom to the model input."""
        height, width = image.shape[-2:]
        normed = (image - self.pixel_mean) / self.pixel_std
        return F.pad(normed, (0, self.image_size - width, 0, self.image_size - height))


def build_sam(
    architecture: str, decoder_depth: int = 2, dropout: float = 0.0, drop_path: float = 0.0
) -> Sam:
    """A SAM with fresh weights, in eval mode.

    Args:
        architecture: image encoder, one of ``vit_t``, ``vit_b``, ``vit_l``, ``vit_h``.
        decoder_depth: 2 as released, 3 for the data-generation model (§B).
        dropout: in the mask decoder, 0.1 when training (§A).
        drop_path: in the image encoder, 0.4 to 0.6 when training (§A).

    Raises:
        ValueError: unknown architecture.
    """
    encoder: nn.Module
    if architecture == "vit_t":
        encoder = TinyViT(IMAGE_SIZE, drop_path)
    elif architecture in VIT_ENCODERS:
        encoder = ImageEncoderViT(
            **VIT_ENCODERS[architecture], image_size=IMAGE_SIZE, drop_path=drop_path
        )
    else:
        raise ValueError(
            f"unknown architecture {architecture!r}; known: {', '.join(ARCHITECTURES)}"
        )
    decoder = MaskDecoder(decoder_depth, dropout=dropout)
    return Sam(encoder, PromptEncoder(image_size=IMAGE_SIZE), decoder).eval()


def load_sam(path: Path, device: str | torch.device = "cpu", **options: float) -> Sam:
    """Load a SAM checkpoint; its architecture and decoder depth are read off its tensors.

    Args:
        path: a state dict as ``.pth``/``.pt`` (loaded with ``weights_only=True``) or ``.safetensors``.
        device: where the model goes.
        options: ``dropout`` and ``drop_path`` of :func:`build_sam`.

    Raises:
        CheckpointError: unreadable file, not a SAM, or tensors that do not fit the architecture.
    """
    state = read_state_dict(path)
    architecture = detect_architecture(state, path)
    depth = len(
        {k.split(".")[3] for k in state if k.startswith("mask_decoder.transformer.layers.")}
    )
    sam = build_sam(architecture, decoder_depth=depth, **options)
    try:
        sam.load_state_dict(state)
    except RuntimeError as error:
        details = " ".join(str(error).split())
        raise CheckpointError(
            f"{path} looks like a {architecture} SAM but its tensors do not fit: {details[:400]}. "
            "Use a checkpoint as released, or one written by sa-engine."
        ) from error
    return sam.to(device)


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint file by name. Raises :class:`CheckpointError`."""
    state = read_checkpoint(path)
    if not is_state_dict(state):
        raise CheckpointError(
            f"checkpoint {path} holds {type(state).__name__}, expected a flat state dict of tensors; "
            "save model.state_dict() alone."
        )
    return dict(state)


def read_checkpoint(path: Path) -> Any:
    """What a checkpoint file holds, whatever it is. Raises :class:`CheckpointError` if it cannot be read."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        mapped = zipfile.is_zipfile(path)  # files of PyTorch before 1.6 cannot be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # torch and safetensors raise a dozen unrelated types here
        raise CheckpointError(
            f"cannot read checkpoint {path}: it is damaged or of another kind "
            f"({type(error).__name__}); expected a PyTorch state dict (.pth, .pt) or a .safetensors "
            "file; see 'sa-engine weights list'"
        ) from error


def is_state_dict(state: object) -> bool:
    """Whether it is a flat mapping of tensors."""
    return isinstance(state, Mapping) and all(isinstance(v, Tensor) for v in state.values())


def detect_architecture(state: Mapping[str, Tensor], path: Path) -> str:
    """Name of the architecture whose image encoder the tensors belong to. Raises :class:`CheckpointError`."""
    if "image_encoder.patch_embed.seq.0.c.weight" in state:
        return "vit_t"
    patches = state.get("image_encoder.patch_embed.proj.weight")
    if patches is not None:
        for name, encoder in VIT_ENCODERS.items():
            if len(patches) == encoder["width"]:
                return name
    found = ", ".join(sorted({key.split(".")[0] for key in state})[:6]) or "no tensors"
    raise CheckpointError(
        f"checkpoint {path} is not a SAM of a known architecture ({', '.join(ARCHITECTURES)}): "
        f"found {found}; expected image_encoder, prompt_encoder and mask_decoder."
    )


def model_fingerprint(model: nn.Module) -> str:
    """sha256 over names, shapes and values of the loaded tensors: equal exactly when the weights are equal.

    Of a whole :class:`Sam`, or of a part such as its image encoder.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        values = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {tuple(values.shape)} {values.dtype}".encode())
        digest.update(values.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def encoder_fingerprint(sam: Sam) -> str:
    """sha256 over the image encoder's tensors: models that share it share embeddings."""
    return model_fingerprint(sam.image_encoder)


def input_size(height: int, width: int, image_size: int) -> tuple[int, int]:
    """Size (height, width) of an image scaled so that its longest side is ``image_size``: half up, at least 1."""
    scale = image_size / max(height, width)
    return max(1, math.floor(height * scale + 0.5)), max(1, math.floor(width * scale + 0.5))


def select_device(name: str) -> torch.device:
    """The torch device for ``auto``, ``cpu``, ``cuda``, ``cuda:N`` or ``mps``.

    Raises:
        DeviceError: a device that this machine does not have.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    if name == "auto":
        return torch.device("cuda" if cuda else "mps" if mps else "cpu")
    if (name.startswith("cuda") and not cuda) or (name == "mps" and not mps):
        raise DeviceError(
            f"device {name} is not available here: PyTorch sees CUDA: {cuda}, MPS: {mps}; "
            "use --device cpu or auto"
        )
    return torch.device(name)
