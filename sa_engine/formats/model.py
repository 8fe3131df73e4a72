"""What every annotation format is read into, and written from: images by their names, each with its masks.

What is read is not rasterised here. A shape keeps the form in which the tool wrote it, because who turns polygons into
pixels decides the pixels: `raster.py` does it as each tool's own code does.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sa_engine.errors import SaEngineError
from sa_engine.records import ImageRecord, MaskRecord

_LARGEST = 1e300


class FormatError(SaEngineError):
    """Annotations that cannot be read: the message names the file, and where in it."""


@dataclass(frozen=True)
class Polygons:
    """Outlines whose union is the mask; a polygon is no hole in another.

    Attributes:
        rings: each x0, y0, x1, y1, ... in pixels of the image, at least three corners.
    """

    rings: Sequence[Sequence[float]]


@dataclass(frozen=True)
class Runs:
    """COCO's run lengths, column-major, background first.

    Attributes:
        height, width: of the mask they describe.
        counts: run lengths, or COCO's compressed text.
    """

    height: int
    width: int
    counts: Sequence[int] | str


@dataclass(frozen=True)
class Patch:
    """A rectangle of pixels.

    Attributes:
        left, top: where its first pixel lies in the image.
        pixels: (h, w) bool.
    """

    left: int
    top: int
    pixels: np.ndarray


Shape = Polygons | Runs | Patch


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """A mask as an annotator left it; None where the format does not say.

    Attributes:
        shapes: whose union it is.
        original_id: in its file.
        annotator: who drew it.
        time_s: annotation time in seconds.
        time_scope: what `time_s` covers: "mask" or "image".
        z_order: drawing order, higher is in front.
        crowd: whether it says that it covers several things.
        predicted_iou, stability_score, point_coords, crop_box: SA-1B's, if a model made it.
    """

    shapes: tuple[Shape, ...]
    original_id: str | None = None
    annotator: str | None = None
    time_s: float | None = None
    time_scope: str | None = None
    z_order: int | None = None
    crowd: bool = False
    predicted_iou: float | None = None
    stability_score: float | None = None
    point_coords: list[list[float]] | None = None
    crop_box: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class AnnotatedImage:
    """An image and its masks.

    Attributes:
        name: of the image as the format has it, with folders if it has them.
        width, height: as the format says; None if it does not.
        annotations: in its order.
        source: the file that says so, for messages.
        sha256: hex, of the picture's file, if the format holds its bytes.
        submitted: whether an annotator is done with it; if not, that it has no masks says nothing.
    """

    name: str
    width: int | None
    height: int | None
    annotations: tuple[Annotation, ...]
    source: str
    sha256: str | None = None
    submitted: bool = True


@dataclass(frozen=True, kw_only=True)
class Parsed:
    """The content of an annotation file.

    Attributes:
        format: its name.
        tool: that wrote it, if it says so.
        images: with their masks.
        left_out: what is no mask, by reason: how often.
    """

    format: str
    tool: str | None
    images: tuple[AnnotatedImage, ...]
    left_out: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class NamedImage:
    """An image to be written, by the name under which the next tool knows it.

    Attributes:
        name: relative path of its picture, with slashes.
        record: its masks, in pixels of the upright picture.
    """

    name: str
    record: ImageRecord


@dataclass(kw_only=True)
class Writing:
    """What a format's `write` is told, and what it tells.

    `write(images, writing)` yields the files piece by piece, as (name relative to the output, content); pieces of one
    name belong behind each other. It takes the images one by one, so that a data set of any size can be written.

    Attributes:
        pictures: folder of the pictures, relative to the output: "" beside the annotations.
        tolerance: pixels by which an outline may be simplified; 0 for all corners.
        by_people: whether people drew the masks, so that an image without any is one in which they found nothing.
        lost: what the format cannot hold, by reason: how often.
    """

    pictures: str = "images"
    tolerance: float = 0.0
    by_people: bool = False
    lost: Counter[str] = field(default_factory=Counter)


Writer = Callable[[Iterable[NamedImage], Writing], Iterator[tuple[str, bytes]]]


def window(mask: MaskRecord) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of a mask's pixels, all inclusive."""
    left, top, width, height = map(int, mask.bbox)
    return left, top, left + width, top + height


def number(value: Any, what: str, low: float | None = None) -> float:
    """A finite number, not below `low`. Raises FormatError that says what was found instead."""
    # A whole number of JSON may be too large for a float.
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not -_LARGEST <= value <= _LARGEST
    ):
        raise FormatError(f"{what} is {str(value)[:60]!r}: expected a finite number")
    if low is not None and value < low:
        raise FormatError(f"{what} is {value}: expected at least {low:g}")
    return float(value)


def whole(value: Any, what: str, low: int = 0) -> int:
    """A whole number, not below `low`. Raises FormatError that says what was found instead."""
    found = number(value, what, low)
    if found != int(found):
        raise FormatError(f"{what} is {value}: expected a whole number")
    return int(found)
