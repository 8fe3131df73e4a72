"""How many workers a run has, what each of them gets, and whether that is there."""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import psutil

from sa_engine.option_groups import RunConfig
from sa_engine.plan import Plan
from sa_engine.storage import RunError, RunPaths

_CORES_PER_WORKER = 4
# Of a photo's size, at least this much comes out as a released image: a seventh, and never more than
# 300 kB (docs/scale.md, "On disk").
_LEAST_SHARE_WRITTEN = 0.15
_LEAST_WRITTEN_CAP = 300_000
_CGROUP_MEMORY = "/sys/fs/cgroup/memory.max"


class ClusterOptions(Protocol):
    """The options of :class:`RunConfig` that decide about Ray and the workers on it."""

    @property
    def ray_address(self) -> str | None: ...
    @property
    def num_workers(self) -> int | None: ...
    @property
    def threads_per_worker(self) -> int | None: ...
    @property
    def gpus_per_worker(self) -> float | None: ...
    @property
    def cpus_per_worker(self) -> float | None: ...
    @property
    def memory_per_worker(self) -> float | None: ...
    @property
    def wait_for_resources(self) -> float: ...
    @property
    def verbose(self) -> bool: ...


class Node(NamedTuple):
    """What a machine has for workers."""

    cpus: int
    gpus: float
    memory: float = math.inf  # bytes


@dataclass(frozen=True)
class Resources:
    """What a run uses: `workers` processes with `threads` CPU threads and `gpus` GPUs each.

    Attributes:
        workers: processes.
        threads: CPU threads of a worker's arithmetic; they decide the bytes.
        gpus: that Ray sets aside for a worker.
        cpus: likewise; None: as many as threads.
        memory: bytes likewise; 0: not known.
    """

    workers: int
    threads: int
    gpus: float
    cpus: float | None = None
    memory: int = 0

    def __str__(self) -> str:
        """Say it in a line."""
        memory = f", {self.memory / 1e9:.1f} GB of memory" if self.memory else ""
        each = f"{self.threads} CPU threads, {self.gpus:g} GPUs{memory}"
        return f"{self.workers} workers with {each} each"


