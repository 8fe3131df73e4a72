"""Training on Ray Train: the `work` of `parallel.py`, on a machine or a cluster.

Only paths, options and the result cross Ray: `work` saves its state where all nodes can read it, and resumes from
there when Ray starts the workers anew. Ray Train's own checkpoints and reports are not used.
"""

import ctypes
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from sa_engine import ray_pool
from sa_engine.errors import SaEngineError
from sa_engine.modeling.sam import select_device
from sa_engine.resources import Resources
from sa_engine.training.group import GPU_BACKEND, GROUP_TIMEOUT, Group
from sa_engine.training.parallel import Outcome, WorkerLost, noted_signals

T = TypeVar("T")
_POLL_S = 0.2
_SETTINGS = {
    "RAY_CHDIR_TO_TRIAL_DIR": "0",  # relative paths stay what they are
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
}


@dataclass(frozen=True, kw_only=True)
class _Options:
    """As `ray_pool` asks for them."""

    ray_address: str | None
    num_workers: int | None
    threads_per_worker: int | None
    gpus_per_worker: float | None
    device: str
    wait_for_resources: float
    verbose: bool
    cpus_per_worker: float | None = None
    memory_per_worker: float | None = None


def run_on_ray(
    work: Callable[..., T],
    *args: Any,
    num_workers: int | None,
    threads: int | None,
    device: str = "cpu",
    gpus_per_worker: float | None = None,
    ray_address: str | None = None,
    memory: int = 0,
    wait_for_resources: float = 0.0,
    max_failures: int = 3,
    verbose: bool = False,
) -> T:
    """Run `work(group, *args)` in workers of Ray Train.

    Args:
        work, args: as for :func:`sa_engine.training.parallel.run_workers`; paths among them are absolute, and the
            same on all nodes.
        num_workers: None: one per GPU, or per four CPUs.
        threads: CPU threads of torch in every worker, which Ray sets aside for it; None: as many as fit.
        device: of the workers, as in `select_device`; `auto` is a GPU only if Ray sets one aside for them.
        gpus_per_worker: None: 1 where there is one and `device` allows it.
        ray_address: cluster to join; None: that of RAY_ADDRESS, else Ray is started on this machine.
        memory: bytes that Ray sets aside for a worker; 0: none.
        wait_for_resources: seconds to wait for a cluster to grow.
        max_failures: how often lost workers are started anew, all of them; `work` must then resume by itself.
        verbose: show what Ray and the workers log.

    Raises:
        RunError: no such cluster, or the workers do not fit, with the numbers.
        SaEngineError: that `work` raised in any worker; Ray does not try again.
        WorkerLost: workers were lost once too often.
        TrainingFailedError: of Ray, with its traceback: `work` raised something else, once too often.
        StopSignal: a second SIGINT or SIGTERM; the first one is given to the workers.
    """
    for name, value in _SETTINGS.items():
        os.environ.setdefault(name, value)
    options = _Options(
        ray_address=ray_address,
        num_workers=num_workers,
        threads_per_worker=threads,
        gpus_per_worker=gpus_per_worker,
        device=device,
        wait_for_resources=wait_for_resources,
        verbose=verbose,
    )
    with ray_pool.cluster(options):
        resources = ray_pool.wait_for_resources(options, threads, memory)
        with tempfile.TemporaryDirectory() as notes:
            return _fit(work, args, options, resources, max_failures, notes)


