"""Training processes: one here, several on this machine, or those of Ray Train (`ray_train.py`).

The same `work(group, *args)` runs in each of them. It computes sums over its own share of a step and lets
:meth:`Group.all_reduce` add them up; nothing else crosses the workers.

SIGINT and SIGTERM never end a worker in the middle of a step. The first one, sent to the parent, to any worker or
(Ctrl-C) to all of them, is noted; `work` asks :meth:`Group.stop_signal` once a step, which all workers answer alike,
saves, and leaves. A second one ends everything at once. Whatever ends the parent, SIGKILL too, ends its workers.
"""

import ctypes
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist

from sa_engine.errors import SaEngineError
from sa_engine.modeling.sam import select_device
from sa_engine.progress import Interrupted, StopSignal
from sa_engine.training.group import GPU_BACKEND, GROUP_TIMEOUT, Group

__all__ = ["Group", "WorkerLost", "WorkersError", "run_workers"]

T = TypeVar("T")
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
_DEATH_S = 0.5


class WorkersError(SaEngineError):
    """More workers than this machine has devices for."""


class WorkerLost(SaEngineError):
    """A worker was killed; the same command goes on from what was saved last."""

    exit_code = 1


class WorkerTraceback(Exception):
    """The cause of an error that was raised in a worker: where, as text."""


def run_workers(
    work: Callable[..., T], *args: Any, num_workers: int, threads: int, device: str = "cpu"
) -> T:
    """Run `work(group, *args)` in this process, or in several on this machine.

    Args:
        work: a function of a module, for more than one worker; so that it can be pickled, like `args`.
        args: whatever else it takes.
        num_workers: 1 runs it here, without torch.distributed.
        threads: CPU threads of torch in every worker.
        device: as in `select_device`; workers on CUDA have a GPU each.

    Returns:
        What it returns in the main worker.

    Raises:
        DeviceError, WorkersError: devices that are not there.
        WorkerLost: a worker was killed.
        StopSignal: a second SIGINT or SIGTERM.
        Exception: the first that `work` raised in any worker, after all others were ended; `Interrupted`, which
            follows a signal, after all of them have come to it.
    """
    devices = _devices(device, num_workers)
    if num_workers > 1:
        return _run_processes(work, args, devices, threads)
    stop, before = ctypes.c_int(0), torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with noted_signals(stop):
            return work(Group(device=devices[0], heard=lambda: stop.value), *args)
    finally:
        torch.set_num_threads(before)


@contextmanager
def noted_signals(stop: ctypes.c_int, second_ends: bool = True) -> Iterator[None]:
    """Let SIGINT and SIGTERM write their number into `stop`; a second one raises `StopSignal`, if wanted."""
    noted = False  # `stop` does not tell: Ctrl-C reaches the workers too

    def note(signum: int, frame: FrameType | None) -> None:
        nonlocal noted
        if noted and second_ends:
            raise StopSignal(signum)
        noted, stop.value = True, signum

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class Outcome(NamedTuple):
    """How `work` ended in a worker."""

    value: Any = None
    error: BaseException | None = None
    where: str = ""

    @property
    def is_agreed(self) -> bool:
        """Whether all workers come to such an end, and none of them waits for another."""
        return self.error is None or isinstance(self.error, Interrupted)

    @classmethod
    def of(cls, call: Callable[[], Any]) -> "Outcome":
        """Call, and catch whatever is raised."""
        try:
            return cls(value=call())
        except BaseException as error:
            return cls(error=error, where=traceback.format_exc())

    def pack(self) -> bytes:
        """As bytes that can be read without fail: what cannot be pickled goes as text."""
        try:
            packed = pickle.dumps(self)
            pickle.loads(packed)
            return packed
        except Exception as error:
            failed = self.error or error
            text = RuntimeError(f"{type(failed).__name__}: {failed}")
            return pickle.dumps(Outcome(error=text, where=self.where))

    @staticmethod
    def unpack(packed: bytes) -> "Outcome":
        """What :meth:`pack` has packed."""
        return pickle.loads(packed)

    def get(self, worker: str) -> Any:
        """The value; or raise the error, which tells of the worker unless it is for the user."""
        if self.error is None:
            return self.value
        if isinstance(self.error, SaEngineError):
            raise self.error
        raise self.error from WorkerTraceback(f"in {worker}:\n{self.where}")


class _Worker(NamedTuple):
    process: BaseProcess
    pipe: "Connection[Any, Any]"


