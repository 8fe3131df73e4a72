"""The options of the stages that run over images; a test compares them with `configs/`."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from sa_engine.option_groups import (
    FilterConfig,
    MaskConfig,
    ModelConfig,
    PrivacyConfig,
    RunConfig,
    ShardConfig,
    sha256_of_boxes,
)
from sa_engine.options import ConfigError, option


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
            return {"boxes": sha256_of_boxes(str(self.boxes))}
        from sa_engine.rounds import read_detector  # reads a file of JSON, and no weights

        return {"detector": read_detector(Path(self.detector).expanduser()).fingerprint}
