"""The options of `sa-engine retrain`; defaults are the paper's for ViT-H (§A, "Training recipe")."""

import re
from dataclasses import dataclass
from typing import Literal

from sa_engine.options import Config, ConfigError, option

ARCHITECTURES = ("vit_t", "vit_b", "vit_l", "vit_h")
LOSS_SIZES = (256, 512, 1024)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(Config):
    """What is trained, and from where."""

    init: str = option("vit_t", help="Model to start from: name, file or round.")
    architecture: str | None = option(
        None, identity=True, help="Image encoder; default: that of init. Another one is swapped in."
    )
    encoder_init: str | None = option(
        None, help="SAM or MAE checkpoint for an encoder that is swapped in."
    )
    decoder_depth: int | None = option(
        None, bounds=(1, 8), identity=True, help="Mask decoder layers; default: those of init."
    )
    train_encoder: bool = option(
        True, identity=True, help="Train the image encoder too; false: it is frozen."
    )
    cache_embeddings: bool = option(
        True, identity=True, help="Keep a frozen encoder's embeddings on disk, in half precision."
    )

    def __post_init__(self) -> None:
        """Also check the architecture's name."""
        super().__post_init__()
        if self.architecture not in (None, *ARCHITECTURES):
            raise ConfigError(
                f"architecture = {self.architecture}: expected one of {', '.join(ARCHITECTURES)}"
            )


@dataclass(frozen=True, kw_only=True)
class SimulationOptions(Config):
    """The interactive simulation and its losses (§3, §A); lengths in pixels of the 1024-pixel model input."""

    box_odds: float = option(0.5, bounds=(0, 1), identity=True, help="Of a box as first prompt.")
    box_noise: float = option(
        0.1, bounds=(0, 1), identity=True, help="Standard deviation of a box's sides, of its size."
    )
    max_box_noise: float = option(
        20.0, bounds=(0, None), identity=True, help="Pixels that a box's side moves at most."
    )
    corrections: int = option(
        8, bounds=(0, None), identity=True, help="Points from the error region, after the first."
    )
    mask_only_steps: int = option(
        2, bounds=(0, 2), identity=True, help="Without a new point: 1 at the end, 2 also between."
    )
    box_multimask: bool = option(
        True, identity=True, help="A box alone gets three masks; false: one, as released tools do."
    )
    focal_weight: float = option(20.0, bounds=(0, None), identity=True, help="Of the focal loss.")
    dice_weight: float = option(1.0, bounds=(0, None), identity=True, help="Of the dice loss.")
    iou_weight: float = option(1.0, bounds=(0, None), identity=True, help="Of predicted IoU's MSE.")
    focal_alpha: float = option(
        0.25, bounds=(0, 1), identity=True, help="Of the focal loss; the paper does not say it."
    )
    focal_gamma: float = option(
        2.0, bounds=(0, None), identity=True, help="Of the focal loss; the paper does not say it."
    )
    iou_of_all: bool = option(
        True, identity=True, help="Train the predicted IoU of all masks, not of the best alone."
    )
    loss_temperature: float = option(
        1.0, bounds=(0.01, None), identity=True, help="By which logits are divided before losses."
    )
    reduce_steps: Literal["mean", "sum"] = option(
        "mean", identity=True, help="Of a mask's losses over its steps; the paper does not say it."
    )
    loss_size: int = option(
        256, identity=True, help="Side of the masks that losses see: 256 (as decoded), 512, 1024."
    )

    def __post_init__(self) -> None:
        """Also check the size of the losses' masks."""
        super().__post_init__()
        if self.loss_size not in LOSS_SIZES:
            raise ConfigError(f"loss_size = {self.loss_size}: expected one of {LOSS_SIZES}")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions(Config):
    """AdamW and its schedule (§A)."""

    iterations: int = option(
        90_000, bounds=(1, None), identity=True, help="Steps of the optimizer."
    )
    batch_size: int = option(
        256, bounds=(1, None), identity=True, help="Images of a step, all workers together."
    )
    lr: float = option(8e-4, bounds=(0, None), identity=True, help="Learning rate after warm-up.")
    beta1: float = option(0.9, bounds=(0, 1), identity=True, help="Of AdamW.")
    beta2: float = option(0.999, bounds=(0, 1), identity=True, help="Of AdamW.")
    warmup: int = option(250, bounds=(0, None), identity=True, help="Iterations of linear warm-up.")
    schedule: Literal["step", "linear", "constant"] = option(
        "step", identity=True, help="After warm-up: a drop at each of decay_at, or linear to 0."
    )
    decay_at: tuple[int, ...] = option(
        (60_000, 86_666), identity=True, help="Iterations at which the learning rate drops."
    )
    decay_factor: float = option(
        0.1, bounds=(0, 1), identity=True, help="By which it drops each time."
    )
    weight_decay: float = option(
        0.1, bounds=(0, None), identity=True, help="Of weights; biases, norms and tables have none."
    )
    clip_norm: float | None = option(
        None,
        bounds=(0, None),
        identity=True,
        help="Largest norm of the gradient; none in the paper.",
    )


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(ScheduleOptions):
    """What training SAM adds: rates by layer, and what is dropped at random (§A)."""

    layer_decay: float = option(
        0.8, bounds=(0, 1), identity=True, help="Of the rate, per block of the encoder downwards."
    )
    drop_path: float = option(
        0.4, bounds=(0, 0.99), identity=True, help="Of the encoder's last block (stochastic depth)."
    )
    dropout: float = option(0.1, bounds=(0, 0.99), identity=True, help="In the mask decoder.")