def _run_processes(
    work: Callable[..., T], args: Sequence[Any], devices: Sequence[torch.device], threads: int
) -> T:
    context = multiprocessing.get_context("spawn")
    stop = context.RawValue(ctypes.c_int, 0)
    workers: list[_Worker] = []
    with tempfile.TemporaryDirectory() as folder, noted_signals(stop):
        try:
            with _held_signals():
                for rank, device in enumerate(devices):
                    ours, theirs = context.Pipe()
                    group = (rank, len(devices), device, Path(folder) / "rendezvous")
                    process = context.Process(
                        target=_run_worker, args=(theirs, stop, threads, group, work, args)
                    )
                    process.start()
                    theirs.close()  # so that the worker's death ends the pipe
                    workers.append(_Worker(process, ours))
            value = _gather(workers)
            for worker in workers:
                worker.pipe.close()  # they wait for it, and none of them leaves before the last
                worker.process.join()
            return value
        finally:
            for worker in workers:
                worker.process.kill()
            for worker in workers:
                worker.process.join()


def _gather(workers: Sequence[_Worker]) -> Any:
    """Wait for all workers; return the main one's value, or raise what went wrong first."""
    waiting = {worker.pipe: rank for rank, worker in enumerate(workers)}
    main = Outcome()
    while waiting:
        for pipe in wait(list(waiting)):
            assert isinstance(pipe, Connection)
            rank = waiting.pop(pipe)
            name = f"worker {rank} of {len(workers)}"
            try:
                outcome = Outcome.unpack(pipe.recv_bytes())
            except EOFError:
                workers[rank].process.join()
                _raise_if_killed(workers)
                raise WorkerLost(
                    f"{name} ended without a word: the same command goes on from what was saved last"
                ) from None
            if not outcome.is_agreed:
                if not isinstance(outcome.error, SaEngineError):
                    _raise_if_killed(workers)  # then its peers' errors are only a consequence
                outcome.get(name)
            main = outcome if rank == 0 else main
    return main.get(f"worker 0 of {len(workers)}")


def _raise_if_killed(workers: Sequence[_Worker]) -> None:
    for rank, (process, _) in enumerate(workers):
        process.join(_DEATH_S / len(workers))
        if process.exitcode is not None and process.exitcode < 0:
            name = signal.Signals(-process.exitcode).name
            raise WorkerLost(
                f"worker {rank} of {len(workers)} was killed by {name}, as a system without free memory does: "
                "the same command goes on from what was saved last; use fewer workers if memory is short"
            )


def _run_worker(
    pipe: "Connection[Any, Any]",
    stop: ctypes.c_int,
    threads: int,
    group: tuple[int, int, torch.device, Path],
    work: Callable[..., Any],
    args: Sequence[Any],
) -> None:
    """What a spawned process does."""
    threading.Thread(target=_end_with_parent, daemon=True).start()

    def run() -> Any:
        rank, size, device, rendezvous = group
        torch.set_num_threads(threads)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        dist.init_process_group(
            GPU_BACKEND if device.type == "cuda" else "gloo",
            init_method=rendezvous.as_uri(),
            rank=rank,
            world_size=size,
            timeout=GROUP_TIMEOUT,
        )
        value = work(Group(rank, size, device, lambda: stop.value), *args)
        return value if rank == 0 else None

    with noted_signals(stop, second_ends=False):
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        outcome = Outcome.of(run)
        pipe.send_bytes(outcome.pack())
        wait([pipe])  # until the parent closes it
        if outcome.error is None:
            dist.destroy_process_group()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def _held_signals() -> Iterator[None]:
    """Hold SIGINT and SIGTERM back, here and in the processes that start meanwhile, until they can be noted."""
    resource_tracker.ensure_running()  # else it starts with the first of them, and lets the signals through
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _devices(device: str, num_workers: int) -> list[torch.device]:
    """The device of every worker."""
    found = select_device(device)
    if num_workers == 1 or found.type == "cpu":
        return [found] * num_workers
    gpus = torch.cuda.device_count() if found.type == "cuda" and found.index is None else 1
    if num_workers > gpus:
        raise WorkersError(
            f"num_workers = {num_workers} with device {device}: every worker needs a GPU of its own, and "
            f"{gpus} can be used; lower --num-workers, or use --device cpu"
        )
    return [torch.device("cuda", index) for index in range(num_workers)]
