"""Regions that a person names, by image: `--boxes extra.json`."""

import json
import math
from collections.abc import Mapping
from pathlib import Path

from sa_engine.config import PrivacyConfig, RunConfig
from sa_engine.errors import SaEngineError
from sa_engine.run_dir import planned_keys

Boxes = Mapping[str, list[list[float]]]


class BoxesError(SaEngineError):
    """A file of regions that cannot be read, or that names an image which is not there."""


def read_boxes(file: Path) -> Boxes:
    """Read `{"sub/photo.jpg": [[x0, y0, x1, y1], ...], ...}`, pixels of the upright photo.

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
    expected = 'expected {"folder/photo.jpg": [[left, top, right, bottom], ...], ...} in pixels'
    if not isinstance(content, dict):
        raise BoxesError(f"boxes {file}: holds a {type(content).__name__}; {expected}")
    for key, boxes in content.items():
        if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
            raise BoxesError(f"boxes {file}: {key} has {json.dumps(boxes)[:100]}; {expected}")
    return content


def extra_boxes(config: PrivacyConfig, run: RunConfig) -> Boxes:
    """The regions of the file that a stage was given, if it was, by image of its run.

    Raises BoxesError if a region's image is none of the run's: a misspelt name would redact nothing.
    """
    if config.extra_boxes is None:
        return {}
    file = Path(config.extra_boxes)
    boxes = read_boxes(file)
    unknown = sorted(set(boxes) - set(planned_keys(run)))
    if unknown:
        raise BoxesError(
            f"boxes {file}: there is no {unknown[0][:200]} among the images of {run.images} "
            f"({len(unknown)} such names): names are paths below --images"
        )
    return boxes


class _Twice(Exception):
    """A name that a JSON object has twice."""


def _once(pairs: list[tuple[str, object]]) -> dict[str, object]:
    content: dict[str, object] = {}
    for name, value in pairs:
        if name in content:
            raise _Twice(name)
        content[name] = value
    return content


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(side) in (int, float) and math.isfinite(side) for side in box)
        and box[0] < box[2]
        and box[1] < box[3]
    )