@dataclass(frozen=True, kw_only=True)
class DataOptions(Config):
    """Which images and masks are trained on (§A, §7.6)."""

    data: tuple[str, ...] = option(help="Runs of shards whose masks are trained on.")
    max_mask_coverage: float = option(
        0.9, bounds=(0, 1), identity=True, help="Leave out masks over this share of the image."
    )
    sources: tuple[str, ...] = option(
        (), identity=True, help="Of the masks trained and validated on, as manual; default: all."
    )
    oversample: tuple[str, ...] = option(
        (), identity=True, help="source=times, as manual=10; in the paper where stages are mixed."
    )
    repeat: tuple[int, ...] = option(
        (), identity=True, help="Times that an epoch has the images of each run, as 3,1,1."
    )
    validation: float = option(
        0.0, bounds=(0, 0.9), identity=True, help="Share of the images kept back to measure on."
    )

    def __post_init__(self) -> None:
        """Also check that there are some, and the sources."""
        super().__post_init__()
        if not self.data:
            raise ConfigError("data is empty: give --data with a run of shards")
        if any(times < 1 for times in self.repeat):
            raise ConfigError(f"repeat = {list(self.repeat)}: expected numbers from 1 on")
        self.source_weights()
        if self.sources:
            from sa_engine.records import SOURCES

            if unknown := [one for one in self.sources if one not in SOURCES]:
                raise ConfigError(f"sources = {unknown[0]}: expected some of {', '.join(SOURCES)}")

    def source_weights(self) -> dict[str, float]:
        """How often an epoch has an image, by the source of its masks. Raises ConfigError."""
        from sa_engine.records import SOURCES  # needs pyarrow, and `--help` does not

        weights = {}
        for item in self.oversample:
            source, _, times = item.partition("=")
            if source not in SOURCES or not re.fullmatch(r"[1-9]\d*", times):
                raise ConfigError(
                    f"oversample = {item}: expected source=times with a source of "
                    f"{', '.join(SOURCES)} and a whole number, as manual=10"
                )
            weights[source] = float(times)
        return weights


