"""The training loop (paper §A): one encode per image and step, its masks prompted, corrected and prompted again.

Workers share the images of a step. They add up the gradients of the losses' sum over all masks, and divide by the
number of masks in the whole batch: any number of workers takes the same steps.
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sa_engine.errors import SaEngineError
from sa_engine.modeling.sam import Sam
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import Sample, TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import CPU, Group
from sa_engine.training.losses import LossRules
from sa_engine.training.modes import set_trainable, set_training_mode
from sa_engine.training.optimizer import make_optimizer, rate, set_rate
from sa_engine.training.prompts import PromptRules
from sa_engine.training.simulate import Simulation
from sa_engine.training.state import TrainingState
from sa_engine.training.tally import PARTS, SUMS, Tally
from sa_engine.training.validation import MEAN, Validation

_MASKS_PER_DECODE = {"cpu": 4}
_DEFAULT_MASKS_PER_DECODE = 64
_SAMPLE, _PROMPTS = range(2)  # purposes of generators
LOADED_AHEAD = 4  # images


def masks_per_decode(config: RetrainConfig, device: torch.device) -> int:
    """Masks decoded at once: small batches stay in a CPU's cache."""
    by_device = _MASKS_PER_DECODE.get(device.type, _DEFAULT_MASKS_PER_DECODE)
    return min(config.masks_per_decode or by_device, config.max_masks)


def simulation_of(config: RetrainConfig, device: torch.device) -> Simulation:
    """The interactive simulation that a config asks for."""
    return Simulation(
        prompts=PromptRules(
            box_odds=config.box_odds,
            box_noise=config.box_noise,
            max_box_noise=config.max_box_noise,
            corrections=config.corrections,
            mask_only_steps=config.mask_only_steps,
            box_multimask=config.box_multimask,
        ),
        losses=LossRules(
            focal=config.focal_weight,
            dice=config.dice_weight,
            iou=config.iou_weight,
            alpha=config.focal_alpha,
            gamma=config.focal_gamma,
            iou_of_all=config.iou_of_all,
            temperature=config.loss_temperature,
        ),
        reduce_steps=config.reduce_steps,
        loss_size=config.loss_size,
        masks_per_decode=masks_per_decode(config, device),
        bf16=config.precision == "bf16",
    )


class TrainingError(SaEngineError):
    """A training that cannot go on."""


@dataclass(frozen=True)
class Loaded:
    """An image of a step."""

    position: int  # in the global batch
    index: int  # of the image in the data
    sample: Sample
    cached: Tensor | None  # (1, 256, 64, 64), its embedding if that is there already