def settle_resources(
    nodes: Sequence[Node], config: ClusterOptions, threads: int | None, memory: int = 0
) -> Resources:
    """Settle number and size of the workers on Ray.

    By default one worker per GPU, or else per four CPUs, as far as memory goes, and as many threads
    as then fit.

    Args:
        nodes: what every node of the cluster has.
        config: num_workers, gpus_per_worker and cpus_per_worker, if asked for; a `device`, if it has
            one.
        threads: CPU threads per worker, if they are settled already.
        memory: bytes that a worker needs.

    Raises:
        RunError: not enough for what was asked, with the numbers.
    """
    gpus = config.gpus_per_worker
    if gpus is None:
        wanted = str(getattr(config, "device", "cpu")).startswith(("auto", "cuda"))
        gpus = 1.0 if wanted and any(node.gpus >= 1 for node in nodes) else 0.0

    def places(size: int, need: float = memory) -> int:
        cpus = size if config.cpus_per_worker is None else config.cpus_per_worker
        return sum(_room(node, cpus, gpus, need) for node in nodes)

    workers = config.num_workers
    if workers is None:
        by_cpu = sum(max(1, node.cpus // _CORES_PER_WORKER) for node in nodes if node.cpus)
        wanted_workers = places(threads or 1) if threads or gpus else by_cpu
        workers = max(1, min(wanted_workers, places(1)))
    if threads is None:
        sizes = range(max((node.cpus for node in nodes), default=1), 1, -1)
        threads = next((size for size in sizes if places(size) >= workers), 1)
    settled = Resources(workers, threads, gpus, config.cpus_per_worker, memory)
    if places(threads) < workers:
        without_memory = places(threads, 0)
        short = "memory_per_worker" if without_memory >= workers else "threads-per-worker"
        advice = {
            "memory_per_worker": "lower --num-workers, set memory_per_worker if you know better",
            "threads-per-worker": "lower --num-workers, --threads-per-worker or --gpus-per-worker",
        }[short]
        raise RunError(
            f"{settled} do not fit: Ray has {_sum(nodes)} on {len(nodes)} nodes, room for "
            f"{places(threads)}; {advice}, use --local, or let a growing cluster catch up with "
            "--wait-for-resources"
        )
    return settled


def local_resources(config: RunConfig, threads: int | None, memory: int = 0) -> Resources:
    """This process as the one worker. Raises RunError if it cannot be, with the numbers."""
    if (config.num_workers or 1) > 1:
        raise RunError(
            f"num_workers = {config.num_workers} with --local: this process is one worker; "
            "leave out --local to have more"
        )
    free = this_machine().memory
    if memory > free:
        raise RunError(
            f"a worker needs about {memory / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are "
            "free: end other programs, take a smaller --checkpoint, or set memory_per_worker if "
            "you know better"
        )
    return Resources(1, threads or cores(), 0, None, memory)


def worker_memory(config: ClusterOptions, estimate: int) -> int:
    """Bytes that a worker needs: as told, or else the stage's estimate."""
    return estimate if config.memory_per_worker is None else int(config.memory_per_worker * 1e9)


def this_machine() -> Node:
    """CPUs and GPUs of this machine, and its memory that is free now."""
    memory = float(psutil.virtual_memory().available)
    try:
        limit = int(Path(_CGROUP_MEMORY).read_text())
        memory = min(memory, limit - psutil.Process().memory_info().rss)
    except (OSError, ValueError):  # not in a container, or without a limit
        pass
    return Node(cores(), len(list(Path("/dev").glob("nvidia[0-9]*"))), memory)


def cores() -> int:
    """CPUs that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on macOS
        return os.cpu_count() or 1


@dataclass(frozen=True)
class DiskSpace:
    """What a run will write at least, and what is free for it; bytes."""

    needed: int
    free: int

    def __str__(self) -> str:
        """Say it in a line."""
        return f"at least {self.needed / 1e9:.2f} GB to write, {self.free / 1e9:.2f} GB free"


def disk_space(
    paths: RunPaths, plan: Plan, shards: Iterable[int], config: RunConfig
) -> DiskSpace | None:
    """Compare what some shards will take on disk with what is free; None for a remote output."""
    if not isinstance(paths.out, Path):
        return None
    folder = next(path for path in (paths.out, *paths.out.parents) if path.is_dir())
    needed = 0.0
    if "jpeg" in config.parts() or paths.work is not None:
        sizes = plan.sizes(shards).clip(min=0) * _LEAST_SHARE_WRITTEN
        needed = float(sizes.clip(max=_LEAST_WRITTEN_CAP).sum())
    return DiskSpace(int(needed), shutil.disk_usage(folder).free)


def check_disk(paths: RunPaths, space: DiskSpace | None) -> None:
    """Raise RunError if the disk cannot hold what will be written."""
    if space is not None and space.free < space.needed:
        raise RunError(
            f"the disk of {paths.out} is too small: {space}; make room, use another --out, or do "
            "a part with --limit"
        )


def _room(node: Node, cpus: float, gpus: float, memory: float) -> int:
    """How many workers fit on a node; those that need nothing at all, one for each CPU."""
    needs = ((node.cpus, cpus), (node.gpus, gpus), (node.memory, memory))
    fits = [math.floor(has / need + 1e-9) for has, need in needs if need and has < math.inf]
    return min(fits, default=node.cpus)


def _sum(nodes: Sequence[Node]) -> str:
    cpus, gpus = sum(node.cpus for node in nodes), sum(node.gpus for node in nodes)
    memory = sum(node.memory for node in nodes)
    known = "" if memory == math.inf else f", {memory / 1e9:.1f} GB of memory"
    return f"{cpus} CPUs and {gpus:g} GPUs{known}"