@dataclass(frozen=True, kw_only=True)
class RoundConfig(ScheduleOptions, DataOptions):
    """What any training between rounds needs, of SAM or of a detector."""

    out: str = option(help="Folder for the round; a round owns its folder.")
    seed: int = option(0, bounds=(0, None), identity=True, help="Of all random choices.")
    embeddings: str | None = option(
        None, help="Folder that keeps embeddings for other rounds; default: gone when one is done."
    )
    keep: Literal["last", "best"] = option(
        "last", identity=True, help="Which weights: the last, or best on the validation images."
    )
    validate_every: int | None = option(
        None, bounds=(1, None), identity=True, help="Iterations; default: a tenth of them."
    )
    validation_images: int = option(
        16, bounds=(1, None), identity=True, help="Of each run, to measure on while training."
    )
    gate: tuple[str, ...] = option((), help="Runs to measure on before and after; see docs.")
    gate_images: int = option(24, bounds=(1, None), help="Of each run, to measure on.")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", identity=True, help="Arithmetic of the model; losses are always in fp32."
    )
    device: str = option("auto", help="auto, cpu, cuda or mps.")
    num_workers: int = option(
        1, bounds=(1, None), help="Processes that share every step; one GPU each."
    )
    threads_per_worker: int | None = option(
        None, bounds=(1, None), help="CPU threads of a worker; default: cores / workers."
    )
    ray: bool = option(False, help="Start the workers through Ray Train, as on a cluster.")
    ray_address: str | None = option(None, help="Ray cluster to join (auto, host:port).")
    gpus_per_worker: float | None = option(
        None, bounds=(0, None), help="GPUs of a worker on Ray; default: 1 where there is one."
    )
    save_every: int = option(
        500, bounds=(1, None), help="Iterations between saves of the full state."
    )
    log_every: int = option(20, bounds=(1, None), help="Iterations that a line of metrics covers.")

    def __post_init__(self) -> None:
        """Also check the device, and that there are images to choose the best weights by."""
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|mps|cuda", self.device):
            raise ConfigError(f"device = {self.device!r}: expected auto, cpu, cuda or mps")
        if self.keep == "best" and not self.validation:
            raise ConfigError("keep = best needs validation images: set validation, as to 0.1")

    @property
    def cached(self) -> bool:
        """Whether steps begin with embeddings from the cache."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class RetrainConfig(ModelOptions, SimulationOptions, OptimizerOptions, RoundConfig):
    """Training SAM between rounds."""

    max_masks: int = option(
        64, bounds=(1, None), identity=True, help="Masks of an image in a step, a random sample."
    )
    jitter: tuple[float, ...] = option(
        (), identity=True, help="Large-scale jitter: least and largest scale, in the paper 0.1,2."
    )
    calibrate_iou: bool = option(
        False, identity=True, help="Afterwards, put predicted IoUs on the first model's scale."
    )
    gate_miou_margin: float = option(
        0.01, bounds=(0, 1), help="By which mean IoU may fall in a promoted round."
    )
    gate_masks_margin: float = option(
        0.1, bounds=(0, 1), help="Share by which the number of automatic masks may fall."
    )
    gradient_checkpointing: bool = option(
        False, help="Compute the encoder's activations twice instead of keeping them."
    )
    masks_per_decode: int | None = option(
        None, bounds=(1, None), identity=True, help="Masks decoded at once; default: by device."
    )

    def __post_init__(self) -> None:
        """Also check the jitter's range, and what contradicts itself."""
        super().__post_init__()
        if self.jitter and not (len(self.jitter) == 2 and 0 < self.jitter[0] <= self.jitter[1]):
            raise ConfigError(
                f"jitter = {list(self.jitter)}: expected least and largest scale, as 0.1, 2"
            )
        if self.cached and self.jitter:
            raise ConfigError(
                "jitter changes every image, and embeddings are cached: leave out jitter, or set "
                "cache_embeddings = false"
            )

    @property
    def cached(self) -> bool:
        """Whether steps begin with embeddings from the cache."""
        return self.cache_embeddings and not self.train_encoder
