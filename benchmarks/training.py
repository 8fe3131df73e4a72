"""Time the steps of `sa-engine retrain`: what takes it, and how far that is from its floor.

The floor is the model alone, forwards and backwards: what a step would take if data, prompts, losses and optimizer were
free. The plain decoder, which projects the whole image at every attention, is timed in the same run.

    python benchmarks/training.py RUN [--threads 2] [--case NAME ...]
"""

import argparse
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import cv2
import torch
from torch import Tensor

from sa_engine.modeling.mask_decoder import Attended, MaskDecoder
from sa_engine.modeling.sam import encoder_fingerprint, load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.training import simulate
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import Group
from sa_engine.training.sam import SamTrainer
from sa_engine.training.tally import Tally

CASES: dict[str, dict[str, Any]] = {
    "finetune": {"train_encoder": False, "corrections": 1, "mask_only_steps": 0},
    "frozen encoder, 11 steps": {"train_encoder": False},
    "whole model, 11 steps": {},
}
MODEL = ("encoder", "decoder", "backward")
STEPS = 3


def main() -> None:
    """Time every case, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("run", type=Path, help="shards to train on")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", choices=CASES, action="append")
    parser.add_argument("--embeddings", type=Path, default=Path("build/embeddings"))
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    cv2.setNumThreads(1)
    print(
        f"{asked.threads} threads, vit_t, 2 images of 4 masks a step, {STEPS} steps after one to warm up"
    )
    for name in asked.case or CASES:
        for plain in (False, True):
            with plain_decoder() if plain else as_it_is():
                seconds, parts = measure(asked.run, asked.embeddings, **CASES[name])
            floor = sum(parts.get(part, 0.0) for part in MODEL)
            shares = ", ".join(
                f"{part} {100 * s / seconds:.1f} %" for part, s in sorted(parts.items())
            )
            print(
                f"{name}{' (plain decoder)' if plain else ''}: {seconds:.2f} s a step, "
                f"{2 / seconds:.2f} images/s, {seconds / floor:.3f} of the floor; {shares}",
                flush=True,
            )


def measure(run: Path, embeddings: Path, **options: Any) -> tuple[float, dict[str, float]]:
    """Seconds of a step, whole and by part."""
    config = RetrainConfig(
        data=(str(run),),
        out="-",
        iterations=1 + STEPS,
        batch_size=2,
        max_masks=4,
        log_every=1,
        dropout=0.0,
        lr=1e-5,
        **options,
    )
    sam = load_sam(resolve("vit_t"))
    data = TrainingData.open([run])
    cache = EmbeddingCache(embeddings, encoder_fingerprint(sam)) if config.cached else None
    trainer = SamTrainer(config, Group(), sam, data, cache)
    if cache is not None:  # the first epoch's work is not what is asked for
        for iteration in range(1 + STEPS):
            trainer._step(0, trainer._loaded(iteration), Tally())
    lines: list[dict[str, Any]] = []
    ends: list[float] = []

    def note(line: dict[str, Any]) -> None:
        lines.append(line)
        ends.append(time.perf_counter())

    trainer.run(lambda state: None, note)
    masks = [after["masks"] - before["masks"] for before, after in pairwise(lines)]
    parts = {
        part: sum(
            line["ms_per_mask"][part] * count for line, count in zip(lines[1:], masks, strict=True)
        )
        / 1000
        / STEPS
        for part in lines[0]["ms_per_mask"]
    }
    return (ends[-1] - ends[0]) / STEPS, parts


@contextmanager
def as_it_is() -> Iterator[None]:
    """The decoder for training."""
    yield


@contextmanager
def plain_decoder() -> Iterator[None]:
    """The decoder as the paper describes it, in the simulation's place."""
    ours = simulate.attend, simulate.predict_masks

    def attend(
        decoder: MaskDecoder, image: Tensor, image_pe: Tensor, prompt_tokens: Tensor
    ) -> Attended:
        side = round(image.shape[1] ** 0.5)
        shaped, positions = (
            x.transpose(1, 2).unflatten(2, (side, side)) for x in (image, image_pe)
        )
        return decoder.attend(shaped, positions, prompt_tokens, torch.zeros_like(shaped[:1]))

    simulate.attend = attend
    simulate.predict_masks = MaskDecoder.predict_masks  # type: ignore[assignment]
    try:
        yield
    finally:
        simulate.attend, simulate.predict_masks = ours


if __name__ == "__main__":
    main()
