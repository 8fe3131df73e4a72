"""Detectors are tried on a known face and a known plate before they are trusted with a photo.

A wrong model, a broken installation or a threshold of 1 finds nothing in any photo, and would leave
every face as it is.
"""

from pathlib import Path

import cv2
import numpy as np

from sa_engine.images import decode_image
from sa_engine.privacy.detectors import Detector, DetectorError
from sa_engine.privacy.pyramid import Search, box_iou, search

_LEAST_IOU = 0.4


def known_face() -> tuple[np.ndarray, np.ndarray]:
    """A NASA portrait, in the public domain, out of scikit-image's wheel.

    Returns:
        (512, 512, 3) uint8 RGB, and the face's box XYXY.
    """
    import skimage

    file = Path(skimage.__file__).parent / "data" / "astronaut.png"
    return decode_image(file.read_bytes()), np.array([180.0, 62.0, 270.0, 180.0])


def known_plate() -> tuple[np.ndarray, np.ndarray]:
    """A drawn car from behind with a plate.

    Returns:
        (480, 640, 3) uint8 RGB, and the plate's box XYXY.
    """
    image = np.full((480, 640, 3), 118, np.uint8)
    image[:200] = (176, 196, 214)
    cv2.rectangle(image, (120, 110), (520, 400), (44, 58, 92), -1)
    cv2.rectangle(image, (170, 130), (470, 215), (24, 28, 34), -1)
    for left in (130, 460):
        cv2.rectangle(image, (left, 240), (left + 50, 285), (170, 30, 30), -1)
    cv2.rectangle(image, (120, 360), (520, 400), (30, 32, 36), -1)
    x0, y0, x1, y1 = 230, 290, 410, 330
    cv2.rectangle(image, (x0, y0), (x1, y1), (238, 238, 232), -1)
    cv2.rectangle(image, (x0, y0), (x1, y1), (20, 20, 20), 2)
    cv2.putText(
        image, "B AB 1234", (x0 + 12, y1 - 11), cv2.FONT_HERSHEY_SIMPLEX, 0.95, (16, 16, 16), 2
    )
    return cv2.GaussianBlur(image, (3, 3), 0), np.array([x0, y0, x1, y1], float)


def check_detector(detector: Detector, how: Search) -> float:
    """Let a detector find what must be found; return its score.

    Raises DetectorError if it does not, or not there.
    """
    image, box = known_face() if detector.kind == "face" else known_plate()
    found = search(detector, image, how)
    right = box_iou(found.boxes, box[None])[:, 0] >= _LEAST_IOU
    if not right.any():
        raise DetectorError(
            f"the {detector.kind} detector {detector.name} does not find the {detector.kind} of its "
            f"self-test at a threshold of {how.threshold:g} ({len(found.boxes)} other detections): "
            "its weights are not what they should be, or the threshold is too high; nothing was "
            "written"
        )
    return float(found.scores[right].max())
