"""What training takes of memory, told before the first step.

The activations that autograd keeps are counted, not guessed: the model runs once on torch's meta device, where
tensors have shapes and no numbers, so that any encoder, decoder depth and number of masks is known within a second.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sa_engine.modeling.image_encoder import EMBEDDING_CHANNELS
from sa_engine.modeling.mask_decoder import MULTIMASK_OUTPUTS
from sa_engine.modeling.sam import Sam
from sa_engine.modeling.trainable import attend, predict_masks
from sa_engine.resources import this_machine
from sa_engine.training.modes import BLOCKS

# Measured on a CPU, see `estimate`: Python with its libraries (0.84 GB) and what a backward pass takes besides; the
# share that bfloat16 leaves of the activations; float32 maps of logits that the losses keep.
_PROCESS = 1_150_000_000
_BF16_ENCODER, _BF16_DECODER = 0.6, 0.77
_LOSS_MAPS = 10
_LOADED = 6  # images: the one at work, those ahead, and one on its way
_OUTPUTS = MULTIMASK_OUTPUTS + 1
_PROMPT_TOKENS = 12
_NUMBER = 4  # bytes of a float32


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that a worker takes at its peak.

    Attributes:
        process: Python, torch and the libraries.
        weights: of the model, float32 whatever the arithmetic.
        gradients: of the weights that are trained.
        optimizer: the two moments of AdamW.
        encoder: activations of the image encoder, of one image: the loop takes one after another. 0 if it is frozen.
        decoder: activations and losses of one decode.
        samples: pixels and masks of the images that are loaded; never on a GPU.
        on_gpu: whether it will be trained on one, which has nothing of it yet.
    """

    process: int
    weights: int
    gradients: int
    optimizer: int
    encoder: int
    decoder: int
    samples: int
    on_gpu: bool = False

    @property
    def total(self) -> int:
        """All of it, wherever it is."""
        return sum(self._parts().values())

    def needed(self, started: int = 0) -> int:
        """Bytes that training will take of the device, besides what this process, which has planned it, has taken.

        Args:
            started: processes that will train, each with all it takes; 0: this one does, which is there with the
                model. On GPUs every process has its own, and this is of one.
        """
        if self.on_gpu:
            return self.total - self.process - self.samples
        if started:
            return started * self.total
        return self.total - self.process - self.weights

    def _parts(self) -> dict[str, int]:
        return {
            "process": self.process,
            "weights": self.weights,
            "gradients": self.gradients,
            "AdamW": self.optimizer,
            "encoder": self.encoder,
            "decoder": self.decoder,
            "loaded images": self.samples,
        }

    def __str__(self) -> str:
        """Say it in a line."""
        parts = ", ".join(f"{name} {size / 1e9:.2f}" for name, size in self._parts().items())
        return f"about {self.total / 1e9:.1f} GB of memory for each worker: {parts}"

    def shortage(self, free: float, started: int = 0) -> str | None:
        """What to lower if it will not fit; None if it will.

        Args:
            free: bytes of the device, as of :func:`free_memory`.
            started: see `needed`.
        """
        needed = self.needed(started)
        if needed <= free:
            return None
        advice = {
            self.gradients + self.optimizer: "a frozen encoder (train_encoder = false)",
            self.encoder: "gradient_checkpointing, precision = bf16 or train_encoder = false",
            self.decoder: "a smaller masks_per_decode or loss_size, or precision = bf16",
            0 if self.on_gpu else self.samples: "a smaller max_masks",
        }
        sharing = started > 1 and not self.on_gpu
        fewer = ", or fewer workers" if sharing else ""
        who = f"{started} workers" if sharing else "training"
        return (
            f"{who} will take about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free: the system "
            f"may end it. What helps most: {advice[max(advice)]}{fewer}"
        )


