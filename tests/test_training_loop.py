"""Training on a small model, whole: it learns, and stops, resumes and spreads over workers without a trace."""

import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from training import SIDE, small_sam, turned_run

from sa_engine.modeling.sam import build_sam
from sa_engine.storage import RunPaths
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import Group
from sa_engine.training.loop import TrainingError
from sa_engine.training.modes import set_trainable, set_training_mode
from sa_engine.training.optimizer import layer_numbers, make_optimizer, rate
from sa_engine.training.parallel import run_workers
from sa_engine.training.plots import plot_curves
from sa_engine.training.round import kept_weights, validation_metrics
from sa_engine.training.sam import SamTrainer, encode, simulation_of
from sa_engine.training.state import load_state, save_state
from sa_engine.training.tally import PARTS
from sa_engine.training.validation import MEAN
from sa_engine.training.worker import words

OPTIONS: dict[str, Any] = {
    "data": ("-",),
    "out": "-",
    "iterations": 4,
    "batch_size": 4,
    "max_masks": 3,
    "corrections": 1,
    "mask_only_steps": 1,
    "warmup": 2,
    "lr": 1e-3,
    "schedule": "constant",
    "dropout": 0.1,
    "drop_path": 0.2,
    "loss_size": 256,
    "log_every": 2,
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    return turned_run(tmp_path_factory.mktemp("turned"), photos)


def make_trainer(
    run: Path, group: Group | None = None, state: Any = None, **options: Any
) -> SamTrainer:
    config = RetrainConfig(**{**OPTIONS, **options})
    data = TrainingData.open([run], seed=config.seed)
    sam = small_sam(drop_path=config.drop_path, dropout=config.dropout)
    trainer = SamTrainer(config, group or Group(), sam, data, state=state)
    object.__setattr__(trainer.simulation, "loss_size", 32)
    return trainer


def train(
    run: Path, save: Any = lambda state: None, **options: Any
) -> tuple[SamTrainer, list[Any]]:
    trainer, lines = make_trainer(run, **options), []
    assert trainer.run(save, lines.append) == 0
    return trainer, lines


def weights(trainer: SamTrainer) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in trainer.sam.state_dict().items()}


