"""Runs a stage over a folder of images: in this process, or on Ray.

What a worker does is in `worker.py`, the pool on Ray in `ray_pool.py`, what a run leaves on disk in
`run_dir.py` and `shards.py`. Ray is imported when there is work for it.
"""

import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from sa_engine import ray_pool, run_dir
from sa_engine.clearing import check_clearable, clear_run
from sa_engine.lock import RunLock
from sa_engine.option_groups import RunConfig
from sa_engine.partial import PartialShard, list_begun
from sa_engine.pipeline import SkipImage, Stage, StageWorker, WorkerSpec
from sa_engine.plan import Plan, read_plan, shard_name
from sa_engine.progress import Interrupted, Progress, StopSignal, stop_on_signals, this_command
from sa_engine.report import PlanSummary, Report, check_failures, make_report
from sa_engine.resources import (
    Resources,
    check_disk,
    disk_space,
    local_resources,
    settle_resources,
    this_machine,
    worker_memory,
)
from sa_engine.run_dir import PlannedRun, images_folder, open_run, plan_run
from sa_engine.shards import ShardStats, committed_shards, read_markers
from sa_engine.storage import RunError, RunPaths, sweep, told_if_output_fails
from sa_engine.tree import building, is_unswept
from sa_engine.worker import ShardWorker

__all__ = [
    "RESUME",
    "PlanSummary",
    "Report",
    "SkipImage",
    "Stage",
    "StageWorker",
    "Start",
    "describe",
    "run",
]


@dataclass(frozen=True, kw_only=True)
class Start:
    """What a start of a run does besides going on with it.

    Attributes:
        extend: plan the images that have come since, in shards of their own.
        retry_failed: try failed images again, as their files are now.
        overwrite: remove the run that is there, and start over.
        steal_lock: take the folder from whoever holds it.
    """

    extend: bool = False
    retry_failed: bool = False
    overwrite: bool = False
    steal_lock: bool = False

    def __post_init__(self) -> None:
        """Raise RunError for what contradicts itself."""
        if self.overwrite and (self.extend or self.retry_failed):
            raise RunError(
                "--overwrite starts over, --extend and --retry-failed go on: give one of them"
            )


RESUME = Start()


def describe(
    stage: Stage,
    config: RunConfig,
    start: Start = RESUME,
    identity: Callable[[], Mapping[str, str]] = dict,
) -> PlanSummary:
    """Plan a run, or read the plan of one that is there; writes nothing and starts nothing.

    `identity` is that of `run`, as far as it can be had without fetching anything. Raises RunError for what `run` would
    refuse before it starts.
    """
    paths = _paths(config)
    planned = _plan(paths, stage, config, start)
    chosen = planned.plan.select(config.limit)
    markers = {} if start.overwrite else read_markers(paths, range(len(planned.plan)))
    retried = [index for index in chosen if index in markers and markers[index].failed]
    retried = retried if start.retry_failed else []
    todo = [index for index in chosen if index not in markers]
    if todo or retried:
        model = identity()
        if planned.info is not None:
            run_dir.check_same(paths, planned.info.model, model)
    return PlanSummary(
        images=images_folder(config),
        out=paths.out,
        planned=planned.plan.images,
        added=planned.added,
        chosen=planned.plan.count(chosen),
        shards=len(planned.plan),
        committed=len(markers),
        retried=sum(markers[index].failed for index in retried),
        shard_size=planned.shard_size,
        ignored=planned.ignored,
        resources=_describe_machine(stage, config, _threads(planned)),
        disk=disk_space(paths, planned.plan, [*todo, *retried], config),
    )


def run(
    stage: Stage,
    config: RunConfig,
    identity: Callable[[], Mapping[str, str]],
    start: Start = RESUME,
) -> Report:
    """Run a stage over `config.images` into `config.out`, or go on with the run that is there.

    Args:
        stage: what to do with each image.
        config: its options.
        identity: called only if there is work: what besides the options decides the bytes, such as
            the model's fingerprint. A resume must have the same.
        start: what else to do.

    Returns:
        The sums over the whole run; a finished run's at once, without torch or Ray, unless its checkpoint has
        another name now and must be looked at.

    Raises:
        RunError: the run cannot start or go on.
        TooManyFailures: it is finished, but more images failed than `config.max_failed` allows.
        Interrupted: SIGINT or SIGTERM.
    """
    paths = _paths(config)
    try:
        with told_if_output_fails(paths), stop_on_signals():
            return _run(paths, stage, config, identity, start)
    except StopSignal as stop:
        raise Interrupted(_stopped(paths, config), stop.signum) from None


def _run(
    paths: RunPaths,
    stage: Stage,
    config: RunConfig,
    identity: Callable[[], Mapping[str, str]],
    start: Start,
) -> Report:
    began = time.monotonic()
    planned = None if start.overwrite else open_run(paths, stage.name, config)
    processed = 0
    if (
        start != RESUME
        or planned is None
        or _todo(paths, planned.plan, config, start)
        or is_unswept(paths)
    ):
        planned, processed = _work(paths, stage, config, identity, start)
    elif planned.info is not None and run_dir.is_other_checkpoint(planned.info, config):
        run_dir.check_same(paths, planned.info.model, identity())
    chosen = planned.plan.select(config.limit)
    report = make_report(
        paths,
        read_markers(paths, chosen).values(),
        planned=planned.plan.count(chosen),
        remaining=planned.plan.images - planned.plan.count(chosen),
        processed=processed,
        seconds=time.monotonic() - began,
        ignored=planned.ignored,
    )
    check_failures(report, config.max_failed)
    return report


