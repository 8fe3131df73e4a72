"""Fully automatic stage (paper §4, appendix B): every photo becomes a released image with masks for everything in it.

A 32x32 grid of points on the image, 16x16 on its 2x2 crops and 8x8 on its 4x4 crops prompt the ambiguity-aware model;
confident, stable, non-duplicate masks stay. ``sa_engine/generator.py`` does that; this stage wires it to the runner.
"""

import hashlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sa_engine import runner
from sa_engine.boxes import Boxes, extra_boxes
from sa_engine.config import AutoConfig
from sa_engine.images import decode_image
from sa_engine.model_stage import ModelStage, absolute
from sa_engine.partial import Finished, finished_record
from sa_engine.plan import PlannedImage
from sa_engine.records import ImageRecord, MaskRecord, mask_id
from sa_engine.release import at_released_size, released_image

if TYPE_CHECKING:  # a finished run returns without importing torch
    from sa_engine.generator import GeneratedMask
    from sa_engine.modeling.sam import Sam
    from sa_engine.privacy.redactor import Redacted, Redactor


_MEMORY_OF_DETECTORS = 700_000_000


class Decoded(NamedTuple):
    """A photo ready for the model."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, original size
    released: np.ndarray  # the same at the released size
    sha256: str  # of the file


class Segmented(NamedTuple):
    """A photo with its masks."""

    released: np.ndarray
    sha256: str
    masks: "list[GeneratedMask]"
    redacted: "Redacted | None"  # of the original size


@dataclass(kw_only=True)
class AutoStage(ModelStage):
    """The stage as the runner knows it."""

    boxes: Boxes = field(default_factory=Boxes)
    name: str = "auto"
    detectors: dict[str, str] = field(default_factory=dict)

    def identity(self, config: AutoConfig) -> dict[str, str]:
        """Load the model, and the detectors of what must not be seen, and say which weights they have."""
        if not config.blur:
            return {"model_fingerprint": self.load_model()}
        self.detectors = _load_redactor(config).identity()
        return {"model_fingerprint": self.load_model(), **self.detectors}

    def worker_memory(self, config: AutoConfig) -> int:
        """Peak memory of a worker."""
        return self.model_memory() + config.blur * _MEMORY_OF_DETECTORS

    def make_worker(self, config: AutoConfig) -> "AutoWorker":
        """Load the model in this process and check that it is the driver's."""
        sam, fingerprint = self.model_of_worker()
        redactor = _load_redactor(config) if config.blur else None
        if redactor is not None and self.detectors:
            redactor.check_same(self.detectors)
        return AutoWorker(sam, fingerprint, config, redactor, self.boxes)


class AutoWorker:
    """Masks of one photo at a time, in the runner's three overlapping steps."""

    def __init__(
        self,
        sam: "Sam",
        fingerprint: str,
        config: AutoConfig,
        redactor: "Redactor | None" = None,
        boxes: Boxes | None = None,
    ) -> None:
        from sa_engine.generator import MaskGenerator
        from sa_engine.modeling.sam import select_device
        from sa_engine.predictor import Predictor

        sam = sam.to(select_device(config.device))
        predictor = Predictor(sam, config.precision, config.compile)
        self.generator = MaskGenerator(predictor, config)
        self.fingerprint = fingerprint
        self.config = config
        self.redactor = redactor
        self.detectors = redactor.describe() if redactor else []
        self.boxes = boxes or Boxes()

    def prepare(self, item: PlannedImage, data: bytes) -> Decoded:
        """Decode a photo and scale it to the released size."""
        image = decode_image(data)
        released = image if self.redactor else at_released_size(image, self.config)
        return Decoded(image, released, hashlib.sha256(data).hexdigest())

    def process(self, item: PlannedImage, prepared: Decoded) -> Segmented:
        """Generate the masks; if asked for, of the photo without its faces and plates."""
        image, released, redacted = prepared.image, prepared.released, None
        if self.redactor is not None:
            boxes = self.boxes.of(item.key)[:, :4].tolist()
            redacted = self.redactor.redact(image, boxes, lambda seen: (b"", seen))
            image = redacted.image
            released = at_released_size(image, self.config)
        return Segmented(
            released, prepared.sha256, self.generator.generate(image, released), redacted
        )

    def finish(self, item: PlannedImage, result: Segmented) -> Finished:
        """Make the record and the released JPEG."""
        masks = [
            mask_record(mask_id(item.image_id, i), mask, self.fingerprint)
            for i, mask in enumerate(result.masks)
        ]
        record, jpeg = released_image(item, result.released, result.sha256, masks, self.config)
        if result.redacted is None:
            return finished_record(record, jpeg)
        return self._finish_redacted(item, result, record, jpeg)

    def _finish_redacted(
        self, item: PlannedImage, result: Segmented, record: ImageRecord, jpeg: bytes | None
    ) -> Finished:
        """Flag the masks of redacted regions, and write down what was redacted."""
        from sa_engine.privacy.audit import audit_of
        from sa_engine.privacy.flags import flag_redacted

        assert result.redacted is not None, "the photo was redacted"
        height, width = result.redacted.image.shape[:2]
        audit = audit_of(
            item,
            result.redacted,
            sha256_in=result.sha256,
            sha256_out=None if jpeg is None else hashlib.sha256(jpeg).hexdigest(),
            detectors=self.detectors,
            config=self.config,
        )
        boxes = [region.box for region in result.redacted.regions]
        return finished_record(flag_redacted(record, boxes, height, width), jpeg, audit)


def mask_record(number: int, mask: "GeneratedMask", fingerprint: str) -> MaskRecord:
    """The record of a generated mask with the id ``number``."""
    return MaskRecord(
        id=number,
        segmentation=mask.segmentation,
        area=mask.area,
        bbox=list(mask.bbox),
        predicted_iou=mask.predicted_iou,
        stability_score=mask.stability_score,
        point_coords=[list(mask.point_coords)],
        crop_box=list(mask.crop_box),
        source="automatic",
        model_fingerprint=fingerprint,
    )


def run(config: AutoConfig, start: runner.Start = runner.RESUME) -> runner.Report:
    """Segment every photo of ``config.images`` into shards under ``config.out``.

    Raises:
        SaEngineError: bad input, another run's folder, too few resources, or too many failures.
    """
    stage = _stage(config)
    return runner.run(stage, config, lambda: stage.identity(config), start)


def describe(config: AutoConfig, start: runner.Start = runner.RESUME) -> runner.PlanSummary:
    """What :func:`run` would do, without doing, fetching or writing anything; the model is loaded if it is here."""
    stage = _stage(config)
    return runner.describe(stage, config, start, stage.dry_identity)


def _stage(config: AutoConfig) -> AutoStage:
    boxes = extra_boxes(config, config) if config.blur else Boxes()
    return AutoStage(checkpoint=absolute(config.checkpoint), boxes=boxes)


def _load_redactor(config: AutoConfig) -> "Redactor":
    from sa_engine.privacy.redactor import load_redactor

    device = "cpu" if config.device == "cpu" else "auto"
    return load_redactor(config, config.threads_per_worker or 1, device)
