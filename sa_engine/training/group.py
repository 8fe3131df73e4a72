"""A training process among its like, and what they say to each other."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

CPU = torch.device("cpu")
# What the workers say to each other about counts and signals stays off the GPUs.
GPU_BACKEND = "cpu:gloo,cuda:nccl"
# The parent or Ray sees a dead worker at once; a long evaluation on one of them must not pass for one.
GROUP_TIMEOUT = timedelta(days=1)
_BUCKET_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Group:
    """One training process among `size`; by default the only one.

    All workers must make the same calls in the same order. Everything is a no-op in a group of one.

    Attributes:
        rank: this worker's number, 0 for the main one.
        size: workers.
        device: where this worker computes.
        heard: number of the signal that this worker has been sent, 0 for none.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = CPU
    heard: Callable[[], int] = field(default=int, repr=False)

    @property
    def is_main(self) -> bool:
        """Whether this worker is the one that writes."""
        return self.rank == 0

    def all_reduce(self, tensors: Iterable[Tensor]) -> None:
        """Sum in place over all workers; they give tensors of the same shapes, types and order.

        The sums have the same bits on every worker. They travel in a few flat buffers: a parameter that has no
        gradient on one worker must be there as zeros.
        """
        if self.size > 1:
            for bucket in _buckets(tensors):
                _sum_in_one_buffer(bucket)

    def sum(self, values: Sequence[float]) -> list[float]:
        """Sum of every value over all workers, in float64."""
        if self.size == 1:
            return [float(value) for value in values]
        summed = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(summed)
        return summed.tolist()

    def stop_signal(self) -> int:
        """Number of a signal that some worker has been sent, equal on all of them; 0 for none.

        A loop that sees one saves and leaves; `progress.Interrupted` takes the number.
        """
        heard = self.heard()
        if self.size == 1:
            return heard
        largest = torch.tensor(heard)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest)


def _buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of the same type and device, together not much larger than a bucket."""
    open_buckets: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for tensor in tensors:
        bucket = open_buckets.setdefault((tensor.device, tensor.dtype), [])
        bucket.append(tensor)
        if sum(part.nbytes for part in bucket) >= _BUCKET_BYTES:
            yield open_buckets.pop((tensor.device, tensor.dtype))
    yield from open_buckets.values()


@torch.no_grad()
def _sum_in_one_buffer(tensors: Sequence[Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
    dist.all_reduce(flat)
    for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
        tensor.copy_(part.view_as(tensor))
