"""Peak memory of a training step against the estimate, each case in a new process on the CPU.

    python benchmarks/training_memory.py [--case "vit_t trained"]

A step as the training loop takes it: encode the images, decode and backpropagate some masks at a time down to the
embedding, and once through the encoder; then AdamW. Two steps, because AdamW's moments come with the first.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sa_engine.modeling.sam import Sam, build_sam  # noqa: E402
from sa_engine.training.memory import estimate  # noqa: E402

USUAL: dict[str, Any] = {
    "architecture": "vit_t",
    "frozen": True,
    "images": 1,
    "masks_per_image": 16,
    "masks_per_decode": 4,
    "loss_size": 256,
    "checkpointing": False,
    "bf16": False,
}
CASES: list[dict[str, Any]] = [
    *({"masks_per_decode": masks} for masks in (1, 4, 16)),
    *({"masks_per_decode": masks, "loss_size": 1024} for masks in (4, 16)),
    {"masks_per_decode": 16, "bf16": True},
    *({"frozen": False, "images": images} for images in (1, 2, 4)),
    *({"frozen": False, "images": images, "checkpointing": True} for images in (1, 4)),
    {"frozen": False, "bf16": True, "images": 2},
    {"architecture": "vit_b"},
    *({"architecture": "vit_b", "frozen": False, "checkpointing": c} for c in (True, False)),
    {"architecture": "vit_b", "frozen": False, "checkpointing": True, "bf16": True},
]


class Checkpointed(nn.Module):
    """A block that keeps its input alone."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


def losses(logits: Tensor, target: Tensor) -> Tensor:
    """Focal and dice loss, written plainly."""
    target = target.to(logits.dtype).expand_as(logits)
    entropy = F.binary_cross_entropy_with_logits(logits, target, reduction="none")
    probability = logits.sigmoid()
    right = probability * target + (1 - probability) * (1 - target)
    focal = ((1 - right) ** 2 * entropy).mean()
    overlap = (probability * target).sum((-2, -1))
    dice = 1 - (2 * overlap + 1) / (probability.sum((-2, -1)) + target.sum((-2, -1)) + 1)
    return 20 * focal + dice.mean()


def step(sam: Sam, case: dict[str, Any], optimizer: torch.optim.Optimizer) -> None:
    images, chunk, side = case["images"], case["masks_per_decode"], case["loss_size"]
    pixels = torch.randn(images, 3, sam.image_size, sam.image_size)
    targets = torch.rand(images, case["masks_per_image"], 1, side, side) > 0.5
    embedded = sam.image_encoder(pixels)
    leaves = embedded.detach().float().requires_grad_(not case["frozen"])
    grid = torch.zeros(1, 256, 64, 64)
    for image in range(images):
        for first in range(0, case["masks_per_image"], chunk):
            target = targets[image, first : first + chunk]
            tokens = torch.randn(len(target), 3, 256)
            logits, iou = sam.mask_decoder(leaves[image : image + 1], grid, tokens, grid, True)
            if side != logits.shape[-1]:
                logits = F.interpolate(logits.float(), (side, side), mode="bilinear")
            (losses(logits.float(), target) + iou.float().square().mean()).backward()
    if not case["frozen"]:
        embedded.backward(leaves.grad)
    optimizer.step()
    optimizer.zero_grad()


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Peak and estimate of a case, in GB, in this process."""
    sam = build_sam(case["architecture"])
    sam.image_encoder.train(not case["frozen"]).requires_grad_(not case["frozen"])
    for module in sam.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    sizes = {name: case[name] for name in USUAL if name not in ("architecture", "frozen")}
    expected = estimate(sam, **sizes)
    if case["checkpointing"]:
        for parent in list(sam.image_encoder.modules()):
            if isinstance(blocks := getattr(parent, "blocks", None), nn.ModuleList):
                parent.blocks = nn.ModuleList(Checkpointed(block) for block in blocks)
    optimizer = torch.optim.AdamW([p for p in sam.parameters() if p.requires_grad])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16, enabled=case["bf16"]):
            step(sam, case, optimizer)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "loaded": before * 1024 / 1e9,
        "peak": peak * 1024 / 1e9,
        "estimate": expected.total / 1e9,
        "encoder": expected.encoder / 1e9,
        "decoder": expected.decoder / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="", help="only cases whose description holds this")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child is not None:
        print(json.dumps(measure(args.child)))
        return
    print("| case | loaded, GB | peak, GB | estimate, GB | peak/estimate | encoder | decoder |")
    print("|---|---|---|---|---|---|---|")
    for options in CASES:
        case = {**USUAL, **options}
        encoder = "frozen" if case["frozen"] else "trained"
        name = f"{case['architecture']} {encoder}" + "".join(
            f", {case[key]} {words}"
            for key, words in (("images", "images"), ("masks_per_decode", "masks a decode"))
        )
        name += f", losses at {case['loss_size']}"
        name += "".join(f", {key}" for key in ("checkpointing", "bf16") if case[key])
        if args.case not in name:
            continue
        command = [sys.executable, __file__, "--child", json.dumps(case)]
        output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        got = json.loads(output.splitlines()[-1])
        print(
            f"| {name} | {got['loaded']:.2f} | {got['peak']:.2f} | {got['estimate']:.2f} "
            f"| {got['peak'] / got['estimate']:.2f} | {got['encoder']:.2f} | {got['decoder']:.2f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
