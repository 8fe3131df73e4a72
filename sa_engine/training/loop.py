"""The training loop: what all trainings between rounds have in common, whatever model is trained.

Workers share the images of a step. They add up the gradients of the losses' sum over all masks (or whatever the losses
are means of), and divide by the number in the whole batch: any number of workers takes the same steps.
"""

import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import Any, ClassVar, Generic, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from sa_engine.errors import SaEngineError
from sa_engine.training.config import RoundConfig
from sa_engine.training.data import TrainingData
from sa_engine.training.group import CPU, Group
from sa_engine.training.optimizer import rate, set_rate
from sa_engine.training.state import TrainingState
from sa_engine.training.tally import TIMES, Tally
from sa_engine.training.validation import MEAN

C = TypeVar("C", bound=RoundConfig)
L = TypeVar("L")
SAMPLE, PROMPTS = range(2)  # purposes of generators
LOADED_AHEAD = 4  # images


class TrainingError(SaEngineError):
    """A training that cannot go on."""


class Place(NamedTuple):
    """Which image a step has where."""

    iteration: int
    position: int  # in the global batch
    image: int  # its index in the data


class Trainer(ABC, Generic[C, L]):
    """A model in training, on one of the workers.

    Args:
        config: how.
        group: the workers.
        model: what is trained and saved, on this worker's device; its weights change.
        optimizer: of its parameters; each group has a `scale` of the learning rate.
        data: what it is trained on.
        state: where it goes on from; None: from the weights of `model`.

    Attributes:
        unit: what losses are means of: "mask" or "image".
        measure_name: of what is measured on validation images.
        parts: of the work that are timed, see `Tally`.
        told: means that a person is told besides the loss, and their words.
    """

    unit: ClassVar[str]
    measure_name: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]
    told: ClassVar[Mapping[str, str]]

    def __init__(
        self,
        config: C,
        group: Group,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        data: TrainingData,
        state: TrainingState | None = None,
    ) -> None:
        self.config, self.group, self.model, self.data = config, group, model, data
        self.optimizer = optimizer
        self.state = state or TrainingState(0, {}, {})
        if state is not None:
            model.load_state_dict(state.model)
            optimizer.load_state_dict(state.optimizer)

    @abstractmethod
    def new_tally(self) -> Tally:
        """For the sums of a few steps."""

    @abstractmethod
    def load(self, place: Place) -> L | None:
        """An image and its truth, in a thread beside training; None where nothing is left of it."""

    @abstractmethod
    def start_step(self) -> None:
        """Bring the model's modules into training mode."""

    @abstractmethod
    def train_image(self, place: Place, loaded: L, tally: Tally) -> None:
        """Add the gradients of the sum of an image's losses, and to the tally what they were and of how many."""

    @abstractmethod
    def means(self, sums: Mapping[str, float], count: float) -> dict[str, Any]:
        """Of all workers' sums, what a line of metrics has."""

    @abstractmethod
    def measure(self) -> dict[str, float] | None:
        """Of the validation images, by name, `MEAN` among it; the same on all workers. None: there are none."""

    def run(
        self,
        save: Callable[[TrainingState], None],
        note: Callable[[dict[str, Any]], None],
        progress: Callable[[int], object] = lambda iteration: None,
    ) -> int:
        """Train to the last iteration, or until a signal comes.

        Args:
            save: called with the state now and then, and at the end.
            note: called with a line of metrics.
            progress: called after each iteration.

        Returns:
            Number of the signal that ended it, 0 if none did.
        """
        config, state = self.config, self.state
        if not state.validations:
            self._validate(note)
        tally, started = self.new_tally(), time.monotonic()
        coming = self._loaded(state.iteration)
        while state.iteration < config.iterations:
            lr = self._step(state.iteration, coming, tally)
            state.iteration += 1
            last = state.iteration == config.iterations
            signal = self.group.stop_signal()
            progress(state.iteration)
            if last or signal or state.iteration % config.log_every == 0:
                state.seconds += time.monotonic() - started
                note(self._metrics(tally, lr))
                tally, started = self.new_tally(), time.monotonic()
            if last or state.iteration % validation_interval(config) == 0:
                self._validate(note)
                started = time.monotonic()
            if last or signal or state.iteration % config.save_every == 0:
                state.model, state.optimizer = self.model.state_dict(), self.optimizer.state_dict()
                save(state)
            if signal:
                return signal
        return 0

    def _loaded(self, first: int) -> Iterator[tuple[Place, L | None]]:
        """This worker's images from iteration `first` on, some loaded ahead."""
        config, group = self.config, self.group
        places = (
            Place(iteration, position, index)
            for iteration in range(first, config.iterations)
            for position, index in self.data.batch(
                iteration, config.batch_size, group.rank, group.size
            )
        )
        with ThreadPoolExecutor(1) as loader:
            submit = lambda place: (place, loader.submit(self.load, place))  # noqa: E731
            ahead = deque(submit(place) for place in islice(places, LOADED_AHEAD))
            while ahead:
                place, coming = ahead.popleft()
                loaded = coming.result()
                ahead.extend(submit(one) for one in islice(places, 1))
                yield place, loaded

    def _step(
        self, iteration: int, coming: Iterator[tuple[Place, L | None]], tally: Tally
    ) -> float:
        """One step of the optimizer, the same on all workers; gives its learning rate."""
        config, before = self.config, tally.count
        self.start_step()
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.group.rank, config.batch_size, self.group.size):
            with tally.timed("data", CPU):
                place, loaded = next(coming)
            if loaded is not None:
                self.train_image(place, loaded, tally)
        with tally.timed("optimizer", self.group.device):
            (count,) = self.group.sum([tally.count - before])
            gradients = self._gradients()
            self.group.all_reduce(gradients)
            torch._foreach_div_(gradients, max(count, 1.0))
            self._clip()
            set_rate(self.optimizer, lr := rate(config, iteration))
            self.optimizer.step()
        self.state.count += int(count)
        return lr

    def _gradients(self) -> list[Tensor]:
        """Of all parameters in training; zeros where this worker's images gave none."""
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]

    def _clip(self) -> None:
        """Clip the gradient. Raises TrainingError if it is not finite, before it is in the weights."""
        config = self.config
        most = torch.inf if config.clip_norm is None else config.clip_norm
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if not nn.utils.clip_grad_norm_(parameters, most).isfinite():
            raise TrainingError(
                f"the gradient of iteration {self.state.iteration + 1} is not finite: training has diverged; "
                "lower lr, set clip_norm or use precision fp32, and start over with --overwrite"
            )

    def _metrics(self, tally: Tally, lr: float) -> dict[str, Any]:
        """What the last iterations cost, over all workers: means, and milliseconds by part of the work."""
        sums = [float(value) for value in tally.sums.values()]
        count, *summed = self.group.sum([tally.count, *sums, *tally.seconds.values()])
        seconds = zip(tally.seconds, summed[len(sums) :], strict=True)
        return {
            "iteration": self.state.iteration,
            "lr": lr,
            f"{self.unit}s": self.state.count,
            "seconds": round(self.state.seconds, 2),
            **self.means(dict(zip(tally.sums, summed, strict=False)), count),
            f"{TIMES}{self.unit}": {
                part: round(1000 * s / max(count, 1), 2) for part, s in seconds
            },
        }

    def _validate(self, note: Callable[[dict[str, Any]], None]) -> None:
        """Measure the model as it is, and keep it if it is the best so far."""
        found = self.measure()
        if found is None:
            return
        state = self.state
        state.validations.append({"iteration": state.iteration, **found})
        note(
            {"iteration": state.iteration, "validation": found, "seconds": round(state.seconds, 2)}
        )
        if self.config.keep == "best":
            scores = [one[MEAN] for one in state.validations]
            if scores[-1] >= max(scores):
                weights = {name: value.clone() for name, value in self.model.state_dict().items()}
                state.best = (state.iteration, weights)


def mean(value: float, count: float) -> float | None:
    """A mean; None of nothing."""
    return value / count if count else None


def seeded(*numbers: int) -> int:
    """A seed of torch from the numbers that decide it."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def validation_interval(config: RoundConfig) -> int:
    """Iterations between validations."""
    return config.validate_every or max(1, config.iterations // 10)
