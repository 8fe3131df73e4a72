"""Runs a stage over a folder of images: in this process, or on Ray.

On Ray one row is one shard: paths and statistics cross it, pictures never do. What a worker does
is in `worker.py`, what a run leaves on disk in `run_dir.py` and `shards.py`. Ray is imported when
there is work for it.
"""

import json
import logging
import os
import re
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sa_engine.config import RunConfig
from sa_engine.errors import SaEngineError
from sa_engine.plan import PlannedImage, Shard
from sa_engine.progress import Interrupted, Progress, StopSignal, stop_on_signals, this_command
from sa_engine.report import PlanSummary, Report, check_failures, make_report
from sa_engine.resources import Resources, settle_resources
from sa_engine.run_dir import (
    PlannedRun,
    check_same,
    images_folder,
    open_run,
    plan_run,
    start_run,
)
from sa_engine.shards import ShardStats, read_markers
from sa_engine.storage import RunError, RunLock, RunPaths, sweep
from sa_engine.worker import ShardWorker, SkipImage, Stage, StageWorker, WorkerSpec

__all__ = ["PlanSummary", "Report", "SkipImage", "Stage", "StageWorker", "describe", "run"]


def describe(stage: Stage, config: RunConfig) -> PlanSummary:
    """Plan a run, or read the plan of one that is there; writes nothing.

    Raises RunError for what `run` would refuse before it starts.
    """
    paths = _paths(config)
    planned = open_run(paths, stage.name, config) or plan_run(paths, config)
    return PlanSummary(
        images=images_folder(config),
        out=paths.out,
        planned=_count(planned.shards),
        chosen=_count(planned.select(config.limit)),
        shards=len(planned.shards),
        committed=len(read_markers(paths, planned.shards)),
        shard_size=planned.shard_size,
        ignored=planned.ignored,
    )


def run(stage: Stage, config: RunConfig, identity: Callable[[], Mapping[str, str]]) -> Report:
    """Run a stage over `config.images` into `config.out`, or go on with the run that is there.

    Args:
        stage: what to do with each image.
        config: its options.
        identity: called only if there is work: what besides the options decides the bytes, such as
            the model's fingerprint. A resume must have the same.

    Returns:
        The sums over the whole run; a finished run's at once, without torch or Ray.

    Raises:
        RunError: the run cannot start or go on.
        TooManyFailures: it is finished, but more images failed than `config.max_failed` allows.
        Interrupted: SIGINT or SIGTERM.
    """
    start = time.monotonic()
    paths = _paths(config)
    planned = open_run(paths, stage.name, config)
    processed = 0
    if planned is None or _todo(paths, planned, config):
        try:
            with stop_on_signals():
                planned, processed = _work(paths, stage, config, identity)
        except StopSignal as stop:
            raise Interrupted(_stopped(paths, stage, config), stop.signum) from None
    chosen = planned.select(config.limit)
    report = make_report(
        paths,
        read_markers(paths, chosen).values(),
        planned=_count(chosen),
        remaining=_count(planned.shards) - _count(chosen),
        processed=processed,
        seconds=time.monotonic() - start,
    )
    check_failures(report, config.max_failed)
    return report


def _work(
    paths: RunPaths, stage: Stage, config: RunConfig, identity: Callable[[], Mapping[str, str]]
) -> tuple[PlannedRun, int]:
    """Do what is left of a run; return its plan and how many images were worked on."""
    session = uuid.uuid4().hex
    with RunLock(paths, session):
        sweep(paths.scratch)
        planned = open_run(paths, stage.name, config) or plan_run(paths, config)
        todo = _todo(paths, planned, config)
        if not todo:  # another process has just finished it
            return planned, 0
        threads = planned.info.identity["threads_per_worker"] if planned.info else None
        with _machine(config, threads) as resources:
            model = identity()
            if planned.info is None:
                start_run(paths, stage.name, config, planned, resources, model)
            else:
                check_same(paths, planned.info.model, model)
            images = images_folder(config)
            spec = WorkerSpec(stage, config, images, paths, session, resources.threads)
            committed = _count(planned.select(config.limit)) - _count(todo)
            with Progress(paths, todo, committed) as progress:
                for stats in _run_shards(spec, todo, resources):
                    progress.commit(stats.name, stats.planned)
    return planned, _count(todo) - progress.reused


def _run_shards(
    spec: WorkerSpec, shards: Sequence[Shard], resources: Resources
) -> Iterator[ShardStats]:
    """Commit shards, in any order."""
    if not spec.config.local:
        yield from _run_on_ray(spec, shards, resources)
        return
    worker = ShardWorker(spec)
    for shard in shards:
        yield worker.run(shard)


