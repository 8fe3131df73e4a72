"""The workers on Ray: a cluster that is joined or started, its resources, and a pool of actors.

One row is one shard's index: neither pictures nor plans cross Ray. Not used, each for a reason that
was measured: `read_images` and `max_errored_blocks` lose good images with a bad one, `write_*`
files are neither atomic nor equal between runs, and Ray Data's checkpoints save per write task.
"""

import logging
import os
import re
import socket
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from sa_engine.errors import SaEngineError
from sa_engine.pipeline import WorkerSpec, check_driver
from sa_engine.plan import Plan, read_plan
from sa_engine.progress import stop_on_signals
from sa_engine.resources import ClusterOptions, Node, Resources, settle_resources
from sa_engine.shards import ShardStats
from sa_engine.storage import OutputError, RunError
from sa_engine.worker import ShardWorker

_WAIT_POLL_S = 2.0
_REACH_S = 10.0


@contextmanager
def cluster(config: ClusterOptions) -> Iterator[None]:
    """Join the cluster at `config.ray_address` or in RAY_ADDRESS, else start Ray on this machine.

    A Ray that this process has already stays as it is. Raises RunError if there is none to join.
    """
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
        address = cluster_address(config)
        _check_reachable(address)
        try:
            with nullcontext() if config.verbose else _held_back_stderr():
                ray.init(
                    address=address,
                    log_to_driver=config.verbose,
                    logging_level=logging.INFO if config.verbose else logging.ERROR,
                    include_dashboard=None if address else False,
                )
        except (ConnectionError, ValueError, RuntimeError) as error:
            where = address or "this machine"
            raise RunError(f"cannot start or join Ray at {where}: {error}") from None
    try:
        with stop_on_signals():  # once more: ray.init has put its own handler in place
            yield
    finally:
        if ours:
            ray.shutdown()


def cluster_address(config: ClusterOptions) -> str | None:
    """The cluster that a run joins, as told or as a Ray job finds it; None: it starts its own."""
    return config.ray_address or os.environ.get("RAY_ADDRESS")


def wait_for_resources(config: ClusterOptions, threads: int | None, memory: int) -> Resources:
    """Settle what each worker gets, for `config.wait_for_resources` seconds until it is there.

    A cluster that grows by itself is told what is wanted. Raises RunError, with the numbers, if the
    workers do not fit in time.
    """
    deadline = time.monotonic() + config.wait_for_resources
    asked = False
    try:
        while True:
            try:
                return settle_resources(_nodes(), config, threads, memory)
            except RunError:
                if time.monotonic() >= deadline:
                    raise
            if not asked:
                _ask_autoscaler(_bundles(config, threads, memory))
                asked = True
            time.sleep(min(_WAIT_POLL_S, max(0.0, deadline - time.monotonic())))
    finally:
        if asked:  # from here on the workers themselves ask for what they need
            _ask_autoscaler([])


def run_on_ray(
    spec: WorkerSpec, shards: Sequence[int], resources: Resources
) -> Iterator[ShardStats]:
    """Commit shards on a fixed pool of actors, in any order.

    An actor that dies is started again, on another node if its own is gone, and its shard is redone.
    """
    import ray.data

    if not spec.config.verbose:
        # What goes wrong is raised; Ray Data would print it twice more, with its own traceback.
        logging.getLogger("ray.data").setLevel(logging.CRITICAL)
    dataset = ray.data.from_items(
        [{"shard": index} for index in shards], override_num_blocks=len(shards)
    ).map_batches(
        _RayWorker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(
            size=min(resources.workers, len(shards)), max_tasks_in_flight_per_actor=1
        ),
        num_cpus=resources.threads if resources.cpus is None else resources.cpus,
        num_gpus=resources.gpus or None,
        memory=resources.memory or None,
        fn_constructor_kwargs={"spec": spec},
    )
    dataset.context.enable_progress_bars = False
    dataset.context.print_on_execution_start = spec.config.verbose
    # Ray would give up after half an hour without a row; a shard may take longer.
    dataset.context.execution_no_progress_timeout_s = -1
    try:
        for row in dataset.iter_rows():
            if row["error"]:
                failed = OutputError if row["exit_code"] == OutputError.exit_code else RunError
                raise failed(row["error"])
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
        self._spec = spec
        self._plan: Plan | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        try:
            check_driver(self._spec)
            if self._plan is None:  # not in the constructor, whose errors Ray would wrap too
                self._plan = read_plan(self._spec.paths.plan)
            stats = self._worker.run(self._plan[int(batch["shard"][0])])
        except SaEngineError as error:  # as a row: Ray would wrap it into a page of traceback
            return {"stats": [""], "error": [str(error)], "exit_code": [error.exit_code]}
        return {"stats": [stats.to_json()], "error": [""], "exit_code": [0]}


@contextmanager
def _held_back_stderr() -> Iterator[None]:
    """Keep what Ray's core prints while it starts, and show it only if it does not."""
    sys.stderr.flush()
    with tempfile.TemporaryFile() as printed:
        terminal = os.dup(2)
        os.dup2(printed.fileno(), 2)
        try:
            yield
        except BaseException:
            printed.seek(0)
            os.write(terminal, printed.read())
            raise
        finally:
            os.dup2(terminal, 2)
            os.close(terminal)


def _check_reachable(address: str | None) -> None:
    """Raise RunError if nothing listens at host:port: Ray itself would try for many minutes."""
    host, _, port = (address or "").removeprefix("ray://").rpartition(":")
    if not (host and port.isdigit()):  # "auto" and "local" answer by themselves
        return
    try:
        socket.create_connection((host.strip("[]"), int(port)), _REACH_S).close()
    except OSError as error:
        raise RunError(
            f"cannot reach Ray at {address}: {error.strerror or error}; `ray start --head` says the "
            "address of the cluster that it starts"
        ) from None


def _nodes() -> list[Node]:
    import ray

    alive = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    return [
        Node(int(r.get("CPU", 0)), float(r.get("GPU", 0)), float(r.get("memory", 0))) for r in alive
    ]


def _bundles(config: ClusterOptions, threads: int | None, memory: int) -> list[dict[str, float]]:
    cpus = config.cpus_per_worker if config.cpus_per_worker is not None else float(threads or 1)
    bundle = {"CPU": cpus, "GPU": config.gpus_per_worker or 0.0, "memory": float(memory)}
    wanted = {name: amount for name, amount in bundle.items() if amount}
    return [wanted] * (config.num_workers or 1)


def _ask_autoscaler(bundles: list[dict[str, float]]) -> None:
    from ray.autoscaler.sdk import request_resources

    request_resources(bundles=bundles)
