"""What checks find, and the checks of a record: is it what its masks' pixels say?"""

import math
import reprlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

from sa_engine import rle
from sa_engine.records import MASKS_PER_IMAGE, ImageRecord, MaskRecord, image_name, mask_id

_MESSAGE_LENGTH = 500
_short = reprlib.Repr()
_short.maxstring = _short.maxother = 80


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One thing that is wrong.

    Attributes:
        file: its name below the run's folder.
        message: what was found, and what was expected.
    """

    file: str
    message: str

    def __str__(self) -> str:
        """Say it in a line."""
        return f"{self.file}: {self.message}"


@dataclass
class Tally:
    """What checks have found so far: committed shards, their images and masks, and what is wrong."""

    shards: int = 0
    images: int = 0
    masks: int = 0
    problems: list[Problem] = field(default_factory=list)

    def add(self, file: str, message: str | None) -> None:
        """Report a problem; None: there is none."""
        if message is not None:
            self.problems.append(Problem(file=file, message=message))

    def merge(self, other: "Tally") -> None:
        """Add what another tally has."""
        self.shards += other.shards
        self.images += other.images
        self.masks += other.masks
        self.problems += other.problems

    @contextmanager
    def reading(self, file: str, part: str = "") -> Iterator[None]:
        """Report as a problem whatever is raised while a file, or a part of it, is read.

        No narrower kind will do: damage makes tarfile, pyarrow, Pillow and json raise nearly
        anything.
        """
        try:
            yield
        except FileNotFoundError:
            self.add(file, "is missing")
        except Exception as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())[:_MESSAGE_LENGTH]
            self.add(file, f"{part} cannot be read: {detail}".lstrip())


def check_record(record: ImageRecord) -> Iterator[str]:
    """Say what is wrong with a record, apart from what only the plan knows.

    Mask ids that are unique in their images and lie in their images' own ranges are so in the run.
    """
    if record.file_name != image_name(record.image_id):
        yield f"its file_name is {record.file_name!r}, expected {image_name(record.image_id)!r}"
    if not (record.width > 0 and record.height > 0):
        yield f"its size is {record.width} x {record.height}, expected width x height in pixels"
    lowest = mask_id(record.image_id, 0)
    before = lowest - 1
    for mask in record.masks:
        if not lowest <= mask.id < lowest + MASKS_PER_IMAGE:
            last = lowest + MASKS_PER_IMAGE - 1
            yield f"a mask has the id {mask.id}, expected {lowest} to {last}"
        elif mask.id <= before:
            yield f"mask id {mask.id} comes after {before}, expected each once, in ascending order"
        before = mask.id
        for message in check_mask(mask, record.height, record.width):
            yield f"mask {mask.id}: {message}"


def check_mask(mask: MaskRecord, height: int, width: int) -> Iterator[str]:
    """Say what is wrong with a mask of a released image of that size.

    Its area and bbox (XYWH, width = xmax - xmin) are compared with the pixels of its RLE.
    """
    numbers = [mask.predicted_iou, mask.stability_score, mask.box_score]
    numbers += chain(mask.crop_box or [], *(mask.point_coords or []))
    if not all(number is None or math.isfinite(number) for number in numbers):
        yield f"its scores, crop box and points {numbers} are not all finite"
    if mask.segmentation["size"] != [height, width]:
        yield f"its RLE has the size {mask.segmentation['size']}, its image {[height, width]}"
        return
    try:
        runs = rle.runs(mask.segmentation)
    except ValueError as error:
        yield str(error)
        return
    extent = rle.extent(runs, height)
    if extent is None:
        yield "it is empty, expected a pixel at least"
        return
    area = int(runs[1::2].sum())
    if mask.area != area:
        yield f"its area is {mask.area}, its RLE has {area} pixels"
    xmin, ymin, xmax, ymax = map(float, extent)
    bbox = [xmin, ymin, xmax - xmin, ymax - ymin]
    if mask.bbox != bbox:
        yield f"its bbox is {mask.bbox}, its RLE's is {bbox}"


def order_problem(found: Sequence[Any], expected: Sequence[Any]) -> str | None:
    """Say where a file's contents first differ from what is expected; None if nowhere."""
    if found == expected:
        return None
    both = min(len(found), len(expected))
    at = next((i for i in range(both) if found[i] != expected[i]), both)
    here = f"holds {found[at]}" if at < len(found) else "ends"
    there = f"{expected[at]} is expected" if at < len(expected) else "its end is expected"
    return f"{here} where {there} ({len(found)} in all, {len(expected)} expected)"


def difference(found: Any, expected: Any, where: str = "it") -> str | None:
    """Say where two JSON contents first differ, in value or in type; None if nowhere."""
    if isinstance(found, dict) and isinstance(expected, dict) and list(found) == list(expected):
        keys: Any = found
    elif isinstance(found, list) and isinstance(expected, list) and len(found) == len(expected):
        keys = range(len(found))
    elif type(found) is type(expected) and found == expected:
        return None
    else:
        return f"{where} is {_short.repr(found)}, expected {_short.repr(expected)}"
    parts = (difference(found[key], expected[key], f"{where}[{key!r}]") for key in keys)
    return next((part for part in parts if part), None)
