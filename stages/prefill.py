"""Semi-automatic stage, its first half (paper §4): detected objects are drawn before an annotator sees the photo.

Boxes of a class-agnostic detector prompt the model; confident masks become shards, each with its `prefill_id`, and
annotators add what is missing. ``sa_engine/prefiller.py`` does that; this stage wires it to the runner.
"""

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from sa_engine import runner
from sa_engine.boxes import Boxes, BoxesError, boxes_of_run
from sa_engine.config import PrefillConfig
from sa_engine.images import decode_image
from sa_engine.model_stage import ModelMismatch, ModelStage, absolute
from sa_engine.partial import Finished, finished_record
from sa_engine.plan import PlannedImage
from sa_engine.records import MaskRecord, mask_id
from sa_engine.release import at_released_size, released_image

if TYPE_CHECKING:  # a finished run returns without importing torch
    from sa_engine.detection.model import BoxDetector
    from sa_engine.modeling.sam import Sam
    from sa_engine.prefiller import PrefilledMask


class Decoded(NamedTuple):
    """A photo ready for the model."""

    released: np.ndarray  # (H, W, 3) uint8 RGB at the released size
    boxes: np.ndarray  # (N, 4) float64 XYXY in its pixels
    scores: np.ndarray  # (N,) float64, not a number where there is none
    sha256: str  # of the file


class Prefilled(NamedTuple):
    """A photo with its masks."""

    released: np.ndarray
    sha256: str
    masks: "list[PrefilledMask]"


@dataclass(kw_only=True)
class PrefillStage(ModelStage):
    """The stage as the runner knows it."""

    boxes: Boxes = field(default_factory=Boxes)
    detector: Path | None = None
    detector_fingerprint: str | None = None
    name: str = "prefill"

    def identity(self, config: PrefillConfig) -> dict[str, str]:
        """Load the model and say which weights it has; the detector, whose weights are an option, must fit it."""
        found = {"model_fingerprint": self.load_model()}
        self.load_detector()
        return found

    def dry_identity(self) -> dict[str, str]:
        """The same without fetching anything: of a model that is not here yet, the detector is loaded by itself."""
        found = super().dry_identity()
        self.load_detector()
        return found

    def load_detector(self) -> "BoxDetector | None":
        """The detector, if there is one.

        Raises:
            RoundError: it is damaged, or sees another encoder's embedding.
            ModelMismatch: it is not the driver's.
        """
        from sa_engine.detection.files import load_detector

        if self.detector is None:
            return None
        model, info = load_detector(self.detector, self.sam)
        if info.fingerprint != self.detector_fingerprint:
            raise ModelMismatch(
                f"detector {self.detector} has other weights on this worker (fingerprint {info.fingerprint[:12]}) than "
                f"on the driver ({str(self.detector_fingerprint)[:12]}): give both the same folder"
            )
        return model

    def worker_memory(self, config: PrefillConfig) -> int:
        """Peak memory of a worker."""
        return self.model_memory()

    def make_worker(self, config: PrefillConfig) -> "PrefillWorker":
        """Load the model in this process and check that it is the driver's."""
        sam, fingerprint = self.model_of_worker()
        return PrefillWorker(sam, fingerprint, config, self.boxes, self.load_detector())