def estimate(
    sam: Sam,
    device: torch.device,
    *,
    loaded: int = _LOADED,
    masks_per_image: int,
    masks_per_decode: int,
    loss_size: int = 256,
    checkpointing: bool = False,
    bf16: bool = False,
) -> MemoryEstimate:
    """Estimate what a worker takes; what has `requires_grad` is trained.

    Measured peaks of fresh processes (CPU, 2026-11-25, torch 2.14; `benchmarks/training_memory.py`): vit_t with a
    frozen encoder took 1.14, 1.64 and 2.85 GB with 1, 4 and 16 masks a decode, 0.85, 1.01 and 1.01 of the estimate.
    Forward and backward through vit_t's encoder took 2.10 GB, with checkpointing 1.20; `encoder` says 1.81 and 0.82,
    and the rest is in `process`. vit_b is counted only: 6.60 and 2.32 GB. A GPU's attention keeps less.

    Args:
        sam: in training, wherever it is now; it does not run.
        device: on which it will be trained.
        loaded: images that are there with their masks at once.
        masks_per_image: as many as an image can have.
        masks_per_decode: objects that are prompted at once.
        loss_size: side of the square of logits that the losses see.
        checkpointing: the encoder's blocks are computed again in the backward pass.
        bf16: under autocast; weights, gradients and moments stay float32.
    """
    trained = sum(p.nbytes for p in sam.parameters() if p.requires_grad)
    encoder, decoder = _BF16_ENCODER if bf16 else 1.0, _BF16_DECODER if bf16 else 1.0
    losses = _LOSS_MAPS * masks_per_decode * _OUTPUTS * loss_size**2 * _NUMBER
    return MemoryEstimate(
        process=_PROCESS,
        weights=sum(p.nbytes for p in sam.parameters()),
        gradients=trained,
        optimizer=2 * trained,
        encoder=int(_encoder_activations(sam, checkpointing) * encoder),
        decoder=int(_decoder_activations(sam, masks_per_decode) * decoder) + losses,
        samples=loaded * (masks_per_image + 3) * sam.image_size**2,
        on_gpu=device.type == "cuda",
    )


def free_memory(device: torch.device) -> float:
    """Bytes that are free on a GPU, or on this machine."""
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return this_machine().memory


def _encoder_activations(sam: Sam, checkpointing: bool) -> int:
    """Bytes; with checkpointing, the inputs of the blocks, and the largest block with its gradients."""
    encoder = sam.image_encoder
    blocks = [module for module in encoder.modules() if isinstance(module, BLOCKS)]
    recomputing = {
        block: vars(block).pop("forward") for block in blocks if "forward" in vars(block)
    }
    state = _on_meta(encoder)
    saved = SavedTensors(state)
    pixels = torch.empty(1, 3, sam.image_size, sam.image_size, device="meta")
    with saved.watching(blocks):
        functional_call(encoder, state, (pixels,))
    for block, forward in recomputing.items():
        block.forward = forward  # type: ignore[method-assign]
    if not checkpointing:
        return saved.bytes
    return saved.bytes - sum(saved.blocks) + sum(saved.inputs) + 2 * max(saved.blocks)


def _decoder_activations(sam: Sam, masks: int) -> int:
    decode = _Decode(sam)
    state = _on_meta(decode)
    saved = SavedTensors(state)
    side = sam.image_size // 16
    image = torch.empty(1, EMBEDDING_CHANNELS, side, side, device="meta")
    image.requires_grad_(_is_trained(sam.image_encoder))
    tokens = torch.empty(masks, _PROMPT_TOKENS, EMBEDDING_CHANNELS, device="meta")
    previous = torch.empty(masks, 1, 4 * side, 4 * side, device="meta")
    with saved.watching():
        functional_call(decode, state, (image, tokens, previous))
    return saved.bytes


class _Decode(nn.Module):
    """What keeps at least as much as any step of the simulation: a mask as prompt, and all outputs."""

    def __init__(self, sam: Sam) -> None:
        super().__init__()
        self.prompts, self.decoder = sam.prompt_encoder, sam.mask_decoder

    def forward(self, image: Tensor, tokens: Tensor, previous: Tensor) -> tuple[Tensor, Tensor]:
        prompted = (image + self.prompts.mask_downscaling(previous)).flatten(2).transpose(1, 2)
        positions = torch.zeros_like(prompted[:1])
        attended = attend(self.decoder, prompted, positions, tokens)
        return predict_masks(self.decoder, attended), self.decoder.predict_iou(attended)


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
    def watching(self, blocks: Sequence[nn.Module] = ()) -> Iterator[None]:
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
