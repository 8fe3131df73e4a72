"""labelme's and X-AnyLabeling's JSON: one file per image, of shapes in its pixels.

Traps: labelme fills polygons with Pillow, which paints their outline too, so they become pixels here and as it does it;
a mask is a PNG of its box, whose corners are inclusive, and of its own size where they are no whole numbers; shapes of
one label and `group_id` are one thing; `imagePath` is relative to the JSON's own folder, and may have backslashes. A
circle may reach beyond its image: it ends at the border, as in labelme.
"""

import base64
import hashlib
import io
import json
import math
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from posixpath import normpath
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from sa_engine import rle
from sa_engine.formats.isat import TOLERANCE, Point, corners
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    NamedImage,
    Parsed,
    Patch,
    Writing,
    whole,
    window,
)
from sa_engine.images import PIXEL_LIMIT
from sa_engine.records import MaskRecord

NAME = "labelme"
SUFFIX = ".json"
# How many points a shape may have.
_CORNERS: dict[str, Sequence[int]] = {
    "polygon": range(3, sys.maxsize),
    "rectangle": (2, 4),
    "circle": (2,),
    "rotation": (4,),
    "oriented_rectangle": (4,),
    "mask": (2,),
}
# No pixel lies inside of the image: who takes the masks in leaves it out, and says so.
_EMPTY = Patch(0, 0, np.zeros((1, 1), bool))
_WITHOUT_AREA = ("line", "linestrip", "point", "points")
# What labelme never writes: of the file, and of a shape.
_XANY_FILE = {"chat_history", "vqaData", "checked"}
_XANY_SHAPE = {"score", "difficult", "attributes", "kie_linking"}


def is_this(content: Any) -> bool:
    """Whether JSON is of this format."""
    return isinstance(content, dict) and {"shapes", "imagePath"} <= content.keys()


def read(content: Any, source: str) -> Parsed:
    """Read the shapes of one image.

    Args:
        content: of the JSON file.
        source: its name, for messages.

    Raises:
        FormatError: what is wrong, and with which shape.
    """
    if not is_this(content):
        raise FormatError(
            f"{source}: no labelme annotations: expected an object with shapes and imagePath"
        )
    name, shapes = content["imagePath"], content["shapes"]
    if not isinstance(name, str) or not name:
        raise FormatError(f"{source}: imagePath is {str(name)[:60]!r}: expected a file's name")
    if not isinstance(shapes, list):
        raise FormatError(f"{source}: shapes: {type(shapes).__name__} found, a list expected")
    width = whole(content.get("imageWidth"), f"{source}: imageWidth", 1)
    height = whole(content.get("imageHeight"), f"{source}: imageHeight", 1)
    if width * height > PIXEL_LIMIT:
        raise FormatError(
            f"{source}: an image of {width} x {height} pixels: at most {PIXEL_LIMIT:,} are read"
        )
    canvas = Image.new("L", (width, height))
    parts: dict[Any, list[Patch]] = {}
    left_out: Counter[str] = Counter()
    for index, shape in enumerate(shapes):
        where = f"{source}: shape number {index}"
        key = _thing(shape, index, where)
        kind = shape.get("shape_type") or "polygon"
        if kind in _WITHOUT_AREA:
            left_out[f"{kind} shapes, which have no area"] += 1
        else:
            parts.setdefault(key, []).append(_patch(shape, kind, canvas, where))
    image = AnnotatedImage(
        name=_path(name.replace("\\", "/"), source),
        width=width,
        height=height,
        annotations=tuple(
            Annotation(shapes=tuple(patches), original_id=None if label is None else str(group))
            for (label, group), patches in parts.items()
        ),
        source=source,
        sha256=_sha256(content.get("imageData")),
    )
    return Parsed(format=NAME, tool=_tool(content), images=(image,), left_out=dict(left_out))


def _path(name: str, source: str) -> str:
    """Of a picture, by the file that it is named in, so that its folders are known."""
    return normpath(str(PurePosixPath(source).parent / name))


def _sha256(value: Any) -> str | None:
    """Of the picture in `imageData`; None if there is none, or if it is damaged."""
    if not isinstance(value, str) or not value:
        return None
    try:
        return hashlib.sha256(base64.b64decode(value, validate=True)).hexdigest()
    except ValueError:
        return None


def _thing(shape: Any, index: int, where: str) -> tuple[str | None, Any]:
    """What a shape is a part of: a label and a group; or no label and its index."""
    if not isinstance(shape, dict) or not isinstance(shape.get("label"), str):
        raise FormatError(f"{where} is {str(shape)[:60]}: expected an object with a label")
    group = shape.get("group_id")
    if group is None:
        return None, index
    if isinstance(group, bool) or not isinstance(group, int | str):
        raise FormatError(f"{where}: group_id is {str(group)[:60]}: expected a whole number")
    return shape["label"], group


