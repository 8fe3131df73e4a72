import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from training import make_run, quarter, save

from sa_engine.modeling.sam import Sam, build_sam
from sa_engine.training import memory
from sa_engine.training.config import RetrainConfig
from sa_engine.training.group import CPU
from sa_engine.training.memory import MemoryEstimate, SavedTensors, estimate
from sa_engine.training.modes import set_trainable
from stages import retrain

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
    trained = estimate(sam, CPU, **STEP)
    set_trainable(sam, config(train_encoder=False))
    frozen = estimate(sam, CPU, **STEP)
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
    plain, checkpointed = (
        estimate(sam, CPU, checkpointing=on, **STEP).encoder for on in (False, True)
    )
    assert checkpointed < plain / 2
    set_trainable(sam, config(gradient_checkpointing=True))
    assert estimate(sam, CPU, checkpointing=True, **STEP).encoder == checkpointed
    assert any("forward" in vars(module) for module in sam.modules()), "it stays set"
    assert estimate(sam, CPU, bf16=True, **STEP).encoder < plain


def test_masks_and_sizes_count(sam: Sam) -> None:
    few = estimate(sam, CPU, **STEP)
    many = estimate(sam, CPU, **{**STEP, "masks_per_decode": 8})
    assert 1.9 < many.decoder / few.decoder < 2.1
    assert estimate(sam, CPU, loss_size=1024, **STEP).decoder > 2 * few.decoder
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
    assert told is not None and "training will take about 12.0 GB, and 11.9 GB are free" in told
    assert advice in told and "fewer workers" not in told


def parts() -> dict[str, int]:
    """Sizes of which any sum tells what is in it."""
    names = ("process", "weights", "gradients", "optimizer", "encoder", "decoder", "samples")
    return {name: 10**place for place, name in enumerate(names)}


def test_every_process_that_is_started_takes_all_of_it() -> None:
    """This one, which has planned the training, is there already; it trains only where it is alone."""
    found = MemoryEstimate(**parts())
    assert found.total == 1_111_111
    assert found.needed() == 1_111_100
    assert [found.needed(started) for started in (1, 2, 3)] == [1_111_111, 2_222_222, 3_333_333]
    assert found.shortage(2_222_222, 2) is None
    large = MemoryEstimate(**dict.fromkeys(parts(), 10**9))
    told = large.shortage(13.9e9, 2)
    assert told is not None and "2 workers will take about 14.0 GB, and 13.9 GB are free" in told
    assert told.endswith(", or fewer workers")


def test_a_gpu_takes_the_weights_but_neither_the_process_nor_loaded_images(sam: Sam) -> None:
    """At planning, the model is not on it yet; and each worker has a GPU of its own."""
    found = MemoryEstimate(**parts(), on_gpu=True)
    assert [found.needed(started) for started in (0, 1, 4)] == [111_110] * 3
    assert found.shortage(111_110, 4) is None
    told = MemoryEstimate(**dict.fromkeys(parts(), 10**9), on_gpu=True).shortage(4.9e9, 4)
    assert told is not None and "training will take about 5.0 GB, and 4.9 GB are free" in told
    assert "fewer workers" not in told and "max_masks" not in told
    here, there = estimate(sam, CPU, **STEP), estimate(sam, torch.device("cuda", 1), **STEP)
    assert not here.on_gpu and there.on_gpu and replace(there, on_gpu=False) == here
    assert here.needed() - there.needed() == here.samples - here.weights


@pytest.mark.parametrize(
    ("options", "started"),
    [({}, 0), ({"num_workers": 2}, 2), ({"ray": True}, 1), ({"ray_address": "auto"}, 1)],
)
def test_the_plan_counts_the_processes_that_it_will_start(
    options: dict[str, Any], started: int, tmp_path: Path, photos: list[np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "photos").mkdir()
    save(tmp_path / "photos", 0, photos)
    data = make_run(tmp_path / "photos", tmp_path / "data", quarter)
    monkeypatch.setattr("stages.retrain.free_memory", lambda device: 0.0)
    wanted = config(train_encoder=False, device="cpu", **options)
    planned = retrain.plan(replace(wanted, data=(str(data),), out=str(tmp_path / "out")))
    assert planned.memory is not None
    assert planned.shortage == planned.memory.shortage(0.0, started)


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
