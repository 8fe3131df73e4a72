"""A round from its plan to its folder: what training a SAM and training a detector have in common."""

import uuid
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.run import short_names
from sa_engine.holdout import read_holdout
from sa_engine.lock import RunLock
from sa_engine.modeling.sam import select_device
from sa_engine.options import ConfigError, identity_values, to_dict
from sa_engine.progress import Interrupted, StopSignal, stop_on_signals, this_command
from sa_engine.resources import cores
from sa_engine.rounds import INFO, WEIGHTS, RoundInfo, read_round
from sa_engine.rounds import TrainingData as TrainedOn
from sa_engine.run_dir import RunInfo, check_same, read_info
from sa_engine.storage import (
    AnyPath,
    RunError,
    RunPaths,
    list_names,
    location,
    sweep,
    told_if_output_fails,
)
from sa_engine.training.config import RoundConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.parallel import run_workers
from sa_engine.training.report import Plan, RoundReport, round_paths
from sa_engine.training.state import TrainingState, load_state, state_path
from sa_engine.training.worker import METRICS, Job, work

CURVES = "curves.png"
_OURS = (WEIGHTS, INFO, METRICS, CURVES, "_run")
_DATA, _INIT = "data_fingerprint", "init_fingerprint"


def open_round(config: RoundConfig) -> tuple[RunPaths, TrainingData]:
    """A round's folder and its data, looked at; nothing is written.

    Raises:
        SaEngineError: no such data, device or folder, or a folder that holds something else.
    """
    select_device(config.device)
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
        sources=config.sources,
        holdouts=[location(one) for one in config.gate],
        seed=config.seed,
    )
    if config.validation and not data.validation_sets():
        raise ConfigError(
            "validation leaves no image to measure on: expected two photos, one of them without empty masks"
        )
    return paths, data


def resumed(planned: Plan, overwrite: bool) -> Plan:
    """The plan, with what is done already. Raises RunError if another round is there."""
    paths = planned.paths
    there = (paths.out / INFO).exists()
    if overwrite or not (there or paths.info.exists()):
        return planned
    before, now = read_info(paths), _identity(planned)
    was = {"stage": before.stage, **before.identity}
    check_same(paths, was, {"stage": planned.stage, **identity_values(planned.config)})
    for what, key in (
        ("data (without what gates hold out)", _DATA),
        ("weights to start from", _INIT),
    ):
        if was.get(key) != now[key]:
            raise RunError(
                f"{paths.out} is of other {what}: {before.model.get(key, was.get(key))}; and now "
                f"{_told(planned)[key]}; put back what there was, use another --out, or start over with --overwrite"
            )
    if there:
        info = read_round(planned.out)
        _check_judged(planned, info)
        return replace(planned, done=info.iterations, finished=info)
    state = load_state(paths)
    return planned if state is None else replace(planned, done=state.iteration)


def _check_judged(planned: Plan, info: RoundInfo) -> None:
    """Raise RunError if a finished round was not judged on what the gate names now."""
    judged = {str(location(one)) for one in info.config.get("gate", ())}
    if late := [one for one in planned.config.gate if str(location(one)) not in judged]:
        raise RunError(
            f"{planned.paths.out} is finished, and was not judged on gate {late[0]}: train it again with "
            "--overwrite, or compare it with the model that it came from by `sa-engine evaluate`"
        )


def train_round(
    planned: Plan,
    job: Job,
    finish: Callable[[TrainingState], RoundInfo],
    overwrite: bool = False,
    steal_lock: bool = False,
) -> RoundReport:
    """Train a planned round, or go on with it.

    Args:
        planned: the round.
        job: what its workers do.
        finish: chooses the weights, judges and writes them.
        overwrite: remove the round that is there, and start over.
        steal_lock: take the folder from another process.

    Raises:
        Interrupted: SIGINT or SIGTERM; the state is saved.
        SaEngineError: another process trains it, or its output cannot be written.
    """
    config, paths = planned.config, planned.paths
    if planned.finished and not any(place.exists() for place in _leftovers(paths)):
        return RoundReport(paths, planned.finished)
    with (
        told_if_output_fails(paths),
        RunLock(paths, uuid.uuid4().hex, steal_lock),
    ):
        sweep(paths.scratch)
        if overwrite:
            _clear(paths)
        elif (paths.out / INFO).exists():  # another process may have finished it since the plan
            _remove_leftovers(paths)
            return RoundReport(paths, read_round(planned.out))
        if not paths.info.exists():
            _start(planned)
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
        torch.set_num_threads(config.threads_per_worker or cores())
        try:
            with stop_on_signals():
                info = finish(state)
        except StopSignal as stop:
            raise Interrupted(
                f"all {state.iteration} iterations are done, and the round is not written yet; go on with: "
                f"{this_command()}",
                stop.signum,
            ) from None
        _remove_leftovers(paths)
    return RoundReport(paths, info)


