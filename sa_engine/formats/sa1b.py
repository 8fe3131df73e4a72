"""SA-1B's JSON: one file per image, alone or in tars; what our own shards hold."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from typing import Any

from sa_engine.formats import coco
from sa_engine.formats.model import FormatError, NamedImage, Parsed, Writing
from sa_engine.records import MISSING_SCORE, sa1b_json

NAME = "sa1b"
SUFFIX = ".json"


def is_this(content: Any) -> bool:
    """Whether JSON is of this format."""
    return isinstance(content, dict) and {"image", "annotations"} <= content.keys()


def read(content: Any, source: str) -> Parsed:
    """Read one image's masks.

    Raises FormatError: what is wrong, and with which annotation.
    """
    if not is_this(content) or not isinstance(content["image"], dict):
        raise FormatError(
            f"{source}: no SA-1B annotations: expected an object with image and annotations"
        )
    image = dict(content["image"])
    image["id"] = image.get("image_id")
    annotations = content["annotations"]
    if not isinstance(annotations, list) or not all(isinstance(one, dict) for one in annotations):
        raise FormatError(f"{source}: annotations: expected a list of objects")
    rows = [{**one, "image_id": image["id"]} for one in annotations]
    for row in rows:
        for name in ("predicted_iou", "stability_score"):
            if row.get(name) == MISSING_SCORE:
                row[name] = None
    parsed = coco.read({"images": [image], "annotations": rows}, source)
    return Parsed(format=NAME, tool=None, images=parsed.images, left_out=parsed.left_out)


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A file for each image, beside its picture."""
    for image in images:
        name = PurePosixPath(image.name)
        for mask in image.record.masks:
            writing.lost["who, when and how of masks"] += bool(mask.annotator or mask.time_s)
        yield str(name.with_suffix(SUFFIX)), sa1b_json(replace(image.record, file_name=name.name))