class Trainer:
    """A model in training, on one of the workers.

    Args:
        config: how.
        group: the workers.
        sam: the model as the round starts from it, on this worker's device; its weights change.
        data: what it is trained on.
        cache: of the embeddings, where the encoder is frozen.
        validation: what it is measured on, if anything.
        state: where it goes on from; None: from the weights of ``sam``.
    """

    def __init__(
        self,
        config: RetrainConfig,
        group: Group,
        sam: Sam,
        data: TrainingData,
        cache: EmbeddingCache | None = None,
        validation: Validation | None = None,
        state: TrainingState | None = None,
    ) -> None:
        self.config, self.group, self.sam, self.data = config, group, sam, data
        self.cache, self.validation = cache, validation
        set_trainable(sam, config)
        self.optimizer = make_optimizer(sam, config)
        self.simulation = simulation_of(config, group.device)
        self.state = state or TrainingState(0, {}, {})
        if state is not None:
            sam.load_state_dict(state.model)
            self.optimizer.load_state_dict(state.optimizer)

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
        tally, started = Tally(), time.monotonic()
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
                tally, started = Tally(), time.monotonic()
            if last or state.iteration % validation_interval(config) == 0:
                self._validate(note)
                started = time.monotonic()
            if last or signal or state.iteration % config.save_every == 0:
                state.model, state.optimizer = self.sam.state_dict(), self.optimizer.state_dict()
                save(state)
            if signal:
                return signal
        return 0

    def _loaded(self, first: int) -> Iterator[Loaded | None]:
        """This worker's images from iteration ``first`` on, some loaded ahead; None where nothing is left of one."""
        config, group = self.config, self.group
        places = (
            (iteration, position, index)
            for iteration in range(first, config.iterations)
            for position, index in self.data.batch(
                iteration, config.batch_size, group.rank, group.size
            )
        )
        with ThreadPoolExecutor(1) as loader:
            ahead = deque(loader.submit(self._load, *one) for one in islice(places, LOADED_AHEAD))
            while ahead:
                loaded = ahead.popleft().result()
                ahead.extend(loader.submit(self._load, *one) for one in islice(places, 1))
                yield loaded

    def _load(self, iteration: int, position: int, index: int) -> Loaded | None:
        """An image with its masks; its picture only if its embedding is not known yet."""
        config, cached = self.config, None
        if self.cache is not None:
            cached = self.cache.get(self.data.content_key(index))
        sample = self.data.load(
            index,
            np.random.default_rng((config.seed, _SAMPLE, iteration, position)),
            image_size=self.sam.image_size,
            max_masks=config.max_masks,
            jitter=(config.jitter[0], config.jitter[1]) if config.jitter else None,
            pixels=cached is None,
        )
        return None if sample is None else Loaded(position, index, sample, cached)

    def _step(self, iteration: int, coming: Iterator[Loaded | None], tally: Tally) -> float:
        """One step of the optimizer, the same on all workers; gives its learning rate."""
        config, masks_before = self.config, tally.masks
        set_training_mode(self.sam, config)
        self.optimizer.zero_grad(set_to_none=True)
        for _ in range(self.group.rank, config.batch_size, self.group.size):
            with tally.timed("data", CPU):
                loaded = next(coming)
            if loaded is None:
                continue
            position, sample = loaded.position, loaded.sample
            # Dropout and drop path of an image do not depend on the worker it is on.
            torch.manual_seed(_seed(config.seed, iteration, position))
            rng = np.random.default_rng((config.seed, _PROMPTS, iteration, position))
            with tally.timed("encoder", self.group.device):
                embedding = self._embed(loaded)
            leaf = embedding.detach().requires_grad_(embedding.requires_grad)
            self.simulation.train(self.sam, leaf, sample.masks, rng, tally)
            if embedding.requires_grad:
                with tally.timed("encoder", self.group.device):
                    embedding.backward(leaf.grad)
        with tally.timed("optimizer", self.group.device):
            (masks,) = self.group.sum([tally.masks - masks_before])
            gradients = self._gradients()
            self.group.all_reduce(gradients)
            torch._foreach_div_(gradients, max(masks, 1.0))
            self._clip()
            set_rate(self.optimizer, lr := rate(config, iteration))
            self.optimizer.step()
        self.state.masks += int(masks)
        return lr

    def _embed(self, loaded: Loaded) -> Tensor:
        """An image's embedding (1, 256, 64, 64); with its graph if the encoder is trained."""
        device, pixels = self.group.device, loaded.sample.pixels
        if pixels is None:
            assert loaded.cached is not None
            return loaded.cached.to(device).float()
        values = torch.from_numpy(pixels).to(device).permute(2, 0, 1)
        bf16 = self.config.precision == "bf16"
        with (
            torch.set_grad_enabled(self.config.train_encoder),
            torch.autocast(device.type, torch.bfloat16, enabled=bf16),
        ):
            embedding = self.sam.image_encoder(self.sam.preprocess(values)[None]).float()
        if self.cache is None:
            return embedding
        # As it will come back from the cache: an embedding is the same the first time and later.
        key = self.data.content_key(loaded.index)
        self.cache.put(key, embedding)
        return self.cache.rounded(embedding)

    def _gradients(self) -> list[Tensor]:
        """Of all parameters in training; zeros where this worker's images gave none."""
        parameters = [p for p in self.sam.parameters() if p.requires_grad]
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return [p.grad for p in parameters if p.grad is not None]

    def _clip(self) -> None:
        """Clip the gradient. Raises TrainingError if it is not finite, before it is in the weights."""
        config = self.config
        most = torch.inf if config.clip_norm is None else config.clip_norm
        parameters = [p for p in self.sam.parameters() if p.requires_grad]
        if not nn.utils.clip_grad_norm_(parameters, most).isfinite():
            raise TrainingError(
                f"the gradient of iteration {self.state.iteration + 1} is not finite: training has diverged; "
                "lower lr, set clip_norm or use precision fp32, and start over with --overwrite"
            )

    def _metrics(self, tally: Tally, lr: float) -> dict[str, Any]:
        """What the last iterations cost, over all workers: means over masks, and milliseconds per mask by part."""
        sums = [float(tally.sums[name]) for name in SUMS]
        masks, *summed = self.group.sum([tally.masks, *sums, *(tally.seconds[p] for p in PARTS)])
        found = dict(zip(SUMS, summed, strict=False))
        boxes = found.pop("boxes")
        counts = {"box_miou": boxes, "point_miou": masks - boxes}
        seconds = zip(PARTS, summed[len(SUMS) :], strict=True)
        return {
            "iteration": self.state.iteration,
            "lr": lr,
            "masks": self.state.masks,
            "seconds": round(self.state.seconds, 2),
            **{name: _ratio(value, counts.get(name, masks)) for name, value in found.items()},
            "ms_per_mask": {part: round(1000 * s / max(masks, 1), 2) for part, s in seconds},
        }

    def _validate(self, note: Callable[[dict[str, Any]], None]) -> None:
        """Measure the model as it is, and keep it if it is the best so far."""
        if self.validation is None:
            return
        found = self.validation.measure(self.sam, self.config.precision)
        state = self.state
        state.validations.append({"iteration": state.iteration, **found})
        note(
            {"iteration": state.iteration, "validation": found, "seconds": round(state.seconds, 2)}
        )
        if self.config.keep == "best":
            scores = [one[MEAN] for one in state.validations]
            if scores[-1] >= max(scores):
                weights = {name: value.clone() for name, value in self.sam.state_dict().items()}
                state.best = (state.iteration, weights)


def _ratio(value: float, count: float) -> float | None:
    """A mean; None of nothing."""
    return value / count if count else None


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def validation_interval(config: RetrainConfig) -> int:
    """Iterations between validations."""
    return config.validate_every or max(1, config.iterations // 10)