class PrefillWorker:
    """Masks of one photo at a time, in the runner's three overlapping steps."""

    def __init__(
        self,
        sam: "Sam",
        fingerprint: str,
        config: PrefillConfig,
        boxes: Boxes,
        detector: "BoxDetector | None" = None,
    ) -> None:
        from sa_engine.detection.detector import Detector
        from sa_engine.modeling.sam import select_device
        from sa_engine.predictor import Predictor
        from sa_engine.prefiller import Prefiller

        device = select_device(config.device)
        self.predictor = Predictor(sam.to(device), config.precision, config.compile)
        self.prefiller = Prefiller(self.predictor, config)
        self.detector = None if detector is None else Detector(detector.to(device))
        self.fingerprint, self.config, self.boxes = fingerprint, config, boxes

    def prepare(self, item: PlannedImage, data: bytes) -> Decoded:
        """Decode a photo, and scale it and its boxes to the released size."""
        image = decode_image(data)
        released = at_released_size(image, self.config)
        boxes, scores = _cut(self.boxes.of(item.key), image.shape[0], image.shape[1])
        scale = np.array(released.shape[1::-1]) / image.shape[1::-1]
        return Decoded(
            released, boxes * np.tile(scale, 2), scores, hashlib.sha256(data).hexdigest()
        )

    def process(self, item: PlannedImage, prepared: Decoded) -> Prefilled:
        """Find the boxes, unless they were given, and prompt the model with them."""
        image, boxes, scores, sha256 = prepared
        embedding = None
        if self.detector is not None:
            if self.detector.takes_embedding:
                embedding = self.predictor.embed(image)  # one for boxes and masks
            features = None if embedding is None else embedding.features
            boxes, scores = self.detector.detect(image, features)
        masks = self.prefiller.prefill(image, boxes, scores, embedding)
        return Prefilled(image, sha256, masks)

    def finish(self, item: PlannedImage, result: Prefilled) -> Finished:
        """Make the record and the released JPEG."""
        height, width = result.released.shape[:2]
        masks = [
            mask_record(mask_id(item.image_id, i), mask, height, width, self.fingerprint)
            for i, mask in enumerate(result.masks)
        ]
        record, jpeg = released_image(item, result.released, result.sha256, masks, self.config)
        return finished_record(record, jpeg)


def mask_record(
    number: int, found: "PrefilledMask", height: int, width: int, fingerprint: str
) -> MaskRecord:
    """The record of a mask with the id ``number``, by which it is known again when an annotator returns it."""
    x0, y0, x1, y1 = found.mask.box
    return MaskRecord(
        id=number,
        segmentation=found.segmentation(height, width),
        area=int(np.count_nonzero(found.mask.window)),
        bbox=[float(x0), float(y0), float(x1 - x0), float(y1 - y0)],
        predicted_iou=found.predicted_iou,
        stability_score=found.stability_score,
        point_coords=None,
        crop_box=[0.0, 0.0, float(width), float(height)],
        source="semi-automatic",
        model_fingerprint=fingerprint,
        box_score=found.box_score,
        prefill_id=number,
    )


def run(config: PrefillConfig, start: runner.Start = runner.RESUME) -> runner.Report:
    """Prefill every photo of ``config.images`` into shards under ``config.out``.

    Raises:
        SaEngineError: bad input, another run's folder, too few resources, or too many failures.
    """
    stage = _stage(config)
    return runner.run(stage, config, lambda: stage.identity(config), start)


def describe(config: PrefillConfig, start: runner.Start = runner.RESUME) -> runner.PlanSummary:
    """What :func:`run` would do, without doing, fetching or writing anything; model and detector are loaded."""
    stage = _stage(config)
    return runner.describe(stage, config, start, stage.dry_identity)


def _stage(config: PrefillConfig) -> PrefillStage:
    checkpoint = absolute(config.checkpoint)
    if config.boxes is not None:
        boxes = boxes_of_run(Path(config.boxes), config, scored=True)
        return PrefillStage(checkpoint=checkpoint, boxes=boxes)
    return PrefillStage(
        checkpoint=checkpoint,
        detector=Path(str(config.detector)).expanduser().absolute(),
        detector_fingerprint=config.identity_of_files()["detector"],
    )


def _cut(rows: np.ndarray, height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Of `Boxes`' rows the boxes (N, 4), cut to the (height, width) photo, and their scores (N,).

    Raises BoxesError for a box that lies outside: its photo was another one, or not upright.
    """
    cut = rows[:, :4].clip(0, [width, height, width, height])
    outside = (cut[:, 0] >= cut[:, 2]) | (cut[:, 1] >= cut[:, 3])
    if outside.any():
        raise BoxesError(
            f"a box lies outside the photo of {width}x{height} pixels: {rows[outside][0, :4].tolist()}; expected "
            "left, top, right, bottom in the upright photo"
        )
    return cut, rows[:, 4]
