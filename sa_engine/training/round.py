"""A round from its plan to its folder: what training a SAM and training a detector have in common."""

import uuid
from collections.abc import Callable

import torch

from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.run import short_names
from sa_engine.holdout import read_holdout
from sa_engine.lock import RunLock
from sa_engine.modeling.sam import select_device
from sa_engine.options import ConfigError
from sa_engine.progress import Interrupted, StopSignal, stop_on_signals, this_command
from sa_engine.resources import cores
from sa_engine.rounds import INFO, RoundInfo, read_round
from sa_engine.rounds import TrainingData as TrainedOn
from sa_engine.storage import (
    RunPaths,
    location,
    sweep,
    told_if_output_fails,
)
from sa_engine.training.config import RoundConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.folder import (
    check_strangers,
    clear,
    leftovers,
    remove_leftovers,
    start,
)
from sa_engine.training.parallel import run_workers
from sa_engine.training.report import Plan, RoundReport, round_paths
from sa_engine.training.state import TrainingState, load_state
from sa_engine.training.worker import Job, work


def open_round(config: RoundConfig) -> tuple[RunPaths, TrainingData]:
    """A round's folder and its data, looked at; nothing is written.

    Raises:
        SaEngineError: no such data, device or folder, or a folder that holds something else.
    """
    select_device(config.device)
    paths = round_paths(config)
    check_strangers(paths)
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
    if planned.finished and not any(place.exists() for place in leftovers(paths)):
        return RoundReport(paths, planned.finished)
    with (
        told_if_output_fails(paths),
        RunLock(paths, uuid.uuid4().hex, steal_lock),
    ):
        sweep(paths.scratch)
        if overwrite:
            clear(paths)
        elif (paths.out / INFO).exists():  # another process may have finished it since the plan
            remove_leftovers(paths)
            return RoundReport(paths, read_round(planned.out))
        if not paths.info.exists():
            start(planned)
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
        remove_leftovers(paths)
    return RoundReport(paths, info)


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
