"""Detectors of what must not be seen, behind one interface: a picture in, boxes with scores out.

How one is driven over a photo of any size is in `pyramid.py`; which ones there are, in `faces.py` and
`plates.py`.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple, Protocol

import cv2
import numpy as np

from sa_engine.errors import SaEngineError

if TYPE_CHECKING:
    import onnxruntime

Kind = Literal["face", "plate"]
KINDS: tuple[Kind, ...] = ("face", "plate")


class DetectorError(SaEngineError):
    """A detector that is not installed, or that does not do what it must."""


class Detections(NamedTuple):
    """What a detector has found.

    Attributes:
        boxes: (N, 4) float64 XYXY in pixels of the picture it was shown; may reach beyond it.
        scores: (N,) float64, 0 to 1.
    """

    boxes: np.ndarray
    scores: np.ndarray


class Detector(Protocol):
    """A detector of one kind of thing.

    Attributes:
        name: as in the configuration.
        kind: of what it finds.
        version: of the package that its weights come from.
        weights_sha256: hex, of its weights.
        licence: SPDX identifier of its weights.
        largest: side in pixels up to which its detections are believed: larger things are looked for
            in a smaller picture.
    """

    name: str
    kind: Kind
    version: str
    weights_sha256: str
    licence: str
    largest: float

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Find what scores at least `threshold` in (H, W, 3) uint8 RGB."""


def no_detections() -> Detections:
    """Nothing found."""
    return Detections(np.zeros((0, 4)), np.zeros(0))


def onnx_session(weights: bytes, threads: int, device: str) -> "onnxruntime.InferenceSession":
    """Load a network. On a GPU if onnxruntime has been built for one and `device` does not say cpu."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # not its warnings about the export
    providers = ["CPUExecutionProvider"]
    if device != "cpu" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    return onnxruntime.InferenceSession(weights, options, providers=providers)


class AnchorNetwork:
    """RetinaFace's network (arXiv 1905.00641), whatever it was trained to find.

    Args:
        session: whose first input is (1, 3, H, W) float32 BGR without its mean, and whose first two
            outputs are offsets (1, N, 4) and probabilities (1, N, 2) of the anchors.
        mean: BGR, 0 to 255.
        anchors: sides in pixels of the square anchors at strides 8, 16 and 32.
    """

    _STRIDES = (8, 16, 32)
    _VARIANCES = (0.1, 0.2)

    def __init__(
        self,
        session: "onnxruntime.InferenceSession",
        mean: tuple[float, float, float],
        anchors: Sequence[tuple[float, ...]],
    ) -> None:
        self._session = session
        self._input = session.get_inputs()[0].name
        self._outputs = [output.name for output in session.get_outputs()[:2]]
        self._mean = mean
        self._anchors = anchors
        self._cached: tuple[tuple[int, int], np.ndarray] = ((0, 0), np.zeros((0, 4)))

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Every anchor of (H, W, 3) uint8 RGB that scores at least `threshold`, overlapping or not."""
        height, width = image.shape[:2]
        batch = cv2.dnn.blobFromImage(image, mean=self._mean, swapRB=True)
        offsets, probabilities = self._session.run(self._outputs, {self._input: batch})
        scores = probabilities[0, :, 1].astype(np.float64)
        if not np.isfinite(scores).all():
            raise DetectorError("the network gave scores that are not finite")
        chosen = scores >= threshold
        anchors = self._grid(height, width)[chosen]
        offset = offsets[0][chosen].astype(np.float64)
        centre = anchors[:, :2] + offset[:, :2] * self._VARIANCES[0] * anchors[:, 2:]
        with np.errstate(over="ignore"):  # told below
            half = anchors[:, 2:] * np.exp(offset[:, 2:] * self._VARIANCES[1]) / 2
        boxes = np.hstack([centre - half, centre + half])
        if not np.isfinite(boxes).all():
            raise DetectorError("the network gave boxes that are not finite")
        return Detections(boxes, scores[chosen])

    def _grid(self, height: int, width: int) -> np.ndarray:
        """Anchors of a picture: (N, 4) centre x, centre y, width, height in pixels."""
        if self._cached[0] != (height, width):
            levels = []
            for stride, sides in zip(self._STRIDES, self._anchors, strict=True):
                rows, columns = math.ceil(height / stride), math.ceil(width / stride)
                y, x = np.mgrid[:rows, :columns]
                level = np.empty((rows, columns, len(sides), 4))
                level[..., 0] = (x[..., None] + 0.5) * stride
                level[..., 1] = (y[..., None] + 0.5) * stride
                level[..., 2] = level[..., 3] = sides
                levels.append(level.reshape(-1, 4))
            self._cached = ((height, width), np.concatenate(levels))
        return self._cached[1]
