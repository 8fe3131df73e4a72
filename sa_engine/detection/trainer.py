"""The detector in training: boxes around the masks of shards are its truth, one image at a time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from sa_engine.detection.config import DetectorConfig
from sa_engine.detection.detector import model_input
from sa_engine.detection.measure import Validation
from sa_engine.detection.model import BoxDetector
from sa_engine.modeling.sam import Sam
from sa_engine.training.data import Boxes, TrainingData
from sa_engine.training.embeddings import EmbeddingCache
from sa_engine.training.group import Group
from sa_engine.training.loop import PROMPTS, Place, Trainer, mean, seeded
from sa_engine.training.optimizer import plain_groups
from sa_engine.training.sam import encode
from sa_engine.training.state import TrainingState
from sa_engine.training.tally import Tally

LOSSES = {
    "loss_objectness": "proposals: score",
    "loss_rpn_box_reg": "proposals: place",
    "loss_classifier": "boxes: score",
    "loss_box_reg": "boxes: place",
}


@dataclass(frozen=True)
class Loaded:
    """An image of a step."""

    truth: Boxes
    embedding: Tensor | None  # (1, 256, 64, 64), if that is there already


class DetectorTrainer(Trainer[DetectorConfig, Loaded]):
    """A detector in training, on one of the workers.

    Args:
        config: how.
        group: the workers.
        model: the detector as the round starts from it, on this worker's device; its weights change.
        data: what it is trained on.
        sam: whose embedding it sees, with a `cache` of them; both None for a backbone on pixels.
        cache: see there.
        validation: what it is measured on, if anything.
        state: where it goes on from; None: from the weights of `model`.
    """

    unit, measure_name = "image", "AR@100"
    sums, parts = ("total", *LOSSES), ("data", "encoder", "detector", "backward", "optimizer")
    told: ClassVar = {"total": "loss"}

    def __init__(
        self,
        config: DetectorConfig,
        group: Group,
        model: BoxDetector,
        data: TrainingData,
        sam: Sam | None = None,
        cache: EmbeddingCache | None = None,
        validation: Validation | None = None,
        state: TrainingState | None = None,
    ) -> None:
        optimizer = torch.optim.AdamW(
            plain_groups(model, config.weight_decay),
            lr=config.lr,
            betas=(config.beta1, config.beta2),
        )
        super().__init__(config, group, model, optimizer, data, state)
        self.detector, self.sam, self.cache, self.validation = model, sam, cache, validation

    def load(self, place: Place) -> Loaded | None:
        """An image's boxes; its picture only if its embedding is not known yet."""
        cached = None
        if self.cache is not None:
            cached = self.cache.get(self.data.content_key(place.image))
        truth = self.data.boxes(place.image, self.detector.image_size, pixels=cached is None)
        return Loaded(truth, cached) if len(truth.boxes) else None

    def start_step(self) -> None:
        """All of it learns, but for what is frozen in a backbone that began from weights."""
        self.detector.train()

    def train_image(self, place: Place, loaded: Loaded, tally: Tally) -> None:
        """Add the gradients of an image's losses."""
        # Which anchors and proposals are sampled does not depend on the worker it is on.
        torch.manual_seed(seeded(self.config.seed, PROMPTS, place.iteration, place.position))
        device = self.group.device
        with tally.timed("encoder", device):
            inputs = self._inputs(place, loaded)
        boxes = torch.from_numpy(loaded.truth.boxes).float().to(device)
        with tally.timed("detector", device):
            losses = self.detector.losses(inputs, [loaded.truth.size], [boxes])
            total = torch.stack(list(losses.values())).sum()
        with tally.timed("backward", device):
            total.backward()
        for name, value in {"total": total, **losses}.items():
            tally.add(name, value[None])
        tally.count += 1

    def _inputs(self, place: Place, loaded: Loaded) -> Tensor:
        """What the detector sees of an image."""
        device, pixels = self.group.device, loaded.truth.pixels
        if loaded.embedding is not None:
            return loaded.embedding.to(device).float()
        assert pixels is not None
        if self.sam is None:
            return model_input(pixels, self.detector.image_size).to(device)
        with torch.no_grad():
            embedding = encode(self.sam, pixels, self.config.precision)
        if self.cache is None:
            return embedding
        # As it will come back from the cache: an embedding is the same the first time and later.
        self.cache.put(self.data.content_key(place.image), embedding)
        return self.cache.rounded(embedding)

    def means(self, sums: Mapping[str, float], count: float) -> dict[str, Any]:
        """Means over images."""
        return {name: mean(value, count) for name, value in sums.items()}

    def measure(self) -> dict[str, float] | None:
        """AR@100 of boxes on the validation images."""
        return None if self.validation is None else self.validation.measure(self.detector)
