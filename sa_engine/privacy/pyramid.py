"""One detector over a photo of any size: an image pyramid, each level in overlapping tiles.

A network finds things of some dozens of pixels best. So the photo is shown to it enlarged, as it is,
and smaller by halves down to a thumbnail, and a detection counts only in a level where it is small
enough (`Detector.largest`): larger things are the next level's, down to the last. Nearly all that a face network finds
only when shown large is no face (docs/blur.md).
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np

from sa_engine.privacy.detectors import Detections, Detector, no_detections

_TILE = 1280  # pixels; bounds memory to some hundred megabytes
_THUMBNAIL = 48  # pixels of the short side, below which no level is looked at
_SAME_IOU = 0.4


@dataclass(frozen=True, kw_only=True)
class Search:
    """How to look.

    Attributes:
        threshold: least score of a detection.
        small_threshold: least score of one that is less than `small` pixels high in the photo.
        small: see there.
        max_scale: enlargement of the largest level.
    """

    threshold: float
    small_threshold: float
    small: float
    max_scale: float

    def accepted(self, found: Detections) -> np.ndarray:
        """Which detections score enough for their height: (N,) bool."""
        heights = found.boxes[:, 3] - found.boxes[:, 1]
        least = np.where(heights < self.small, self.small_threshold, self.threshold)
        return found.scores >= least


def search(detector: Detector, image: np.ndarray, how: Search) -> Detections:
    """Find things in a photo.

    Detections of one thing become one box around all of them, with the best of their scores.

    Args:
        detector: what looks.
        image: (H, W, 3) uint8 RGB.
        how: thresholds and scales.

    Returns:
        Boxes XYXY in pixels of `image`, inside of it, by falling score.
    """
    height, width = image.shape[:2]
    least = min(how.threshold, how.small_threshold)
    found = []
    for view in _views(image, how.max_scale, int(detector.largest * 1.25)):
        boxes, scores = detector.detect(view.picture, least)
        sides = (boxes[:, 2:] - boxes[:, :2]).max(axis=1, initial=0)
        boxes = boxes / np.tile(view.scale, 2) + np.tile(view.origin, 2)
        believed = (sides <= detector.largest) | view.last
        found.append(Detections(boxes[believed], scores[believed]))
    everything = Detections(
        np.concatenate([one.boxes for one in found]), np.concatenate([one.scores for one in found])
    )
    chosen = how.accepted(everything)
    boxes = everything.boxes[chosen].clip(0, [width, height, width, height])
    seen = (boxes[:, 2:] > boxes[:, :2]).all(axis=1)  # not only beyond the photo's edge
    return enclose(Detections(boxes[seen], everything.scores[chosen][seen]))


def enclose(found: Detections) -> Detections:
    """Put a box around each best detection and those that overlap it by an IoU of 0.4."""
    if not len(found.boxes):
        return no_detections()
    order = np.argsort(-found.scores, kind="stable")
    boxes, scores = found.boxes[order], found.scores[order]
    sizes = boxes[:, 2:] - boxes[:, :2]
    kept = cv2.dnn.NMSBoxes(
        np.hstack([boxes[:, :2], sizes]).tolist(), (scores + 1).tolist(), 0.0, _SAME_IOU
    )
    keep = np.asarray(kept, int).reshape(-1)
    together = box_iou(boxes[keep], boxes) >= _SAME_IOU
    together[np.arange(len(keep)), keep] = True  # a box without area does not even overlap itself
    enclosing = np.stack(
        [np.hstack([boxes[same, :2].min(axis=0), boxes[same, 2:].max(axis=0)]) for same in together]
    )
    return Detections(enclosing, scores[keep])


def box_iou(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes: (N, 4) and (M, 4) XYXY -> (N, M), 0 where both are empty."""
    low = np.maximum(first[:, None, :2], second[None, :, :2])
    high = np.minimum(first[:, None, 2:], second[None, :, 2:])
    inter = (high - low).clip(0).prod(axis=2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clip(0).prod(axis=1) for boxes in (first, second)]
    union = areas[0][:, None] + areas[1][None] - inter
    return np.divide(inter, union, out=np.zeros_like(inter), where=union > 0)


class _View(NamedTuple):
    """A part of the photo at some scale.

    Attributes:
        picture: (H, W, 3) uint8 RGB, at most a tile.
        origin: x and y of its left top corner in the photo, pixels.
        scale: pixels of the picture per pixel of the photo, in x and in y.
        last: nothing smaller follows, so that what is large here is not seen anywhere else.
    """

    picture: np.ndarray
    origin: tuple[float, float]
    scale: tuple[float, float]
    last: bool = False


def _views(image: np.ndarray, max_scale: float, overlap: int) -> Iterator[_View]:
    """The photo at `max_scale`, half of that, and so on down to a thumbnail, in tiles."""
    height, width = image.shape[:2]
    scale = max_scale
    while True:
        last = min(height, width) * scale / 2 < _THUMBNAIL
        if scale > 1:  # tiles first: the whole photo enlarged may not fit into memory
            for left, top, tile in _tiles(image, int(_TILE / scale), int(overlap / scale)):
                picture = _resize(tile, scale)
                yield _View(picture, (left, top), _ratio(picture, tile), last)
        else:
            level = _resize(image, scale)
            x, y = _ratio(level, image)
            for left, top, tile in _tiles(level, _TILE, overlap):
                yield _View(tile, (left / x, top / y), (x, y), last)
        if last:
            return
        scale /= 2


def _resize(image: np.ndarray, scale: float) -> np.ndarray:
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if size == (image.shape[1], image.shape[0]):
        return image
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR)


def _ratio(picture: np.ndarray, original: np.ndarray) -> tuple[float, float]:
    return picture.shape[1] / original.shape[1], picture.shape[0] / original.shape[0]


def _tiles(image: np.ndarray, side: int, overlap: int) -> Iterator[tuple[int, int, np.ndarray]]:
    """Tiles of at most `side` pixels a side, with their left and top; neighbours overlap."""
    for top, bottom in _spans(image.shape[0], side, overlap):
        for left, right in _spans(image.shape[1], side, overlap):
            yield left, top, image[top:bottom, left:right]


def _spans(length: int, side: int, overlap: int) -> list[tuple[int, int]]:
    """The fewest spans of at most `side` that cover a length and overlap by just so much."""
    count = max(1, -(-(length - overlap) // (side - overlap)))
    span = -(-(length + (count - 1) * overlap) // count)
    starts = [min(index * (span - overlap), length - min(span, length)) for index in range(count)]
    return [(start, min(start + span, length)) for start in starts]
