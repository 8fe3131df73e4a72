"""Training between rounds (paper §4, §A): SAM learns from the masks just collected, and becomes the next round's model.

Each mask is prompted as an annotator would, with a point or a box and then with corrections, for eleven steps in the
paper; focal and dice loss of the best of three masks, and the error of the predicted IoU, train the model by AdamW.
``sa_engine/training/`` does that; this stage plans a round, runs the workers, and writes what they made.
"""

import uuid
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sa_engine.config import ConfigError, identity_values, to_dict
from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.run import short_names
from sa_engine.holdout import read_holdout
from sa_engine.lock import RunLock
from sa_engine.modeling.sam import Sam, load_sam, model_fingerprint, select_device
from sa_engine.modeling.weights import resolve
from sa_engine.progress import Interrupted, StopSignal, this_command
from sa_engine.resources import cores
from sa_engine.rounds import (
    INFO,
    MIOU,
    RoundInfo,
    Verdict,
    model_facts,
    write_model,
)
from sa_engine.rounds import TrainingData as TrainedOn
from sa_engine.run_dir import RunInfo, check_same, read_info
from sa_engine.storage import (
    RunError,
    RunPaths,
    atomic_write,
    list_names,
    location,
    sweep,
    told_if_output_fails,
)
from sa_engine.training import gate
from sa_engine.training.calibrate import Calibration, calibrate
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.loop import masks_per_decode
from sa_engine.training.memory import estimate, free_memory
from sa_engine.training.modes import set_trainable
from sa_engine.training.parallel import run_workers
from sa_engine.training.plots import plot_curves
from sa_engine.training.report import Plan, RoundReport, round_paths
from sa_engine.training.state import TrainingState, load_state, state_path
from sa_engine.training.validation import BOX, MEAN
from sa_engine.training.worker import METRICS, Job, first_model, read_metrics, work

CURVES = "curves.png"
CALIBRATION_IMAGES, CALIBRATION_MASKS = 24, 16
_OURS = ("model.safetensors", INFO, METRICS, CURVES, "_run")


def plan(config: RetrainConfig, overwrite: bool = False) -> Plan:
    """Look at everything that a round needs; writes nothing.

    Raises:
        SaEngineError: no such data, model, device or folder, or another round in it.
    """
    device = select_device(config.device)
    paths = round_paths(config)
    strangers = sorted(name for name in list_names(paths.out) if name not in _OURS)
    if strangers:
        raise RunError(
            f"output {paths.out} holds {strangers[0]}, which is no part of a round: --out takes a new "
            "or empty folder, or that of a round to go on with"
        )
    data = TrainingData.open(
        [location(one) for one in config.data],
        max_mask_coverage=config.max_mask_coverage,
        oversample=config.source_weights(),
        repeat=config.repeat,
        validation=config.validation,
        seed=config.seed,
    )
    if config.validation and not data.validation_sets():
        raise ConfigError("validation leaves no image to measure on: there is only one photo")
    sam, parent = first_model(config)
    set_trainable(sam, config)
    memory = estimate(
        sam,
        masks_per_image=config.max_masks,
        masks_per_decode=masks_per_decode(config, device),
        loss_size=config.loss_size,
        checkpointing=config.gradient_checkpointing,
        bf16=config.precision == "bf16",
    )
    sizes = [(p.requires_grad, p.numel()) for p in sam.parameters()]
    here = config.num_workers if device.type == "cpu" else 1
    found = Plan(
        config,
        paths,
        data,
        parent,
        model_fingerprint(sam),
        _gate_sets(config),
        (sum(size for trained, size in sizes if trained), sum(size for _, size in sizes)),
        memory,
        memory.shortage(free_memory(device), here),
    )
    if overwrite or not paths.info.exists():
        return found
    check_same(paths, read_info(paths).identity, _identity(found))
    state = load_state(paths)
    return found if state is None else replace(found, done=state.iteration)


def run(planned: Plan, overwrite: bool = False, steal_lock: bool = False) -> RoundReport:
    """Train a planned round, or go on with it.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved.
        SaEngineError: another process trains it, or its output cannot be written.
    """
    config, paths = planned.config, planned.paths
    with (
        told_if_output_fails(paths),
        RunLock(paths, uuid.uuid4().hex, steal_lock),
    ):
        if overwrite:
            _clear(paths)
        if not paths.info.exists():
            _start(planned)
        job = Job(config, paths, planned.data, planned.fingerprint)
        try:
            signum = _train(config, job)
        except StopSignal as stop:  # a second one: what was saved last is kept
            raise Interrupted(
                f"stopped at once; go on with: {this_command()}", stop.signum
            ) from None
        state = load_state(paths)
        assert state is not None, "workers save their state before they end"
        if signum:
            raise Interrupted(
                f"stopped after {state.iteration} of {config.iterations} iterations; go on with: "
                f"{this_command()}",
                signum,
            )
        torch.set_num_threads(cores())
        info = _finish(planned, state)
        for leftover in (paths.scratch, paths.run / "embeddings"):
            sweep(leftover)
        state_path(paths).unlink(missing_ok=True)
    return RoundReport(paths, info)


