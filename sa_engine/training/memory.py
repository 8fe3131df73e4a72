"""What a training step takes of memory, told before the first one.

The activations that autograd keeps are counted, not guessed: the model runs once on torch's meta device, where
tensors have shapes and no numbers, so that any encoder, decoder depth and batch is known within a second.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sa_engine.modeling.image_encoder import EMBEDDING_CHANNELS
from sa_engine.modeling.mask_decoder import MULTIMASK_OUTPUTS
from sa_engine.modeling.sam import Sam
from sa_engine.resources import this_machine

# Measured on a CPU, see `estimate` and benchmarks/README.md.
_PROCESS = 450_000_000
_BF16 = 0.6
_BACKWARD = 1.1
_LOSS_MAPS = 10
_PROMPT_TOKENS = 3
_NUMBER = 4  # bytes of a float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a training process takes at its peak.

    Attributes:
        process: Python, torch and the libraries.
        weights: of the model, float32 whatever the computation is in.
        gradients: of the weights that are trained.
        optimizer: the two moments of AdamW.
        encoder: activations of the image encoder, of all images of a step; 0 if it is frozen.
        decoder: activations and losses of one decode.
        targets: masks of all images of a step, as booleans.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    encoder: int
    decoder: int
    targets: int

    @property
    def total(self) -> int:
        return self.process + self.weights + self.to_come

    @property
    def to_come(self) -> int:
        """What a process takes beyond what it has when its model is loaded."""
        return self.gradients + self.optimizer + self.encoder + self.decoder + self.targets

    def __str__(self) -> str:
        """Say it in a line."""
        parts = {
            "process": self.process,
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW": self.optimizer,
            "encoder": self.encoder,
            "decoder": self.decoder,
            "masks": self.targets,
        }
        listed = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in parts.items())
        return f"about {self.total / 1e9:.1f} GB of memory for each worker ({listed})"

    def shortage(self, free: float, workers: int = 1) -> str | None:
        """Tell what to lower if it does not fit; None if it does.

        Args:
            free: bytes that are free for what is to come, as of :func:`free_memory`.
            workers: that share them.
        """
        needed = self.to_come * workers
        if needed <= free:
            return None
        if self.encoder >= max(self.decoder, self.gradients + self.optimizer):
            advice = "fewer images a step, gradient checkpointing, bf16, or a frozen image encoder"
        elif self.decoder + self.targets >= self.gradients + self.optimizer:
            advice = "fewer masks a decode or an image, a smaller loss size, or bf16"
        else:
            advice = "a smaller model, or a frozen image encoder"
        advice += ", or fewer workers" if workers > 1 else ""
        many = f"{workers} workers" if workers > 1 else "training"
        return (
            f"{many} will take about {needed / 1e9:.1f} GB more, and {free / 1e9:.1f} GB are free: "
            f"it may be ended by the system. Use {advice}"
        )


def estimate(
    sam: Sam,
    *,
    images: int,
    masks_per_image: int,
    masks_per_decode: int,
    loss_size: int = 256,
    checkpointing: bool = False,
    bf16: bool = False,
) -> MemoryEstimate:
    """Estimate the peak of a step that encodes its images, and then decodes and backpropagates mask by mask.

    What has `requires_grad` is trained. Measured peaks of fresh processes on a CPU (2026-11-25, torch 2.14,
    glibc, `benchmarks/training_memory.py`) were MEASURED of the estimate; a GPU, whose attention keeps less, stays
    below.

    Args:
        sam: as it will be trained; nothing runs on its device.
        images: of a step on one worker, whose activations are kept at the same time.
        masks_per_image: kept as (loss_size, loss_size) booleans.
        masks_per_decode: prompts that the decoder takes at once, three masks each.
        loss_size: side of the square of logits that the losses see.
        checkpointing: the encoder's blocks are computed again in the backward pass.
        bf16: under autocast; weights, gradients and moments stay float32.
    """
    trained = sum(p.nbytes for p in sam.parameters() if p.requires_grad)
    kept = _encoder_activations(sam, images, checkpointing) * _BACKWARD
    decoded = _decoder_activations(sam, masks_per_decode) * _BACKWARD
    share = _BF16 if bf16 else 1.0
    losses = _LOSS_MAPS * masks_per_decode * MULTIMASK_OUTPUTS * loss_size**2 * _NUMBER
    pixels = images * (3 * sam.image_size**2 + EMBEDDING_CHANNELS * (sam.image_size // 16) ** 2)
    return MemoryEstimate(
        process=_PROCESS,
        weights=sum(p.nbytes for p in sam.parameters()),
        gradients=trained,
        optimizer=2 * trained,
        encoder=int(kept * share),
        decoder=int(decoded * share) + losses,
        targets=images * masks_per_image * loss_size**2 + pixels * _NUMBER,
    )


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU, or on this machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return this_machine().memory


def _encoder_activations(sam: Sam, images: int, checkpointing: bool) -> int:
    """Bytes; with checkpointing, the inputs of the blocks and the largest of them once."""
    encoder = sam.image_encoder
    blocks = [
        block
        for name, block in encoder.named_modules()
        if name.split(".")[-2:-1] == ["blocks"]  # those of TinyViT's stages too
    ]
    state = _on_meta(encoder)
    saved = SavedTensors(state)
    pixels = torch.empty(images, 3, sam.image_size, sam.image_size, device="meta")
    with saved.watching(blocks):
        functional_call(encoder, state, (pixels,))
    if not checkpointing:
        return saved.bytes
    return saved.bytes - sum(saved.blocks) + sum(saved.inputs) + max(saved.blocks)


def _decoder_activations(sam: Sam, masks: int) -> int:
    state = _on_meta(sam.mask_decoder)
    saved = SavedTensors(state)
    side = sam.image_size // 16
    grid = torch.empty(1, EMBEDDING_CHANNELS, side, side, device="meta")
    tokens = torch.empty(masks, _PROMPT_TOKENS, EMBEDDING_CHANNELS, device="meta")
    image = torch.empty_like(grid).requires_grad_(_is_trained(sam.image_encoder))
    with saved.watching([]):
        functional_call(sam.mask_decoder, state, (image, grid, tokens, grid, True))
    return saved.bytes


def _is_trained(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())


def _on_meta(module: nn.Module) -> dict[str, Tensor]:
    """Its weights and buffers without their numbers."""
    tensors: dict[str, Tensor] = {
        name: torch.empty_like(tensor, device="meta").requires_grad_(tensor.requires_grad)
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    return tensors


class SavedTensors:
    """Bytes that autograd keeps for the backward pass; every storage counts once, the weights do not.

    Attributes:
        bytes: all of them.
        blocks: of those, what each of the watched modules kept in its forward pass.
        inputs: bytes of the input of each of them.
    """

    def __init__(self, weights: Mapping[str, Tensor]) -> None:
        self.bytes = 0
        self.blocks: list[int] = []
        self.inputs: list[int] = []
        self._kept = {_storage(tensor): tensor for tensor in weights.values()}

    @contextmanager
    def watching(self, blocks: list[nn.Module]) -> Iterator[None]:
        """Count while a model runs forward."""
        hooks = [block.register_forward_pre_hook(self._enter) for block in blocks]
        hooks += [block.register_forward_hook(self._leave) for block in blocks]
        try:
            with torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _keep(self, tensor: Tensor) -> Tensor:
        if _storage(tensor) not in self._kept:
            self._kept[_storage(tensor)] = tensor  # or another storage could take its address
            self.bytes += tensor.untyped_storage().nbytes()
        return tensor

    def _enter(self, block: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.inputs.append(inputs[0].nbytes)
        self.blocks.append(-self.bytes)

    def _leave(self, block: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.blocks[-1] += self.bytes


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
