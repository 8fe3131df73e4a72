"""ISAT's JSON: one file per image, an object per polygon.

Traps: objects of one group and category are one thing, as in ISAT's own exports; holes are polygons of the category
`__background__` in a higher layer, and are not cut out, there or here; `iscrowd` may be text.
"""

from collections import Counter
from typing import Any

from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    Parsed,
    Polygons,
    number,
    whole,
)

NAME = "isat"
SUFFIX = ".json"
_BACKGROUND = "__background__"
# By so many pixels a corner may lie outside of its image: tools round, or drag a little too far.
TOLERANCE = 1

Point = tuple[float, float]


def is_this(content: Any) -> bool:
    """Whether JSON is of this format."""
    if not isinstance(content, dict) or not isinstance(content.get("info"), dict):
        return False
    description = str(content["info"].get("description")).strip().lower()
    return description == "isat" and "objects" in content


def read(content: Any, source: str) -> Parsed:
    """Read the objects of one image.

    Args:
        content: of the JSON file.
        source: its name, for messages.

    Raises:
        FormatError: what is wrong, and with which object.
    """
    if not is_this(content):
        raise FormatError(
            f"{source}: no ISAT annotations: expected an object with objects, and info whose description is ISAT"
        )
    info, objects = content["info"], content["objects"]
    if not isinstance(objects, list):
        raise FormatError(f"{source}: objects: {type(objects).__name__} found, a list expected")
    width = whole(info.get("width"), f"{source}: width", 1)
    height = whole(info.get("height"), f"{source}: height", 1)
    groups: dict[Any, list[dict[str, Any]]] = {}
    left_out: Counter[str] = Counter()
    for index, entry in enumerate(objects):
        where = f"{source}: object number {index}"
        key = _thing(entry, index, where)
        if entry["category"] == _BACKGROUND:
            left_out["background objects"] += 1
            continue
        points = corners(entry.get("segmentation"), where, width, height)
        if len(points) < 3:
            raise FormatError(f"{where}: a polygon of {len(points)} points: expected at least 3")
        groups.setdefault(key, []).append(
            {
                "ring": [value for point in points for value in point],
                "layer": _layer(entry, where),
                "crowd": str(entry.get("iscrowd")).lower() in ("true", "1", "1.0"),
            }
        )
    image = AnnotatedImage(
        name=_name(info, source),
        width=width,
        height=height,
        annotations=tuple(_annotation(key, parts) for key, parts in groups.items()),
        source=source,
    )
    return Parsed(format=NAME, tool=NAME, images=(image,), left_out=dict(left_out))


def corners(value: Any, where: str, width: int, height: int) -> list[Point]:
    """Points of a shape of an image of width x height pixels.

    Raises FormatError: no list of [x, y], or one that lies more than a pixel outside of the image.
    """
    if not isinstance(value, list):
        raise FormatError(f"{where}: its points are {str(value)[:60]}: expected a list of [x, y]")
    points: list[Point] = []
    for entry in value:
        if not isinstance(entry, list) or len(entry) != 2:
            raise FormatError(f"{where}: a point is {str(entry)[:60]}: expected [x, y]")
        x, y = (number(one, f"{where}: a point's coordinate") for one in entry)
        if max(-x, -y, x - width, y - height) > TOLERANCE:
            raise FormatError(
                f"{where}: its point {x:g}, {y:g} lies outside of its image of {width} x {height}: "
                f"expected at most {TOLERANCE} pixel beyond the border"
            )
        points.append((x, y))
    return points


def _name(info: dict[str, Any], source: str) -> str:
    name, folder = info.get("name"), info.get("folder") or ""
    if not isinstance(name, str) or not name:
        raise FormatError(f"{source}: info has the name {str(name)[:60]!r}: expected a file's name")
    if not isinstance(folder, str):
        raise FormatError(f"{source}: info has the folder {str(folder)[:60]}: expected text")
    folder = folder.replace("\\", "/").rstrip("/")
    name = name.replace("\\", "/")
    return f"{folder}/{name}" if folder else name


def _thing(entry: Any, index: int, where: str) -> tuple[str | None, Any]:
    """What an object is a part of: a category and a group; or no category and its index."""
    if not isinstance(entry, dict) or not isinstance(entry.get("category"), str):
        raise FormatError(f"{where} is {str(entry)[:60]}: expected an object with a category")
    group = entry.get("group")
    if group is None or group == "":
        return None, index
    if isinstance(group, bool) or not isinstance(group, int | float | str):
        raise FormatError(f"{where}: its group is {str(group)[:60]}: expected a whole number")
    return entry["category"], group


def _layer(entry: dict[str, Any], where: str) -> int | None:
    layer = entry.get("layer")
    return None if layer is None else round(number(layer, f"{where}: its layer"))


def _annotation(key: tuple[str | None, Any], parts: list[dict[str, Any]]) -> Annotation:
    category, group = key
    layers = [part["layer"] for part in parts if part["layer"] is not None]
    return Annotation(
        shapes=(Polygons([part["ring"] for part in parts]),),
        original_id=None if category is None else str(group),
        z_order=max(layers, default=None),
        crowd=any(part["crowd"] for part in parts),
    )