def _train(config: RetrainConfig, job: Job) -> int:
    """Run the workers, here or on Ray; gives the number of the signal that ended them, 0 if none did."""
    if config.ray or config.ray_address:
        from sa_engine.training.ray_train import run_on_ray

        return run_on_ray(
            work,
            job,
            num_workers=config.num_workers,
            threads=config.threads_per_worker,
            device=config.device,
            gpus_per_worker=config.gpus_per_worker,
            ray_address=config.ray_address,
        )
    return run_workers(
        work,
        job,
        num_workers=config.num_workers,
        threads=config.threads_per_worker or max(1, cores() // config.num_workers),
        device=config.device,
    )


def _identity(planned: Plan) -> dict[str, object]:
    """What decides a round's weights."""
    return {
        **identity_values(planned.config),
        "data_fingerprint": planned.data.fingerprint,
        "init_fingerprint": planned.fingerprint,
    }


def _start(planned: Plan) -> None:
    """Write `run.json`, which makes the plan binding."""
    from sa_engine import __version__
    from sa_engine.options import fingerprint

    config = planned.config
    RunInfo(
        version=__version__,
        stage="retrain",
        config={**to_dict(config), "out": str(planned.paths.out)},
        identity=_identity(planned),
        model={"init_fingerprint": planned.fingerprint},
        fingerprint=fingerprint(config),
        ignored={},
    ).write(planned.paths)


def _finish(planned: Plan, state: TrainingState) -> RoundInfo:
    """Choose the weights, judge them, and write the round."""
    config, paths = planned.config, planned.paths
    sam, parent = first_model(config)
    kept = state.best if config.keep == "best" else None
    sam.load_state_dict(state.model if kept is None else kept[1])
    metrics = _validation_metrics(config, state)
    if config.calibrate_iou:
        metrics["iou_calibration"] = _calibrate(planned, sam).to_dict()
    info = RoundInfo(
        **model_facts(sam),
        parent=parent,
        data=_trained_on(planned.data),
        config=to_dict(config),
        iterations=state.iteration,
        seconds=state.seconds,
        metrics=metrics,
        gate=_judge(planned, sam) if planned.gate else None,
    )
    atomic_write(paths.out / CURVES, plot_curves(read_metrics(paths)))
    write_model(Path(config.out), sam, info)
    return info


def _calibrate(planned: Plan, sam: Sam) -> Calibration:
    """Put the new model's predicted IoUs on the scale of the one it started from, on images of the training."""
    config, data = planned.config, planned.data
    device = select_device(config.device)
    rng = np.random.default_rng(config.seed)
    drawn = rng.permutation(len(data))[:CALIBRATION_IMAGES].tolist()
    samples = (data.load(index, rng, max_masks=CALIBRATION_MASKS) for index in drawn)
    used = (sample for sample in samples if sample is not None)
    parent = load_sam(resolve(config.init), device)
    done = calibrate(sam.to(device), parent, used, config.precision)
    sam.cpu()
    return done


def _judge(planned: Plan, sam: Sam) -> Verdict:
    """Measure the new model and the one it started from on the gate's images."""
    config = planned.config
    device = select_device(config.device)
    parent = load_sam(resolve(config.init), device)
    before, after = (
        gate.measure(
            model.to(device), planned.gate, images=config.gate_images, precision=config.precision
        )
        for model in (parent, sam)
    )
    sam.cpu()
    return gate.judge(before, after, config.gate_miou_margin, config.gate_masks_margin)


def _gate_sets(config: RetrainConfig) -> tuple[DataSet, ...]:
    """The gate's data sets: of a run with held-out images these, of another all; never what is trained on."""
    places = [location(one) for one in config.gate]
    trained = {str(location(one)) for one in config.data}
    found = []
    for name, place in zip(short_names([str(one) for one in places]), places, strict=True):
        held_out = read_holdout(place) is not None
        if str(place) in trained and not held_out:
            raise ConfigError(
                f"gate {place} is trained on: name another run, or hold images out of it with "
                f"`sa-engine split {place} --holdout N`"
            )
        found.append(open_data(place, name, "holdout" if held_out else "all"))
    return tuple(found)


def _clear(paths: RunPaths) -> None:
    """Remove a round with all it has made, but for the lock that is held."""
    for name in (INFO, "model.safetensors", METRICS, CURVES):
        (paths.out / name).unlink(missing_ok=True)
    for name in ("run.json", "state.pt"):
        (paths.run / name).unlink(missing_ok=True)
    for folder in (paths.run / "embeddings", paths.run / "tensorboard"):
        sweep(folder)


def _validation_metrics(config: RetrainConfig, state: TrainingState) -> dict[str, object]:
    """What validation measured before, and of the weights that are kept."""
    if not state.validations:
        return {}
    kept = state.best[0] if config.keep == "best" and state.best is not None else state.iteration
    found = {int(one["iteration"]): one for one in state.validations}
    before, after = (_named(found[iteration]) for iteration in (0, kept))
    return {"before": before, "after": after, "kept_iteration": kept}


def _named(validation: dict[str, float]) -> dict[str, float]:
    names = {MEAN: MIOU, BOX: "miou_box"}
    return {
        names.get(name, f"{MIOU} {name}"): value
        for name, value in validation.items()
        if name != "iteration"
    }


def _trained_on(data: TrainingData) -> tuple[TrainedOn, ...]:
    """What `model.json` says of the data."""
    return tuple(
        TrainedOn(
            run=one.out,
            name=one.name,
            fingerprint=one.fingerprint,
            images=one.images,
            masks=one.masks,
            left_out={"large": one.large_masks, "empty": one.empty_masks},
        )
        for one in data.runs
    )
