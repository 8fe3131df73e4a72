"""Boxes given by image in a file: regions to redact, or what a detector found: `--boxes FILE`."""

import bisect
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from sa_engine.errors import SaEngineError
from sa_engine.option_groups import PrivacyConfig, RunConfig
from sa_engine.run_dir import planned_keys


class BoxesError(SaEngineError):
    """A file of regions that cannot be read, or that names an image which is not there."""


class Boxes:
    """Boxes by image, in arrays: millions of them travel to workers without a Python object for each number.

    Args:
        given: by image, boxes of four numbers, and a fifth where they have a score.
    """

    def __init__(self, given: Mapping[str, Sequence[Sequence[float]]] | None = None) -> None:
        given = given or {}
        names = sorted(given)
        encoded = [name.encode("utf-8", "surrogatepass") for name in names]
        rows = [[*box, math.nan][:5] for name in names for box in given[name]]
        self._text = b"".join(encoded)
        self._letters = np.cumsum(
            [0, *map(len, encoded)]
        )  # where a name begins, and the one before ends
        self._ends = np.cumsum([0, *(len(given[name]) for name in names)])
        self._rows = np.array(rows, np.float64).reshape(-1, 5)

    def of(self, image: str) -> np.ndarray:
        """Of an image, (N, 5) float64: left, top, right, bottom, and the score, not a number where there is none."""
        place = bisect.bisect_left(range(len(self)), image, key=self._name)
        if place == len(self) or self._name(place) != image:
            return self._rows[:0]
        return self._rows[self._ends[place] : self._ends[place + 1]]

    def missing(self, images: Iterable[str]) -> list[str]:
        """Names that are none of these images', sorted."""
        there = set(images)
        return [name for name in map(self._name, range(len(self))) if name not in there]

    def __len__(self) -> int:
        """Images that are named."""
        return len(self._ends) - 1

    def _name(self, place: int) -> str:
        return self._text[self._letters[place] : self._letters[place + 1]].decode(
            "utf-8", "surrogatepass"
        )


def read_boxes(file: Path, scored: bool = False) -> Boxes:
    """Read `{"sub/photo.jpg": [[x0, y0, x1, y1], ...], ...}`, pixels of the upright photo.

    Args:
        file: JSON.
        scored: a box may have its score, 0 to 1, as a fifth number.

    Returns:
        The boxes by image.

    Raises:
        BoxesError: it cannot be read, or is of another form; the message says where.
    """
    try:
        content = json.loads(file.read_bytes(), object_pairs_hook=_once)
    except OSError as error:
        raise BoxesError(f"boxes {file}: cannot be read: {error.strerror}") from None
    except _Twice as error:
        raise BoxesError(f"boxes {file}: names {error} twice") from None
    except (ValueError, RecursionError) as error:
        raise BoxesError(f"boxes {file}: not JSON: {error}") from None
    numbers = "left, top, right, bottom" + ", score from 0 to 1" * scored
    expected = f'expected {{"folder/photo.jpg": [[{numbers}], ...], ...}} in pixels'
    if not isinstance(content, dict):
        raise BoxesError(f"boxes {file}: holds a {type(content).__name__}; {expected}")
    for key, boxes in content.items():
        if not isinstance(boxes, list) or not all(_is_box(box, scored) for box in boxes):
            raise BoxesError(f"boxes {file}: {key} has {json.dumps(boxes)[:100]}; {expected}")
    return Boxes(content)


def boxes_of_run(file: Path, run: RunConfig, scored: bool = False) -> Boxes:
    """The boxes of a file, by image of a run.

    Raises BoxesError also if a box's image is none of the run's: a misspelt name would be nothing at all.
    """
    boxes = read_boxes(file, scored)
    unknown = boxes.missing(planned_keys(run))
    if unknown:
        raise BoxesError(
            f"boxes {file}: there is no {unknown[0][:200]} among the images of {run.images} "
            f"({len(unknown)} such names): names are paths below --images"
        )
    return boxes


def extra_boxes(config: PrivacyConfig, run: RunConfig) -> Boxes:
    """The regions to redact of the file that a stage was given, if it was. Raises BoxesError."""
    return Boxes() if config.extra_boxes is None else boxes_of_run(Path(config.extra_boxes), run)


class _Twice(Exception):
    """A name that a JSON object has twice."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for name, value in pairs:
        if name in content:
            raise _Twice(name)
        content[name] = value
    return content


def _is_box(box: object, scored: bool) -> bool:
    return (
        isinstance(box, list)
        and len(box) in ((4, 5) if scored else (4,))
        and all(type(side) in (int, float) and math.isfinite(side) for side in box)
        and box[0] < box[2]
        and box[1] < box[3]
        and (len(box) == 4 or 0 <= box[4] <= 1)
    )
