"""SAM in training (paper §A): one encode per image and step, its masks prompted, corrected and prompted again."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sa_engine.modeling.sam import Sam
from sa_engine.training.config import RetrainConfig
from sa_engine.training.data import Sample, TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import Group
from sa_engine.training.loop import PROMPTS, SAMPLE, Place, Trainer, mean, seeded
from sa_engine.training.losses import LossRules
from sa_engine.training.modes import set_trainable, set_training_mode
from sa_engine.training.optimizer import make_optimizer
from sa_engine.training.prompts import PromptRules
from sa_engine.training.simulate import Simulation
from sa_engine.training.state import TrainingState
from sa_engine.training.tally import PARTS, SUMS, Tally
from sa_engine.training.validation import Validation

_MASKS_PER_DECODE = {"cpu": 4}
_DEFAULT_MASKS_PER_DECODE = 64


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


@dataclass(frozen=True)
class Loaded:
    """An image of a step."""

    sample: Sample
    cached: Tensor | None  # (1, 256, 64, 64), its embedding if that is there already


class SamTrainer(Trainer[RetrainConfig, Loaded]):
    """A SAM in training, on one of the workers.

    Args:
        config: how.
        group: the workers.
        sam: the model as the round starts from it, on this worker's device; its weights change.
        data: what it is trained on.
        cache: of the embeddings, where the encoder is frozen.
        validation: what it is measured on, if anything.
        state: where it goes on from; None: from the weights of `sam`.
    """

    unit, measure_name, parts = "mask", "mIoU", PARTS
    told: ClassVar = {"total": "loss", "point_miou": "mIoU of points", "box_miou": "of boxes"}

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
        set_trainable(sam, config)
        super().__init__(config, group, sam, make_optimizer(sam, config), data, state)
        self.sam, self.cache, self.validation = sam, cache, validation
        self.simulation = simulation_of(config, group.device)

    def new_tally(self) -> Tally:
        """Of losses, and of how good masks are."""
        return Tally(SUMS, PARTS)

    def load(self, place: Place) -> Loaded | None:
        """An image with its masks; its picture only if its embedding is not known yet."""
        config, cached = self.config, None
        if self.cache is not None:
            cached = self.cache.get(self.data.content_key(place.image))
        sample = self.data.load(
            place.image,
            np.random.default_rng((config.seed, SAMPLE, place.iteration, place.position)),
            image_size=self.sam.image_size,
            max_masks=config.max_masks,
            jitter=(config.jitter[0], config.jitter[1]) if config.jitter else None,
            pixels=cached is None,
        )
        return None if sample is None else Loaded(sample, cached)

    def start_step(self) -> None:
        """Dropout and drop path on, whatever is frozen as when it is used."""
        set_training_mode(self.sam, self.config)

    def train_image(self, place: Place, loaded: Loaded, tally: Tally) -> None:
        """Prompt an image's objects through all steps."""
        # Dropout and drop path of an image do not depend on the worker it is on.
        torch.manual_seed(seeded(self.config.seed, place.iteration, place.position))
        rng = np.random.default_rng((self.config.seed, PROMPTS, place.iteration, place.position))
        with tally.timed("encoder", self.group.device):
            embedding = self._embed(place, loaded)
        leaf = embedding.detach().requires_grad_(embedding.requires_grad)
        self.simulation.train(self.sam, leaf, loaded.sample.masks, rng, tally)
        if embedding.requires_grad:
            with tally.timed("encoder", self.group.device):
                embedding.backward(leaf.grad)

    def _embed(self, place: Place, loaded: Loaded) -> Tensor:
        """An image's embedding (1, 256, 64, 64); with its graph if the encoder is trained."""
        device, pixels = self.group.device, loaded.sample.pixels
        if pixels is None:
            assert loaded.cached is not None
            return loaded.cached.to(device).float()
        with torch.set_grad_enabled(self.config.train_encoder):
            embedding = encode(self.sam, pixels, self.config.precision)
        if self.cache is None:
            return embedding
        # As it will come back from the cache: an embedding is the same the first time and later.
        key = self.data.content_key(place.image)
        self.cache.put(key, embedding)
        return self.cache.rounded(embedding)

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, Any]:
        """Means over masks; of IoUs after the first prompt, over those that had such a one."""
        boxes = sums["boxes"]
        counts = {"box_miou": boxes, "point_miou": count - boxes}
        return {
            name: mean(value, counts.get(name, count))
            for name, value in sums.items()
            if name != "boxes"
        }

    def measure(self) -> dict[str, float] | None:
        """1-point and box mIoU on the validation images."""
        if self.validation is None:
            return None
        return self.validation.measure(self.sam, self.config.precision)


def encode(sam: Sam, pixels: np.ndarray, precision: str) -> Tensor:
    """The embedding (1, 256, 64, 64) float32 of (h, w, 3) uint8 RGB pixels in the model-input frame."""
    values = torch.from_numpy(pixels).to(sam.device).permute(2, 0, 1)
    with torch.autocast(sam.device.type, torch.bfloat16, enabled=precision == "bf16"):
        return sam.image_encoder(sam.preprocess(values)[None]).float()
