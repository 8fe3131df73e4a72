"""Regions that a person names, by image: `--boxes extra.json`."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from sa_engine.errors import SaEngineError
from sa_engine.storage import AnyPath

Boxes = Mapping[str, list[list[float]]]


class BoxesError(SaEngineError):
    """A file of regions that cannot be read, or that names an image which is not there."""


def read_boxes(file: Path) -> tuple[Boxes, str]:
    """Read `{"sub/photo.jpg": [[x0, y0, x1, y1], ...], ...}`, pixels of the upright photo.

    Returns:
        The boxes by image, and the file's sha256 (hex).

    Raises:
        BoxesError: it cannot be read, or is of another form; the message says where.
    """
    try:
        data = file.read_bytes()
        content = json.loads(data)
    except OSError as error:
        raise BoxesError(f"boxes {file}: cannot be read: {error.strerror}") from None
    except ValueError as error:
        raise BoxesError(f"boxes {file}: not JSON: {error}") from None
    expected = 'expected {"folder/photo.jpg": [[left, top, right, bottom], ...], ...} in pixels'
    if not isinstance(content, dict):
        raise BoxesError(f"boxes {file}: holds a {type(content).__name__}; {expected}")
    for key, boxes in content.items():
        if not isinstance(boxes, list) or not all(map(_is_box, boxes)):
            raise BoxesError(f"boxes {file}: {key} has {json.dumps(boxes)[:100]}; {expected}")
    return content, hashlib.sha256(data).hexdigest()


def check_known(file: Path, boxes: Boxes, images: AnyPath) -> None:
    """Raise BoxesError if a region's image is not there: a misspelt name would redact nothing."""
    unknown = sorted(key for key in boxes if not (images / key).exists())
    if unknown:
        raise BoxesError(
            f"boxes {file}: there is no {unknown[0]} in {images} ({len(unknown)} such names): "
            "names are paths below --images"
        )


def extra_boxes(file: str | None, images: AnyPath) -> tuple[Boxes, str]:
    """The regions of a file if one is given, checked against the images; and the file's sha256."""
    if file is None:
        return {}, ""
    boxes, sha256 = read_boxes(Path(file))
    check_known(Path(file), boxes, images)
    return boxes, sha256


def _is_box(box: object) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(type(side) in (int, float) for side in box)
        and box[0] < box[2]
        and box[1] < box[3]
    )
