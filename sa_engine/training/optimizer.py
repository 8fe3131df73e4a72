"""AdamW with layer-wise decay of the learning rate, and its schedule (paper §A)."""

import re
from collections import defaultdict
from typing import Any

import torch

from sa_engine.modeling.sam import Sam
from sa_engine.training.config import OptimizerOptions, ScheduleOptions

_ENCODER = "image_encoder."
_NO_DECAY = re.compile(
    r"pos_embed|rel_pos|attention_biases|iou_token|mask_tokens|point_embeddings|not_a_point|no_mask"
)


def make_optimizer(sam: Sam, options: OptimizerOptions) -> torch.optim.AdamW:
    """AdamW over all parameters that require a gradient, in groups of equal rate and weight decay.

    Each group has `scale`, by which the schedule's rate is multiplied: `layer_decay` to the power of the number of
    blocks above, 1 from the encoder's neck on. Biases, norms, learned tokens and position tables have no weight decay.
    """
    groups: dict[tuple[float, float], list[torch.nn.Parameter]] = defaultdict(list)
    layers = layer_numbers(sam)
    top = max(layers.values(), default=0)
    for name, parameter in sam.named_parameters():
        if parameter.requires_grad:
            scale = options.layer_decay ** (top - layers.get(name, top))
            plain = parameter.ndim <= 1 or _NO_DECAY.search(name) is not None
            groups[scale, 0.0 if plain else options.weight_decay].append(parameter)
    return torch.optim.AdamW(
        [
            {"params": parameters, "scale": scale, "weight_decay": decay}
            for (scale, decay), parameters in groups.items()
        ],
        lr=options.lr,
        betas=(options.beta1, options.beta2),
    )


def plain_groups(model: torch.nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Groups of a model's parameters that require a gradient: biases and norms have no weight decay."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return [
        {
            "params": [p for p in trained if (p.ndim > 1) == decays],
            "scale": 1.0,
            "weight_decay": weight_decay if decays else 0.0,
        }
        for decays in (True, False)
    ]


def layer_numbers(sam: Sam) -> dict[str, int]:
    """Layer of every parameter of the image encoder: 0 for the patches, then block by block; the neck comes last."""
    layers: dict[str, int] = {}
    blocks: list[str] = []
    for name, _ in sam.named_parameters():
        if not name.startswith(_ENCODER):
            continue
        if block := re.match(r".*?blocks\.\d+\.", name):
            if block[0] not in blocks:
                blocks.append(block[0])
            layers[name] = blocks.index(block[0]) + 1
        elif "patch_embed" in name or "pos_embed" in name:
            layers[name] = 0
        else:  # what merges the patches of a stage belongs to its last block
            layers[name] = len(blocks) + ("downsample" not in name)
    return layers


def rate(options: ScheduleOptions, iteration: int) -> float:
    """Learning rate of an iteration, counted from 0."""
    if iteration < options.warmup:
        return options.lr * (iteration + 1) / options.warmup
    if options.schedule == "linear":
        left = options.iterations - iteration
        return options.lr * left / max(1, options.iterations - options.warmup)
    if options.schedule == "step":
        drops = sum(iteration >= at for at in options.decay_at)
        return options.lr * options.decay_factor**drops
    return options.lr


def set_rate(optimizer: torch.optim.Optimizer, value: float) -> None:
    """Give every group its share of a learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = value * group["scale"]
