"""Peak memory of a training step against the estimate, each case in a new process on the CPU.

    python benchmarks/training_memory.py [--case "vit_t trained"]

Two steps of the training loop with random weights and masks, as AdamW's moments come with the first. The interactive
simulation is cut to its first prompt and one correction, which changes nothing about its peak.
"""

import argparse
import json
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sa_engine.modeling.sam import build_sam  # noqa: E402
from sa_engine.training.config import RetrainConfig  # noqa: E402
from sa_engine.training.memory import estimate  # noqa: E402
from sa_engine.training.modes import set_trainable, set_training_mode  # noqa: E402
from sa_engine.training.optimizer import make_optimizer  # noqa: E402
from sa_engine.training.sam import simulation_of  # noqa: E402
from sa_engine.training.simulate import Tally  # noqa: E402

USUAL: dict[str, Any] = {
    "architecture": "vit_t",
    "train_encoder": False,
    "masks_per_decode": 4,
    "loss_size": 256,
    "gradient_checkpointing": False,
    "precision": "fp32",
}
TRAINED: dict[str, Any] = {"train_encoder": True}
CHECKPOINTING: dict[str, Any] = {**TRAINED, "gradient_checkpointing": True}
VIT_B: dict[str, Any] = {"architecture": "vit_b"}
CASES: list[dict[str, Any]] = [
    *({"masks_per_decode": masks} for masks in (1, 4, 16)),
    *({"masks_per_decode": masks, "loss_size": 1024} for masks in (4, 16)),
    TRAINED,
    CHECKPOINTING,
    {**VIT_B, **CHECKPOINTING},
    {**VIT_B, **TRAINED},
    {"masks_per_decode": 16, "precision": "bf16"},
    {**TRAINED, "precision": "bf16"},
]


def measure(case: dict[str, Any]) -> dict[str, float]:
    """Peak and estimate of a case, in GB, in this process."""
    config = RetrainConfig(data=("none",), out="none", corrections=1, mask_only_steps=0, **case)
    sam = build_sam(case["architecture"], dropout=config.dropout, drop_path=config.drop_path)
    set_trainable(sam, config)
    optimizer, simulation = make_optimizer(sam, config), simulation_of(config, sam.device)
    rng, side = np.random.default_rng(0), sam.image_size
    masks = np.zeros((case["masks_per_decode"], side, side), bool)  # one decode has the peak
    for mask, corner in zip(masks, rng.integers(0, side // 2, (len(masks), 2)), strict=True):
        mask[corner[0] : corner[0] + 300, corner[1] : corner[1] + 300] = True
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bf16 = case["precision"] == "bf16"
    for _ in range(2):
        set_training_mode(sam, config)
        pixels = torch.randn(1, 3, side, side)
        with (
            torch.set_grad_enabled(config.train_encoder),
            torch.autocast("cpu", torch.bfloat16, enabled=bf16),
        ):
            embedding = sam.image_encoder(pixels).float()
        leaf = embedding.detach().requires_grad_(embedding.requires_grad)
        simulation.train(sam, leaf, masks, rng, Tally())
        if embedding.requires_grad:
            embedding.backward(leaf.grad)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expected = estimate(
        sam,
        sam.device,
        loaded=0,  # the masks of this one are there before its steps
        masks_per_image=len(masks),
        masks_per_decode=case["masks_per_decode"],
        loss_size=case["loss_size"],
        checkpointing=case["gradient_checkpointing"],
        bf16=bf16,
    )
    return {
        "loaded": before * 1024 / 1e9,
        "peak": peak * 1024 / 1e9,
        "estimate": expected.total / 1e9,
        "encoder": expected.encoder / 1e9,
        "decoder": expected.decoder / 1e9,
    }


def describe(case: dict[str, Any]) -> str:
    encoder = "trained" if case["train_encoder"] else "frozen"
    words = [f"{case['architecture']} {encoder}", f"{case['masks_per_decode']} masks a decode"]
    words.append(f"losses at {case['loss_size']}")
    words += ["checkpointing"] if case["gradient_checkpointing"] else []
    words += ["bf16"] if case["precision"] == "bf16" else []
    return ", ".join(words)


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
        name = describe(case)
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