def _work(
    paths: RunPaths,
    stage: Stage,
    config: RunConfig,
    identity: Callable[[], Mapping[str, str]],
    start: Start,
) -> tuple[PlannedRun, int]:
    """Do what is left of a run; return its plan and how many images were worked on."""
    session = uuid.uuid4().hex
    with RunLock(paths, session, start.steal_lock) as lock:
        planned = _plan(paths, stage, config, start)
        sweep(paths.scratch)  # not before it is known to be a run's
        todo = [] if start.overwrite else _todo(paths, planned.plan, config, start)
        if not (todo or start.overwrite):  # another process has just finished it, or nothing is new
            if planned.info is not None:
                run_dir.continue_run(paths, planned)
            with building(paths):  # which ends in its being swept
                return planned, 0
        if start.overwrite:
            todo = list(planned.plan.select(config.limit))
        check_disk(paths, disk_space(paths, planned.plan, todo, config))
        with _machine(stage, config, _threads(planned)) as resources:
            model = identity()
            planned = _begin(paths, stage, config, start, planned, todo, resources, model)
            spec = WorkerSpec(
                stage=stage,
                config=config,
                images=images_folder(config),
                paths=paths,
                session=session,
                threads=resources.threads,
                retry_failed=start.retry_failed,
                is_driver=config.local,
            )
            with building(paths):
                return planned, _run_shards(spec, planned.plan, todo, resources, lock)


def _begin(
    paths: RunPaths,
    stage: Stage,
    config: RunConfig,
    start: Start,
    planned: PlannedRun,
    todo: Sequence[int],
    resources: Resources,
    model: Mapping[str, str],
) -> PlannedRun:
    """Make a plan binding, now that nothing stands in its way any more."""
    if start.overwrite:
        clear_run(paths)
    if planned.info is None:
        run_dir.start_run(paths, stage.name, config, planned, resources, model)
        return planned
    run_dir.check_same(paths, planned.info.model, model)
    run_dir.continue_run(paths, planned)
    committed = committed_shards(paths)
    names = {shard_name(index) for index in committed}
    for name in list_begun(paths):
        if name in names:
            sweep(paths.partial / name)  # its worker was killed between its commit and its clean-up
    return run_dir.refresh_failed(paths, config, planned, committed.intersection(todo))


def _run_shards(
    spec: WorkerSpec, plan: Plan, todo: Sequence[int], resources: Resources, lock: RunLock
) -> int:
    """Commit shards; return how many images were worked on."""
    paths, config = spec.paths, spec.config
    unfinished = {shard_name(index): plan.count([index]) for index in todo}
    reused = sum(len(PartialShard(paths, n).ended()) for n in list_begun(paths) if n in unfinished)
    reused += sum(s.planned - s.failed for s in read_markers(paths, todo).values())
    committed = plan.count(plan.select(config.limit)) - sum(unfinished.values())
    with Progress(paths, unfinished, committed, lock.tell) as progress:
        run_all = _run_here if config.local else ray_pool.run_on_ray
        for stats in run_all(spec, todo, resources):
            progress.commit(stats.name)
    return sum(unfinished.values()) - reused


def _run_here(
    spec: WorkerSpec, shards: Sequence[int], resources: Resources
) -> Iterator[ShardStats]:
    """Commit shards one after another in this process."""
    worker, plan = ShardWorker(spec), read_plan(spec.paths.plan)
    for index in shards:
        yield worker.run(plan[index])


@contextmanager
def _machine(stage: Stage, config: RunConfig, threads: int | None) -> Iterator[Resources]:
    """Start or join Ray, unless the run is local, and settle what each worker gets.

    `threads` is what the run has been started with, if it has. Raises RunError if Ray cannot be
    reached or is too small.
    """
    memory = worker_memory(config, stage.worker_memory(config))
    threads = config.threads_per_worker or threads
    if config.local:
        yield local_resources(config, threads, memory)
        return
    with ray_pool.cluster(config):
        yield ray_pool.wait_for_resources(config, threads, memory)


def _describe_machine(stage: Stage, config: RunConfig, threads: int | None) -> Resources:
    """What each worker will get, without starting a Ray of our own."""
    if config.local or ray_pool.cluster_address(config):
        with _machine(stage, config, threads) as resources:
            return resources
    memory = worker_memory(config, stage.worker_memory(config))
    return settle_resources([this_machine()], config, config.threads_per_worker or threads, memory)


def _plan(paths: RunPaths, stage: Stage, config: RunConfig, start: Start) -> PlannedRun:
    """The plan of the run that is there, extended if asked for, or of a new one; writes nothing."""
    if start.overwrite:
        check_clearable(paths)
        return plan_run(paths, config)
    planned = open_run(paths, stage.name, config)
    if planned is None:
        return plan_run(paths, config)
    return run_dir.extend_plan(paths, config, planned) if start.extend else planned


def _paths(config: RunConfig) -> RunPaths:
    return run_dir.run_paths(config)


def _threads(planned: PlannedRun) -> int | None:
    return planned.info.identity["threads_per_worker"] if planned.info else None


def _todo(paths: RunPaths, plan: Plan, config: RunConfig, start: Start) -> list[int]:
    """Shards within `limit` that are not committed, or that have failed images to retry."""
    chosen = plan.select(config.limit)
    if not start.retry_failed:
        committed = committed_shards(paths)
        return [index for index in chosen if index not in committed]
    markers = read_markers(paths, chosen)
    return [index for index in chosen if index not in markers or markers[index].failed]


def _stopped(paths: RunPaths, config: RunConfig) -> str:
    if not paths.info.exists():
        return "stopped before the run was planned; nothing is written"
    chosen = read_plan(paths.plan).select(config.limit)
    done = len(committed_shards(paths).intersection(chosen))
    return f"stopped: {done} of {len(chosen)} shards done; resume with: {this_command()}"