def _patch(shape: dict[str, Any], kind: Any, canvas: Image.Image, where: str) -> Patch:
    if not isinstance(kind, str) or kind not in _CORNERS:
        known = ", ".join((*_CORNERS, *_WITHOUT_AREA))
        raise FormatError(f"{where}: shape_type is {str(kind)[:60]!r}: expected one of {known}")
    points = corners(shape.get("points"), where, *canvas.size)
    if len(points) not in _CORNERS[kind]:
        raise FormatError(f"{where}: a {kind} of {len(points)} points: expected {_expected(kind)}")
    if kind == "mask":
        return _stored(shape.get("mask"), points, canvas.size, where)
    xs, ys = [x for x, _ in points], [y for _, y in points]
    box = (min(xs), min(ys), max(xs), max(ys))
    draw = ImageDraw.Draw(canvas)
    if kind == "circle":
        (x, y), radius = points[0], math.dist(*points)
        box = (x - radius, y - radius, x + radius, y + radius)
        draw.ellipse(box, outline=1, fill=1)
    elif len(points) == 2:
        draw.rectangle(box, outline=1, fill=1)
    else:
        draw.polygon(points, outline=1, fill=1)
    # Drawn where it lies, as Pillow's rounding is not the same elsewhere; the canvas is then wiped for the next.
    left, top = (max(math.floor(value) - 1, 0) for value in box[:2])
    right = min(math.ceil(box[2]) + 2, canvas.width)
    bottom = min(math.ceil(box[3]) + 2, canvas.height)
    drawn = canvas.crop((left, top, right, bottom))
    canvas.paste(0, (left, top, right, bottom))
    tight = drawn.getbbox()
    if tight is None:
        return _EMPTY
    return Patch(left + tight[0], top + tight[1], np.asarray(drawn.crop(tight), bool))


def _expected(kind: str) -> str:
    return "at least 3" if kind == "polygon" else " or ".join(map(str, _CORNERS[kind]))


def _stored(value: Any, points: list[Point], size: tuple[int, int], where: str) -> Patch:
    """The mask of a PNG, at its place."""
    left, top = map(round, points[0])
    try:
        with Image.open(io.BytesIO(base64.b64decode(value, validate=True)), formats=["PNG"]) as png:
            w, h = png.size
            # Refused before it is unpacked: a small PNG may hold more pixels than there is memory.
            _check_extent((w, h), points, size, where)
            if png.mode not in ("1", "L", "P"):
                raise FormatError(f"{where}: its mask is a PNG of mode {png.mode}: expected L")
            pixels = np.asarray(png) != 0
    except FormatError:
        raise
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise FormatError(f"{where}: its mask is no PNG in base64: {error}") from None
    x, y = max(left, 0), max(top, 0)
    inside = pixels[y - top : size[1] - top, x - left : size[0] - left]
    return Patch(x, y, inside) if inside.any() else _EMPTY


def _check_extent(
    extent: tuple[int, int], points: list[Point], size: tuple[int, int], where: str
) -> None:
    (x1, y1), (x2, y2) = points
    w, h = extent
    whole_numbers = all(value.is_integer() for point in points for value in point)
    if whole_numbers and extent != (x2 - x1 + 1, y2 - y1 + 1):
        raise FormatError(
            f"{where}: its mask has {w} x {h} pixels, its corners {x1:g}, {y1:g} and {x2:g}, {y2:g} "
            f"say {x2 - x1 + 1:g} x {y2 - y1 + 1:g}"
        )
    if max(round(x1) + w - size[0], round(y1) + h - size[1]) > TOLERANCE:
        raise FormatError(
            f"{where}: its mask of {w} x {h} pixels at {x1:g}, {y1:g} reaches beyond its image of {size[0]} x {size[1]}"
        )


def _tool(content: dict[str, Any]) -> str:
    told = any(_XANY_SHAPE & shape.keys() for shape in content["shapes"])
    return "x-anylabeling" if told or _XANY_FILE & content.keys() else "labelme"


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A file for each image, beside its picture; a mask's id is its `group_id`, so that it comes back."""
    for image in images:
        name = PurePosixPath(image.name)
        content: dict[str, Any] = {
            "version": "5.5.0",
            "flags": {},
            "shapes": [_shape(mask) for mask in image.record.masks],
            "imagePath": name.name,
            "imageData": None,
            "imageHeight": image.record.height,
            "imageWidth": image.record.width,
        }
        for mask in image.record.masks:
            writing.lost["scores of masks"] += mask.predicted_iou is not None
            writing.lost["times of masks"] += mask.time_s is not None
            writing.lost["annotators of masks"] += mask.annotator is not None
            writing.lost["z-order of masks"] += mask.z_order is not None
        yield str(name.with_suffix(SUFFIX)), json.dumps(content, ensure_ascii=False).encode()


def _shape(mask: MaskRecord) -> dict[str, Any]:
    left, top, right, bottom = window(mask)
    pixels = rle.decode(mask.segmentation)[top : bottom + 1, left : right + 1]
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8) * 255).save(buffer, format="PNG")
    return {
        "label": "object",
        "points": [[left, top], [right, bottom]],
        "group_id": mask.id,
        "description": "",
        "shape_type": "mask",
        "flags": {},
        "mask": base64.b64encode(buffer.getvalue()).decode(),
    }
