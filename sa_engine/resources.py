"""How many workers a run has, and what each of them gets."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sa_engine.config import RunConfig
from sa_engine.storage import RunError

_CORES_PER_WORKER = 4


@dataclass(frozen=True)
class Resources:
    """What a run uses: `workers` processes with `threads` CPU threads and `gpus` GPUs each."""

    workers: int
    threads: int
    gpus: float


def settle_resources(
    nodes: Sequence[tuple[int, float]], config: RunConfig, threads: int | None
) -> Resources:
    """Settle number and size of the workers on Ray.

    By default one worker per GPU, or else per four CPUs, and as many threads as then fit.

    Args:
        nodes: CPUs and GPUs of every node.
        config: num_workers and gpus_per_worker, if asked for; a `device`, if it has one.
        threads: CPU threads per worker, if they are settled already.

    Raises:
        RunError: not enough for what was asked, with the numbers.
    """
    gpus = config.gpus_per_worker
    if gpus is None:
        wanted = str(getattr(config, "device", "cpu")).startswith(("auto", "cuda"))
        gpus = 1.0 if wanted and any(node_gpus >= 1 for _, node_gpus in nodes) else 0.0

    def places(size: int) -> int:
        return sum(
            min(cpus // size, math.floor(node_gpus / gpus + 1e-9) if gpus else cpus)
            for cpus, node_gpus in nodes
        )

    workers = config.num_workers
    if workers is None:
        by_cpu = sum(max(1, cpus // _CORES_PER_WORKER) for cpus, _ in nodes if cpus)
        workers = max(1, places(threads or 1) if threads or gpus else by_cpu)
    if threads is None:
        sizes = range(max(cpus for cpus, _ in nodes), 1, -1)
        threads = next((size for size in sizes if places(size) >= workers), 1)
    if places(threads) < workers:
        raise RunError(
            f"{workers} workers with {threads} CPU threads and {gpus:g} GPUs each do not fit: Ray "
            f"has {sum(cpus for cpus, _ in nodes)} CPUs and {sum(g for _, g in nodes):g} GPUs on "
            f"{len(nodes)} nodes, room for {places(threads)}; lower --num-workers, "
            "--threads-per-worker or --gpus-per-worker, or use --local"
        )
    return Resources(workers, threads, gpus)