def _run_on_ray(
    spec: WorkerSpec, shards: Sequence[Shard], resources: Resources
) -> Iterator[ShardStats]:
    """Commit shards on a fixed pool of actors, one row per shard."""
    import ray.data

    if not spec.config.verbose:
        # What goes wrong is raised; Ray Data would print it twice more, with its own traceback.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    dataset = ray.data.from_items(
        [{"shard": _shard_to_json(shard)} for shard in shards], override_num_blocks=len(shards)
    ).map_batches(
        _RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.workers, len(shards)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=resources.threads,
        num_gpus=resources.gpus or None,
        fn_constructor_kwargs={"spec": spec},
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = spec.config.verbose
    # Ray would give up after half an hour without a row; a shard may take longer.
    dataset.context.execution_no_progress_timeout_s = -1
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                raise RunError(row["error"])
            yield ShardStats.from_json(row["stats"])
    except ray.exceptions.ActorDiedError as error:
        missing = re.search(r"No module named '[^']+'", str(error))
        if missing is None:
            raise
        raise RunError(
            f"a Ray worker cannot start: {missing[0]} on its machine; install the same sa-engine "
            "on every machine of the cluster, in the environment that `ray start` runs in"
        ) from None


class _RayWorker:
    """A `ShardWorker` as Ray Data calls it: with a batch of one row."""

    def __init__(self, spec: WorkerSpec) -> None:
        self._worker = ShardWorker(spec)

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        try:
            stats = self._worker.run(_shard_from_json(batch["shard"][0]))
        except SaEngineError as error:  # as a row: Ray would wrap it into a page of traceback
            return {"stats": [""], "error": [str(error)]}
        return {"stats": [stats.to_json()], "error": [""]}


@contextmanager
def _machine(config: RunConfig, threads: int | None) -> Iterator[Resources]:
    """Start or join Ray, unless the run is local, and settle what each worker gets.

    `threads` is what the run has been started with, if it has. Raises RunError if Ray cannot be
    reached or is too small.
    """
    threads = config.threads_per_worker or threads
    if config.local:
        if (config.num_workers or 1) > 1:
            raise RunError(
                f"num_workers = {config.num_workers} with --local: this process is one worker; "
                "leave out --local to have more"
            )
        yield Resources(1, threads or _cores(), 0)
        return
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    # Ray gives its workers the lowest priority; one other busy process then stops a worker's threads
    # from meeting, and a run takes many times as long.
    os.environ.setdefault("RAY_worker_niceness", "0")
    if not config.verbose:
        # Otherwise Ray's core prints a harmless error for every pool of actors (Ray issue 53727).
        os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    import ray

    ours = not ray.is_initialized()
    if ours:
        try:
            ray.init(
                address=config.ray_address,
                include_dashboard=False,
                log_to_driver=config.verbose,
                logging_level=logging.INFO if config.verbose else logging.ERROR,
            )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = config.ray_address or "this machine"
            raise RunError(f"cannot start or join Ray at {where}: {error}") from None
    try:
        with stop_on_signals():  # once more: ray.init has put its own handler in place
            nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
            sizes = [(int(node.get("CPU", 0)), float(node.get("GPU", 0))) for node in nodes]
            yield settle_resources(sizes, config, threads)
    finally:
        if ours:
            ray.shutdown()


def _paths(config: RunConfig) -> RunPaths:
    return RunPaths(Path(config.out).absolute())


def _todo(paths: RunPaths, planned: PlannedRun, config: RunConfig) -> list[Shard]:
    chosen = planned.select(config.limit)
    markers = read_markers(paths, chosen)
    return [shard for shard in chosen if shard.name not in markers]


def _stopped(paths: RunPaths, stage: Stage, config: RunConfig) -> str:
    planned = open_run(paths, stage.name, config)
    if planned is None:
        return "stopped before the run was planned; nothing is written"
    chosen = planned.select(config.limit)
    done = len(read_markers(paths, chosen))
    return f"stopped: {done} of {len(chosen)} shards done; resume with: {this_command()}"


def _count(shards: Sequence[Shard]) -> int:
    return sum(len(shard.images) for shard in shards)


def _cores() -> int:
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


def _shard_to_json(shard: Shard) -> str:
    return json.dumps({"index": shard.index, "images": [vars(image) for image in shard.images]})


def _shard_from_json(text: str) -> Shard:
    content = json.loads(text)
    return Shard(content["index"], tuple(PlannedImage(**image) for image in content["images"]))