def _leftovers(paths: RunPaths) -> tuple[AnyPath, ...]:
    """What a training needs and a finished round does not."""
    return paths.scratch, paths.run / "embeddings", state_path(paths)


def _remove_leftovers(paths: RunPaths) -> None:
    *folders, state = _leftovers(paths)
    for folder in folders:
        sweep(folder)
    state.unlink(missing_ok=True)


def _train(config: RoundConfig, job: Job) -> int:
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
        _DATA: planned.data.fingerprint,
        _INIT: planned.fingerprint,
    }


def _told(planned: Plan) -> dict[str, str]:
    """The fingerprints of `_identity` as a person knows what they are of."""
    runs = (
        f"{one.out} ({one.images} images, {one.masks} masks, {one.fingerprint[:8]})"
        for one in planned.data.runs
    )
    return {_DATA: ", ".join(runs), _INIT: f"{planned.parent.name} ({planned.fingerprint[:12]})"}


def stated(planned: Plan) -> dict[str, Any]:
    """All options of a round, for its files; where its runs are is told so that it holds from any folder."""
    config = planned.config
    places = {
        name: [str(location(one)) for one in getattr(config, name)] for name in ("data", "gate")
    }
    return {**to_dict(config), **places, "out": str(planned.paths.out)}


def _start(planned: Plan) -> None:
    """Write `run.json`, which makes the plan binding."""
    from sa_engine import __version__
    from sa_engine.options import fingerprint

    RunInfo(
        version=__version__,
        stage=planned.stage,
        config=stated(planned),
        identity=_identity(planned),
        model=_told(planned),
        fingerprint=fingerprint(planned.config),
        ignored={},
    ).write(planned.paths)


def gate_sets(config: RoundConfig, data: TrainingData) -> tuple[DataSet, ...]:
    """The gate's data sets: of a run with held-out images these, of another all.

    Photos that are trained or validated on are left out, by their content, whatever run they lie in.

    Raises:
        ConfigError: a run that is trained on, or of which nothing is left.
        SaEngineError: no such run, no masks there, or a mask without pixels.
    """
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
        split = "holdout" if held_out else "all"
        found.append(open_data(place, name, split, leave_out=data.has_photo))
        if not found[-1].image_ids:
            raise ConfigError(
                f"gate {place} has no photo that is not trained or validated on: copies of all its "
                f"{found[-1].left_out} images with masks are in --data; name a run of other photos, or hold some out "
                f"with `sa-engine split {place} --holdout N`"
            )
    return tuple(found)


def _clear(paths: RunPaths) -> None:
    """Remove a round with all it has made, but for the lock that is held."""
    for name in (INFO, WEIGHTS, METRICS, CURVES):
        (paths.out / name).unlink(missing_ok=True)
    for name in ("run.json", "state.pt"):
        (paths.run / name).unlink(missing_ok=True)
    for folder in (paths.run / "embeddings", paths.run / "tensorboard"):
        sweep(folder)


def kept_weights(config: RoundConfig, state: TrainingState) -> dict[str, torch.Tensor]:
    """The state dict that a round keeps: the last, or that of the best validation."""
    return state.best[1] if config.keep == "best" and state.best is not None else state.model


def validation_metrics(
    config: RoundConfig, state: TrainingState, named: Callable[[str], str]
) -> dict[str, object]:
    """What validation measured before, and of the weights that are kept; `named` gives a figure's key."""
    if not state.validations:
        return {}
    kept = state.best[0] if config.keep == "best" and state.best is not None else state.iteration
    found = {int(one["iteration"]): one for one in state.validations}
    before, after = (
        {named(name): value for name, value in found[at].items() if name != "iteration"}
        for at in (0, kept)
    )
    return {"before": before, "after": after, "kept_iteration": kept}


def trained_on(data: TrainingData) -> tuple[TrainedOn, ...]:
    """What `model.json` says of the data."""
    return tuple(
        TrainedOn(
            run=one.out,
            name=one.name,
            fingerprint=one.fingerprint,
            images=one.images,
            masks=one.masks,
            left_out={
                "large": one.large_masks,
                "empty": one.empty_masks,
                "other sources": one.other_masks,
            },
        )
        for one in data.runs
    )
