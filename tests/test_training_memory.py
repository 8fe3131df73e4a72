import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sa_engine.modeling.sam import Sam, build_sam
from sa_engine.training import memory
from sa_engine.training.config import RetrainConfig
from sa_engine.training.memory import MemoryEstimate, SavedTensors, estimate
from sa_engine.training.modes import set_trainable

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "training_memory.py"
STEP: dict[str, Any] = {"masks_per_image": 10, "masks_per_decode": 4}


def config(**options: Any) -> RetrainConfig:
    return RetrainConfig(data=("none",), out="none", **options)


@pytest.fixture
def sam() -> Sam:
    sam = build_sam("vit_t")
    set_trainable(sam, config())
    return sam


def test_the_count_is_what_a_real_decode_keeps(sam: Sam) -> None:
    decode = memory._Decode(sam)
    image = torch.randn(1, 256, 64, 64, requires_grad=True)
    saved = SavedTensors(dict(decode.named_parameters()))
    with saved.watching():
        decode(image, torch.randn(2, 12, 256), torch.randn(2, 1, 256, 256))
    assert memory._decoder_activations(sam, 2) == pytest.approx(saved.bytes, rel=1e-3)


def test_a_frozen_encoder_keeps_nothing_and_is_not_optimized(sam: Sam) -> None:
    trained = estimate(sam, **STEP)
    set_trainable(sam, config(train_encoder=False))
    frozen = estimate(sam, **STEP)
    assert frozen.encoder == 0 < trained.encoder
    decoder = sum(
        parameter.nbytes
        for name, parameter in sam.named_parameters()
        if not name.startswith("image_encoder.") and not name.endswith("k_proj.bias")
    )
    assert (frozen.gradients, frozen.optimizer) == (decoder, 2 * decoder)
    assert trained.gradients > frozen.gradients
    assert frozen.decoder == pytest.approx(trained.decoder, rel=0.1)
    assert trained.weights == frozen.weights == sum(p.nbytes for p in sam.parameters())


def test_checkpointing_costs_less_and_counts_alike_once_it_is_set(sam: Sam) -> None:
    plain, checkpointed = (estimate(sam, checkpointing=on, **STEP).encoder for on in (False, True))
    assert checkpointed < plain / 2
    set_trainable(sam, config(gradient_checkpointing=True))
    assert estimate(sam, checkpointing=True, **STEP).encoder == checkpointed
    assert any("forward" in vars(module) for module in sam.modules()), "it stays set"
    assert estimate(sam, bf16=True, **STEP).encoder < plain


def test_masks_and_sizes_count(sam: Sam) -> None:
    few = estimate(sam, **STEP)
    many = estimate(sam, **{**STEP, "masks_per_decode": 8})
    assert 1.9 < many.decoder / few.decoder < 2.1
    assert estimate(sam, loss_size=1024, **STEP).decoder > 2 * few.decoder
    # Six images of ten masks and three colours, a byte each.
    assert few.samples == 6 * 13 * 1024**2
    assert f"about {few.total / 1e9:.1f} GB of memory for each worker: process" in str(few)


@pytest.mark.parametrize(
    ("large", "advice"),
    [
        ("encoder", "gradient_checkpointing"),
        ("decoder", "masks_per_decode"),
        ("samples", "max_masks"),
        ("optimizer", "train_encoder = false"),
    ],
)
def test_a_shortage_is_told_with_what_to_lower(large: str, advice: str) -> None:
    sizes = dict.fromkeys(
        ("process", "weights", "gradients", "optimizer", "encoder", "decoder", "samples"), 10**9
    )
    found = MemoryEstimate(**{**sizes, large: 8 * 10**9})
    assert found.shortage(12e9) is None
    told = found.shortage(11.9e9)
    assert told is not None and "about 12.0 GB, and 11.9 GB are free" in told and advice in told
    told = found.shortage(23e9, workers=2)
    assert told is not None and "2 workers will take about 24.0 GB" in told
    assert "or fewer workers" in told


def test_loaded_images_are_not_on_the_gpu() -> None:
    sizes = dict.fromkeys(("process", "weights", "gradients", "optimizer", "encoder", "decoder"), 1)
    found = MemoryEstimate(**sizes, samples=100, on_gpu=True)
    assert found.shortage(4) is None
    assert found.shortage(3) is not None


@pytest.mark.slow
@pytest.mark.parametrize(
    "options", [{"masks_per_decode": 16}, {"train_encoder": True, "gradient_checkpointing": True}]
)
def test_a_measured_peak_is_within_a_quarter(options: dict[str, Any]) -> None:
    """Of the process, its libraries included; twice a step of the real loop."""
    usual = {"architecture": "vit_t", "train_encoder": False, "masks_per_decode": 4}
    more = {"loss_size": 256, "gradient_checkpointing": False, "precision": "fp32"}
    case = json.dumps({**usual, **more, **options})
    command = [sys.executable, str(BENCHMARK), "--child", case]
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    got = json.loads(output.splitlines()[-1])
    assert 0.75 < got["peak"] / got["estimate"] < 1.25, got