def _fit(
    work: Callable[..., T],
    args: Sequence[Any],
    options: _Options,
    resources: Resources,
    max_failures: int,
    notes: str,
) -> T:
    import ray
    from ray import train
    from ray.train.torch import TorchConfig, TorchTrainer

    if not options.verbose:
        logging.getLogger("ray.train").setLevel(logging.CRITICAL)
    mailbox: Any = ray.remote(num_cpus=0)(_Mailbox)
    mailbox = mailbox.remote()
    device = "cpu" if options.device == "auto" else options.device
    reserved: dict[str, float] = {
        "CPU": resources.threads if resources.cpus is None else resources.cpus,
        "GPU": resources.gpus,
        "memory": resources.memory,
    }
    trainer = TorchTrainer(
        _run_worker,
        train_loop_config={
            "mailbox": mailbox,
            "threads": resources.threads,
            "device": None if resources.gpus else device,
            "call": (work, args),
        },
        # NCCL has no two workers on one GPU.
        torch_config=TorchConfig(
            backend=GPU_BACKEND if resources.gpus >= 1 else "gloo",
            timeout_s=int(GROUP_TIMEOUT.total_seconds()),
        ),
        scaling_config=train.ScalingConfig(
            num_workers=resources.workers,
            use_gpu=resources.gpus > 0,
            resources_per_worker={name: amount for name, amount in reserved.items() if amount},
        ),
        run_config=train.RunConfig(
            name="train",
            storage_path=notes,
            failure_config=train.FailureConfig(max_failures=max_failures),
        ),
    )
    failure = _while_noting_signals(trainer.fit, mailbox)
    letter = ray.get(mailbox.read.remote())
    if letter is not None:
        return Outcome.unpack(letter).get("a worker on Ray")
    assert failure is not None
    if lost := _lost(failure):
        raise WorkerLost(
            f"Ray lost {lost} once more than max_failures = {max_failures} allows: the same command goes on from "
            "what was saved last; give the workers more memory if that ended them (`ray logs` may tell)"
        ) from None
    raise failure


def _while_noting_signals(fit: Callable[[], Any], mailbox: Any) -> BaseException | None:
    """Call `fit`, and put signals into the mailbox meanwhile; return what it raised.

    In a thread of its own, where Ray cannot put its own handler in place, which would end the workers.
    """
    outcome: list[Outcome] = []
    fitting = threading.Thread(target=lambda: outcome.append(Outcome.of(fit)), daemon=True)
    stop = ctypes.c_int(0)
    with noted_signals(stop):
        fitting.start()
        told = 0
        while fitting.is_alive():
            fitting.join(_POLL_S)
            if stop.value != told:
                told = stop.value
                mailbox.stop.remote(told)
    return outcome[0].error


class _Mailbox:
    """A Ray actor: what the driver tells the workers, and they tell it."""

    def __init__(self) -> None:
        self._signum = 0
        self._letter: bytes | None = None

    def stop(self, signum: int) -> None:
        self._signum = signum

    def heard(self) -> int:
        return self._signum

    def write(self, letter: bytes) -> None:
        """Keep the first."""
        self._letter = self._letter or letter

    def read(self) -> bytes | None:
        return self._letter


def _run_worker(config: dict[str, Any]) -> None:
    """What a worker of Ray Train does."""
    import ray
    from ray import train
    from ray.train.torch import get_device

    mailbox, (work, args) = config["mailbox"], config["call"]
    if ray.get(mailbox.read.remote()) is not None:
        return  # started anew although a user's mistake has ended it
    context = train.get_context()
    rank = context.get_world_rank()

    def run() -> Any:
        torch.set_num_threads(config["threads"])
        device = get_device() if config["device"] is None else select_device(config["device"])
        heard = (lambda: ray.get(mailbox.heard.remote())) if rank == 0 else int
        return work(Group(rank, context.get_world_size(), device, heard), *args)

    outcome = Outcome.of(run)
    if isinstance(outcome.error, SaEngineError) or (outcome.error is None and rank == 0):
        ray.get(mailbox.write.remote(outcome.pack()))
    if outcome.error is not None and not outcome.is_agreed:
        raise outcome.error  # it ends the others, which wait for this worker


def _lost(failure: BaseException) -> str:
    """Which workers died, if that is what ended the training."""
    from ray.exceptions import RayError

    failures = sorted(getattr(failure, "worker_failures", {}).items())
    # Ray Train's health check wraps what it found, in a class that is not public.
    found = [(rank, getattr(error, "health_check_failure", error)) for rank, error in failures]
    ranks = [rank for rank, error in found if isinstance(error, RayError)]
    return f"worker {', '.join(map(str, ranks))}" if ranks else ""
