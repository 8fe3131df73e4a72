"""The options of `sa-engine retrain detector`; the paper says no more of it than its kind (§4)."""

from dataclasses import dataclass
from typing import Literal

from sa_engine.options import ConfigError, option
from sa_engine.training.config import RoundConfig

SAM_BACKBONE = "sam"


@dataclass(frozen=True, kw_only=True)
class DetectorOptions(RoundConfig):
    """What a detector is, and where it starts from."""

    backbone: Literal["sam", "resnet50", "mobilenet"] = option(
        SAM_BACKBONE, identity=True, help="What it sees: SAM's frozen embedding, or the pixels."
    )
    checkpoint: str = option("vit_t", help="Model whose embedding it sees: name, file or round.")
    init: str | None = option(None, help="Detector to start from; default: fresh weights.")
    backbone_weights: str | None = option(
        None, identity=True, help="Of a backbone on pixels, by torchvision's names, as DEFAULT."
    )
    image_size: int = option(
        1024, bounds=(128, None), identity=True, help="Longest side of the image that it sees."
    )
    objectness: Literal["class", "iou"] = option(
        "class", identity=True, help="What scores say: an object or not, or the IoU with one."
    )


@dataclass(frozen=True, kw_only=True)
class DetectorConfig(DetectorOptions):
    """Training the class-agnostic box detector between rounds (paper §4, "Semi-automatic stage")."""

    iterations: int = option(400, bounds=(1, None), identity=True, help="Steps of the optimizer.")
    batch_size: int = option(
        4, bounds=(1, None), identity=True, help="Images of a step, all workers together."
    )
    lr: float = option(3e-4, bounds=(0, None), identity=True, help="Learning rate after warm-up.")
    warmup: int = option(30, bounds=(0, None), identity=True, help="Iterations of linear warm-up.")
    schedule: Literal["step", "linear", "constant"] = option(
        "linear", identity=True, help="After warm-up: a drop at each of decay_at, or linear to 0."
    )
    weight_decay: float = option(
        0.05, bounds=(0, None), identity=True, help="Of weights; biases and norms have none."
    )
    clip_norm: float | None = option(
        1.0, bounds=(0, None), identity=True, help="Largest norm of the gradient."
    )
    validation: float = option(
        0.1, bounds=(0, 0.9), identity=True, help="Share of the images kept back to measure on."
    )
    keep: Literal["last", "best"] = option(
        "best", identity=True, help="Which weights: the last, or best on the validation images."
    )
    validate_every: int | None = option(
        100, bounds=(1, None), identity=True, help="Iterations; default: a tenth of them."
    )
    gate_recall_margin: float = option(
        0.01, bounds=(0, 1), help="By which AR@100 may fall in a promoted detector."
    )
    save_every: int = option(
        100, bounds=(1, None), help="Iterations between saves of the full state."
    )

    def __post_init__(self) -> None:
        """Also check what contradicts itself."""
        super().__post_init__()
        if self.backbone == SAM_BACKBONE and self.image_size != 1024:
            raise ConfigError(
                f"image_size = {self.image_size}: SAM's embedding is of 1024 pixels; leave image_size out, or "
                "name another backbone"
            )
        if self.backbone == SAM_BACKBONE and self.backbone_weights:
            raise ConfigError(
                "backbone_weights is for a backbone on pixels: the pyramid over SAM's embedding has none"
            )

    @property
    def cached(self) -> bool:
        """Whether steps begin with embeddings from the cache."""
        return self.backbone == SAM_BACKBONE