def train_as_worker(group: Group, run: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    trainer = make_trainer(run, group, **options)
    assert trainer.run(lambda state: None, lambda line: None) == 0
    return weights(trainer)


def test_training_lowers_the_losses(run: Path) -> None:
    _, lines = train(
        run, iterations=16, log_every=4, lr=2e-3, dropout=0.0, drop_path=0.0, corrections=0
    )
    losses = [line["total"] for line in lines]
    assert len(losses) == 4 and losses[-1] < 0.8 * losses[0]
    assert [line["iteration"] for line in lines] == [4, 8, 12, 16]
    assert lines[-1]["masks"] == 16 * 4 * 3
    spent = lines[0]["ms_per_mask"]
    assert spent["prompts"] == 0 and all(spent[part] > 0 for part in set(PARTS) - {"prompts"})


def test_a_mean_of_nothing_is_told_as_none(run: Path) -> None:
    _, (line,) = train(run, iterations=1, box_odds=1.0)
    assert line["point_miou"] is None and line["box_miou"] > 0
    told = words(line, SamTrainer.told, "mIoU")
    assert told.startswith("loss ") and "of boxes" in told
    assert "points" not in told and len(plot_curves([line])) > 10_000


def test_a_training_that_was_stopped_ends_with_the_same_weights(run: Path, tmp_path: Path) -> None:
    whole, _ = train(run)
    paths = RunPaths(tmp_path)
    for stop in (1, 3):
        noticed = itertools.count(1)
        stopped = make_trainer(
            run,
            Group(heard=lambda noticed=noticed, stop=stop: 15 * (next(noticed) == stop)),  # type: ignore[misc]
            state=load_state(paths),
        )
        assert stopped.run(lambda state: save_state(paths, state), lambda line: None) == 15
        assert not list(paths.scratch.iterdir())
    resumed, lines = train(run, state=load_state(paths))
    assert resumed.state.iteration == 4 and [line["iteration"] for line in lines] == []
    expected = weights(whole)
    for name, value in weights(resumed).items():
        assert torch.equal(value, expected[name]), name


def train_by_sgd(group: Group, run: Path, options: dict[str, Any]) -> dict[str, Tensor]:
    """Steps in proportion to the gradient: AdamW would hide a wrong factor, and blow up rounding where it is near 0."""
    trainer = make_trainer(run, group, **options)
    groups = [{"params": one["params"], "scale": 1.0} for one in trainer.optimizer.param_groups]
    trainer.optimizer = torch.optim.SGD(groups, lr=options["lr"])  # type: ignore[assignment]
    assert trainer.run(lambda state: None, lambda line: None) == 0
    return weights(trainer)


@pytest.mark.parametrize("train", [train_as_worker, train_by_sgd])
def test_two_workers_take_the_same_steps_as_one(run: Path, train: Any) -> None:
    by_sgd = train is train_by_sgd
    options = {"iterations": 3, "batch_size": 3, "lr": 1e-2 if by_sgd else 3e-4}
    alone = train(Group(), run, options)
    together = run_workers(train, run, options, num_workers=2, threads=1)
    before = small_sam().state_dict()
    moved = 0.0
    for name, value in together.items():
        apart = (value - alone[name]).abs()
        # Of a gradient near 0, AdamW makes whole steps of what rounding leaves: a few weights, on some machines.
        few = 0 if by_sgd else 1e-3
        assert (apart > 1e-5).float().mean() <= few and apart.max() < options["lr"], name
        moved = max(moved, float((value - before[name]).abs().max()))
    assert moved > 5e-4


def test_a_frozen_encoder_and_batch_norms_stay_as_they_are(run: Path, tmp_path: Path) -> None:
    trainer = make_trainer(run, train_encoder=False)
    before = weights(trainer)
    assert trainer.run(lambda state: None, lambda line: None) == 0
    changed = {
        name.split(".")[0]
        for name, value in weights(trainer).items()
        if not torch.equal(value, before[name])
    }
    assert changed == {"prompt_encoder", "mask_decoder"}
    sam = build_sam("vit_t", drop_path=0.1)
    set_training_mode(sam, RetrainConfig(**OPTIONS))
    norms = [module for module in sam.modules() if isinstance(module, nn.BatchNorm2d)]
    assert norms and not any(module.training for module in norms) and sam.image_encoder.training
    set_training_mode(sam, RetrainConfig(**OPTIONS, train_encoder=False))
    assert not sam.image_encoder.training and sam.mask_decoder.training


def test_kept_embeddings_train_as_new_ones(run: Path, tmp_path: Path) -> None:
    """The second training reads what the first has written, rounded once in both."""
    found = []
    for _ in range(2):
        trainer = make_trainer(run, train_encoder=False)
        trainer.cache = EmbeddingCache(tmp_path, "encoder", shape=(1, 256, SIDE // 16, SIDE // 16))
        assert trainer.run(lambda state: None, lambda line: None) == 0
        found.append(weights(trainer))
    assert len(list(tmp_path.rglob("*.safetensors"))) == 8
    assert all(torch.equal(value, found[1][name]) for name, value in found[0].items())


def test_gradient_checkpointing_changes_nothing_but_memory(run: Path) -> None:
    plain, _ = train(run, iterations=1, drop_path=0.0)
    again, _ = train(run, iterations=1, drop_path=0.0, gradient_checkpointing=True)
    for name, value in weights(again).items():
        torch.testing.assert_close(value, weights(plain)[name], rtol=0, atol=1e-6)


def test_a_training_that_diverges_stops_before_its_weights_are_lost(run: Path) -> None:
    saved: list[int] = []
    trainer = make_trainer(run, save_every=1)
    with torch.no_grad():
        trainer.sam.mask_decoder.iou_prediction_head.layers[0].weight[0, 0] = float("nan")
    with pytest.raises(TrainingError, match="gradient of iteration 1 is not finite"):
        trainer.run(lambda state: saved.append(state.iteration), lambda line: None)
    assert not saved
    assert all(
        value.isfinite().all()
        for name, value in weights(trainer).items()
        if "iou_prediction" not in name
    )


def test_lower_layers_learn_more_slowly() -> None:
    sam = build_sam("vit_t")
    layers = layer_numbers(sam)
    assert layers["image_encoder.patch_embed.seq.0.c.weight"] == 0
    assert layers["image_encoder.layers.0.blocks.0.conv1.c.weight"] == 1
    assert layers["image_encoder.layers.1.blocks.0.attn.qkv.weight"] == 3
    assert layers["image_encoder.layers.0.downsample.conv1.c.weight"] == 2
    assert layers["image_encoder.neck.0.weight"] == max(layers.values()) == 13
    config = RetrainConfig(**{**OPTIONS, "layer_decay": 0.5, "weight_decay": 0.1})
    set_trainable(sam, config)
    optimizer = make_optimizer(sam, config)
    scales = {
        id(p): (g["scale"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]
    }
    named = dict(sam.named_parameters())
    of = lambda name: scales[id(named[name])]  # noqa: E731
    assert of("image_encoder.neck.0.weight") == (1.0, 0.1)
    assert of("image_encoder.layers.3.blocks.1.attn.qkv.weight") == (0.5, 0.1)
    assert of("image_encoder.patch_embed.seq.0.c.weight") == (0.5**13, 0.1)
    assert of("mask_decoder.iou_token.weight") == (1.0, 0.0)
    assert of("mask_decoder.transformer.norm_final_attn.weight") == (1.0, 0.0)
    assert not named["image_encoder.head.weight"].requires_grad


def test_the_papers_schedule() -> None:
    paper = RetrainConfig(data=("-",), out="-")
    assert rate(paper, 0) == pytest.approx(8e-4 / 250)
    assert rate(paper, 249) == rate(paper, 250) == rate(paper, 59_999) == pytest.approx(8e-4)
    assert rate(paper, 60_000) == pytest.approx(8e-5) and rate(paper, 86_666) == pytest.approx(8e-6)
    linear = RetrainConfig(
        data=("-",), out="-", schedule="linear", iterations=110, warmup=10, lr=1.0
    )
    assert [rate(linear, at) for at in (4, 10, 60, 109)] == pytest.approx([0.5, 1.0, 0.5, 0.01])


def record_validations(trainer: SamTrainer, scores: list[float]) -> dict[int, dict[str, Tensor]]:
    """Let validations find these scores; gives the weights that each of them was of, by iteration."""
    seen: dict[int, dict[str, Tensor]] = {}

    def measure() -> dict[str, float]:
        seen[trainer.state.iteration] = weights(trainer)
        return {MEAN: scores[trainer.state.iteration]}

    trainer.measure = measure  # type: ignore[method-assign]
    return seen


@pytest.mark.parametrize("stop", [None, 3])
def test_the_best_weights_are_kept(stop: int | None, run: Path, tmp_path: Path) -> None:
    options = {"keep": "best", "validation": 0.1, "validate_every": 1, "batch_size": 1}
    scores, paths = [0.5, 0.6, 0.8, 0.7, 0.3], RunPaths(tmp_path)
    trainer = make_trainer(
        run, Group(heard=lambda: 15 * (trainer.state.iteration == stop)), **options
    )
    seen = record_validations(trainer, scores)
    assert trainer.run(lambda state: save_state(paths, state), lambda line: None) == (
        15 if stop else 0
    )
    if stop:
        trainer = make_trainer(run, state=load_state(paths), **options)
        before, seen = seen, record_validations(trainer, scores)
        assert trainer.run(lambda state: None, lambda line: None) == 0
        seen |= before
    state, last = trainer.state, replace(trainer.config, keep="last")
    kept, newest = kept_weights(trainer.config, state), kept_weights(last, state)
    assert kept.keys() == newest.keys() == seen[2].keys()
    assert all(torch.equal(value, seen[2][name]) for name, value in kept.items())
    assert all(torch.equal(value, seen[4][name]) for name, value in newest.items())
    assert any(not torch.equal(value, newest[name]) for name, value in kept.items())
    told = validation_metrics(trainer.config, state, str)
    assert told == {"before": {MEAN: 0.5}, "after": {MEAN: 0.8}, "kept_iteration": 2}
    assert validation_metrics(last, state, str)["after"] == {MEAN: 0.3}


def moved(trainer: SamTrainer) -> list[list[Tensor]]:
    """By how much one run moves the weights, by group of the optimizer."""
    groups = [one["params"] for one in trainer.optimizer.param_groups]
    before = [[parameter.detach().clone() for parameter in group] for group in groups]
    assert trainer.run(lambda state: None, lambda line: None) == 0
    return [
        [(new.detach() - old).abs() for new, old in zip(group, ones, strict=True)]
        for group, ones in zip(groups, before, strict=True)
    ]


def test_the_gradient_is_clipped_to_its_largest_norm(run: Path) -> None:
    """A step of SGD is as long as the gradient, times the rate."""
    found = []
    for clip_norm in (None, 1e-3):
        trainer = make_trainer(run, iterations=1, warmup=0, lr=10.0, clip_norm=clip_norm)
        groups = [{"params": one["params"], "scale": 1.0} for one in trainer.optimizer.param_groups]
        trainer.optimizer = torch.optim.SGD(groups, lr=10.0)  # type: ignore[assignment]
        steps = [step for group in moved(trainer) for step in group]
        found.append(
            float(torch.stack([step.double().square().sum() for step in steps]).sum().sqrt())
        )
    free, clipped = found
    assert free > 0.1 and clipped == pytest.approx(10.0 * 1e-3, rel=0.01)


def test_a_step_has_the_rate_of_each_layer(run: Path) -> None:
    """The first step of AdamW moves a weight by its rate, whatever its gradient."""
    trainer = make_trainer(
        run, iterations=1, layer_decay=0.5, weight_decay=0.0, dropout=0.0, drop_path=0.0
    )
    steps = moved(trainer)
    lr = rate(trainer.config, 0)
    assert lr == pytest.approx(5e-4)  # of warm-up
    scales = set()
    for group, step in zip(trainer.optimizer.param_groups, steps, strict=True):
        assert group["lr"] == pytest.approx(lr * group["scale"])
        largest = max(float(one.max()) for one in step)
        assert largest == pytest.approx(lr * group["scale"], rel=0.01)
        scales.add(group["scale"])
    assert scales == {1.0, 0.5, 0.25, 0.125}


def test_bfloat16_is_of_the_encoder_and_the_decoder(run: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 255, (96, SIDE, 3), np.uint8)
    with torch.no_grad():
        exact, rough = (encode(small_sam(), pixels, name) for name in ("fp32", "bf16"))
    assert rough.dtype == exact.dtype == torch.float32
    assert 0 < float((rough - exact).abs().max()) < 0.1 * float(exact.abs().max())
    config = RetrainConfig(**OPTIONS, precision="bf16")
    assert simulation_of(config, torch.device("cpu")).bf16
    assert not simulation_of(RetrainConfig(**OPTIONS), torch.device("cpu")).bf16
