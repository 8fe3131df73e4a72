"""What training steps cost, and how good their masks were."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sa_engine.modeling.mask_decoder import MULTIMASK_OUTPUTS
from sa_engine.training.losses import Losses

_LOSSES = ("total", "focal", "dice", "iou")
# Of every tally, so that workers can add theirs up even if one had nothing to do.
SUMS = (
    *_LOSSES,
    *("iou_error", "box_miou", "point_miou", "boxes", "last_miou"),
    *(f"best_{output}" for output in range(MULTIMASK_OUTPUTS + 1)),
)
TIMES = "ms_per_"  # how the key of a line's times begins
PARTS = ("data", "encoder", "prompts", "decoder", "losses", "backward", "optimizer")


@dataclass
class Tally:
    """Sums over masks (or images), to be divided by their number, which stay on their device until then.

    Attributes:
        names: of the sums.
        parts: of the work.
        count: of masks.
        sums: by name.
        seconds: by part.
    """

    names: tuple[str, ...] = SUMS
    parts: tuple[str, ...] = PARTS
    count: int = 0
    sums: dict[str, Tensor | float] = field(init=False)
    seconds: dict[str, float] = field(init=False)

    def __post_init__(self) -> None:
        """Begin with nothing."""
        self.sums, self.seconds = dict.fromkeys(self.names, 0.0), dict.fromkeys(self.parts, 0.0)

    def add(self, name: str, values: Tensor) -> None:
        """Add up (B,) values."""
        self.sums[name] = self.sums[name] + values.detach().sum(dtype=torch.float32)

    def note(
        self, losses: Losses, chosen: Tensor, iou: Tensor, boxed: Tensor, step: tuple[int, int]
    ) -> None:
        """Add what one step of B masks cost, its share of all their steps, and how good its masks were.

        Args:
            losses: of the step.
            chosen: (B,) the outputs that are carried on.
            iou: (B, M) predicted.
            boxed: (B,) bool, which were prompted with a box.
            step: its number, from 0, and how many there are.
        """
        number, steps = step
        rows = torch.arange(len(chosen), device=chosen.device)
        reached = losses.true_iou[rows, chosen]
        for name in _LOSSES:
            self.add(name, getattr(losses, name) / steps)
        self.add("iou_error", (iou[rows, chosen] - reached).abs() / steps)
        if number == 0:
            boxed = boxed.to(reached.device)
            self.add("box_miou", reached * boxed)
            self.add("point_miou", reached * ~boxed)
            self.add("boxes", boxed)
            for output in range(losses.true_iou.shape[1]):
                self.add(f"best_{output}", losses.best == output)
        if number == steps - 1:
            self.add("last_miou", reached)

    @contextmanager
    def timed(self, part: str, device: torch.device) -> Iterator[None]:
        """Add the seconds of what is inside to those of a part of the work."""
        started = time.perf_counter()
        yield
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.seconds[part] += time.perf_counter() - started
