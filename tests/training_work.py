"""What the workers of `test_parallel.py` do: functions of a module, because other processes import them."""

import os
import signal
import time
import zlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sa_engine.errors import SaEngineError
from sa_engine.progress import Interrupted
from sa_engine.training.parallel import Group

SAMPLES = 12


def summed_gradients(group: Group) -> dict[str, Any]:
    """Gradients of a small network over all samples, of which each worker takes every size-th."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.Flatten(), nn.Linear(8 * 36, 5))
    inputs, wanted = torch.randn(SAMPLES, 3, 8, 8), torch.randn(SAMPLES, 5)
    mine = slice(group.rank, None, group.size)
    ((model(inputs[mine]) - wanted[mine]) ** 2).sum().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    group.all_reduce(gradients)
    counted, ranks = group.sum([len(inputs[mine]), group.rank])
    return {
        "gradients": [gradient.numpy() for gradient in gradients],
        "counted": counted,
        "ranks": ranks,
        "equal": _are_equal(group, gradients),
        "threads": group.sum([torch.get_num_threads()])[0] / group.size,
        "main": group.is_main,
    }


def _are_equal(group: Group, tensors: list[Tensor]) -> bool:
    """Whether the other of at most two workers holds the very same numbers."""
    checksum = zlib.crc32(b"".join(tensor.numpy().tobytes() for tensor in tensors))
    return group.sum([checksum]) == [group.size * checksum]


class OwnError(SaEngineError):
    exit_code = 5

    def __init__(self, message: str, place: str) -> None:
        super().__init__(message)
        self.place = place


def fail(group: Group, kind: str) -> None:
    """Worker 1 fails; the others wait for it in vain."""
    if group.rank == group.size - 1:
        if kind == "own":
            raise OwnError("photos/a.jpg is not there: put it back", place="a.jpg")
        if kind == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ZeroDivisionError("a mistake")
    group.all_reduce([torch.zeros(3)])


def count_until_stopped(group: Group, folder: Path, seconds: float = 0.02) -> None:
    """Steps without end; every worker leaves a file that says where it stopped, and main one how far it is."""
    for step in range(100_000):
        time.sleep(seconds)
        (folder / f"pid{group.rank}").write_text(str(os.getpid()))
        if signum := group.stop_signal():
            (folder / f"stopped{group.rank}").write_text(str(step))
            raise Interrupted(f"stopped at step {step}", signum)


def die_once(group: Group, folder: Path) -> int:
    """Count to 6 in a file; the last worker is killed at 3, the first time."""
    state, killed = folder / "state", folder / "killed"
    step = int(state.read_text()) if state.exists() else 0
    while step < 6:
        group.sum([0])
        step += 1
        if group.is_main:
            state.write_text(str(step))
        group.sum([0])
        if step == 3 and group.rank == group.size - 1 and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
    return step


def hang(group: Group, folder: Path) -> None:
    """Never come back, whatever is asked."""
    (folder / f"pid{group.rank}").write_text(str(os.getpid()))
    time.sleep(600)
