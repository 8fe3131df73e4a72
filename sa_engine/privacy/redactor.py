"""Redact a photo, then look at what has become of it: nothing may be found there any more."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from sa_engine.boxes import BoxesError
from sa_engine.errors import SaEngineError
from sa_engine.option_groups import PrivacyConfig
from sa_engine.privacy.detectors import Detector, DetectorError
from sa_engine.privacy.faces import load_face_detector
from sa_engine.privacy.plates import load_plate_detector
from sa_engine.privacy.pyramid import Search, search
from sa_engine.privacy.redact import Box, coverage, grow, redact, redacted_area
from sa_engine.privacy.selftest import check_detector

# Of a box: as much as counts as covered, here and in blur-eval.
COVERED = 0.95
_PASSES = 3
_SMALL_FACE = 32.0  # pixels; below, only the enlarged photo shows it well


class StillVisible(SaEngineError):
    """Detectors find something in the redacted photo that they did not find in the photo."""


@dataclass(frozen=True, kw_only=True)
class Region:
    """A redacted part of a photo.

    Attributes:
        kind: "face", "plate" or "manual".
        box: left, top, right, bottom in pixels; right and bottom are the first ones outside.
        detected: the box as it was found, XYXY before it was grown.
        score: of the detector; None for a manual one.
        detector: its name, or "manual".
        found_in: 0 for the photo itself, else the check of the redacted photo that found it.
    """

    kind: str
    box: Box
    detected: tuple[float, float, float, float]
    score: float | None
    detector: str
    found_in: int

    def to_dict(self) -> dict[str, Any]:
        """As the audit has it."""
        return {
            **vars(self),
            "detected": [round(value, 1) for value in self.detected],
            "score": None if self.score is None else round(self.score, 4),
        }


@dataclass(frozen=True, kw_only=True)
class Redacted:
    """A redacted photo.

    Attributes:
        image: (H, W, 3) uint8 RGB.
        encoded: the file that is released.
        regions: that were redacted.
        checks: how often the redacted photo was looked at; at the last time nothing was found.
        inside: detections within redacted regions at that last time.
    """

    image: np.ndarray
    encoded: bytes
    regions: tuple[Region, ...]
    checks: int
    inside: int

    @property
    def counts(self) -> dict[str, int]:
        """Regions by kind."""
        kinds = Counter(region.kind for region in self.regions)
        return {f"{kind}s" if kind != "manual" else kind: kinds[kind] for kind in _KINDS}


_KINDS = ("face", "plate", "manual")


def load_redactor(config: PrivacyConfig, threads: int, device: str) -> "Redactor":
    """Load the detectors, and let each find what it must find before it is trusted with a photo.

    Args:
        config, threads, device: see `Redactor`.

    Raises:
        DetectorError, WeightsError: a detector cannot be had, or fails its self-test.
    """
    redactor = Redactor(config, threads, device)
    for detector in redactor.detectors:
        check_detector(detector, redactor.how(detector))
    return redactor


class Redactor:
    """Finds faces and plates in photos and redacts them.

    Args:
        config: which detectors, how they look, how to redact.
        threads: CPU threads of the detectors.
        device: "cpu", or anything else to use a GPU that onnxruntime can use.

    Raises:
        DetectorError, WeightsError: a detector cannot be had.
    """

    def __init__(self, config: PrivacyConfig, threads: int, device: str) -> None:
        self._config = config
        self.detectors: list[Detector] = [
            *(load_face_detector(name, threads, device) for name in config.face_detectors),
            *(load_plate_detector(name, threads, device) for name in config.plate_detectors),
        ]

    def identity(self) -> dict[str, str]:
        """What besides the options decides the result: the detectors' weights."""
        return {
            f"{detector.kind}_detector_{detector.name}": detector.weights_sha256
            for detector in self.detectors
        }

    def check_same(self, expected: Mapping[str, str]) -> None:
        """Raise DetectorError if the detectors are not those of another machine."""
        for name, sha256 in self.identity().items():
            if expected.get(name) != sha256:
                raise DetectorError(
                    f"{name} has other weights on this worker (sha256 {sha256[:12]}) than on the "
                    f"driver ({str(expected.get(name))[:12]}): install the same packages on both"
                )

    def describe(self) -> list[dict[str, Any]]:
        """The detectors and their thresholds, for the audit."""
        described = []
        for detector in self.detectors:
            how = self.how(detector)
            described.append(
                {
                    "name": detector.name,
                    "kind": detector.kind,
                    "version": detector.version,
                    "weights_sha256": detector.weights_sha256,
                    "licence": detector.licence,
                    "threshold": how.threshold,
                    "small_threshold": how.small_threshold,
                    "max_scale": how.max_scale,
                }
            )
        return described

    def how(self, detector: Detector) -> Search:
        """How a detector looks at photos."""
        config = self._config
        face = detector.kind == "face"
        threshold = config.face_threshold if face else config.plate_threshold
        return Search(
            threshold=threshold,
            small_threshold=config.small_face_threshold if face else threshold,
            small=_SMALL_FACE,
            max_scale=config.detect_scale,
        )

    def find(self, image: np.ndarray, check: int = 0) -> list[Region]:
        """What all detectors find in (H, W, 3) uint8 RGB, by falling score for each detector."""
        height, width = image.shape[:2]
        regions = []
        for detector in self.detectors:
            found = search(detector, image, self.how(detector))
            for box, score in zip(found.boxes.tolist(), found.scores.tolist(), strict=True):
                regions.append(
                    Region(
                        kind=detector.kind,
                        box=grow(box, detector.kind, height, width),
                        detected=tuple(box),
                        score=score,
                        detector=detector.name,
                        found_in=check,
                    )
                )
        return regions

    def redact(
        self,
        image: np.ndarray,
        manual: Sequence[Sequence[float]],
        release: Callable[[np.ndarray], tuple[bytes, np.ndarray]],
    ) -> Redacted:
        """Redact a photo, and check what will be released, up to three times.

        Args:
            image: (H, W, 3) uint8 RGB.
            manual: more boxes to redact, XYXY in pixels.
            release: makes the file that is released, and what anyone sees of it, which has the same
                size as the photo.

        Raises:
            StillVisible: something is still found at the third time.
        """
        height, width = image.shape[:2]
        regions = [
            Region(
                kind="manual",
                box=grow(box, "manual", height, width),
                detected=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
                score=None,
                detector="manual",
                found_in=0,
            )
            for box in manual
        ]
        for x0, y0, x1, y1 in manual:
            if x0 >= width or y0 >= height or x1 <= 0 or y1 <= 0:
                raise BoxesError(
                    f"the region [{x0:g}, {y0:g}, {x1:g}, {y1:g}] lies outside of this photo, which is "
                    f"{width} x {height}: nothing was released of it"
                )
        regions += self.find(image)
        for check in range(1, _PASSES + 1):
            boxes = [region.box for region in regions]
            redacted = redact(image, boxes, self._config.redaction, self._config.soft_edge)
            encoded, seen = release(redacted)
            found = self.find(seen, check)
            covered = redacted_area(boxes, height, width)
            new = [one for one in found if coverage(one.detected, covered) < COVERED]
            if not new:
                return Redacted(
                    image=redacted,
                    encoded=encoded,
                    regions=tuple(regions),
                    checks=check,
                    inside=len(found),
                )
            regions += new
        left = ", ".join(f"{one.kind} {one.score:.2f} at {one.box}" for one in new)
        raise StillVisible(
            f"after {_PASSES} checks detectors still find something that was not redacted: {left}; "
            "name its regions with --boxes, or raise the threshold if there is nothing to hide"
        )
