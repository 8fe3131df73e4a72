"""CVAT for images 1.1: one XML file with images, their masks and their polygons.

Traps: the runs of a mask are row-major and of its tight box alone, not of the image; shapes of one group are one
object; tracks are of videos.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple
from xml.etree.ElementTree import Element, SubElement, indent, tostring

import numpy as np

from sa_engine import rle
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    NamedImage,
    Parsed,
    Patch,
    Polygons,
    Shape,
    Writing,
    number,
    whole,
    window,
)
from sa_engine.images import PIXEL_LIMIT
from sa_engine.records import MaskRecord

NAME = "cvat"
SUFFIX = ".xml"
_VERSION = "1.1"
_ID = "sa_mask_id"  # the attribute by which a mask's id comes back
_BY_PEOPLE = (None, "manual", "assisted")
_LABELS: list[dict[str, Any]] = [
    {
        "name": "object",
        "type": "any",
        "attributes": [
            {
                "name": _ID,
                "input_type": "text",
                "mutable": False,
                "values": [""],
                "default_value": "",
            }
        ],
    }
]
_NO_MASKS = {
    "box": "boxes",
    "cuboid": "cuboids",
    "ellipse": "ellipses",
    "points": "points",
    "polyline": "polylines",
    "skeleton": "skeletons",
    "tag": "tags",
}
_NUMBER = re.compile(r"\s*[-+]?[0-9]+(\.[0-9]*)?([eE][-+]?[0-9]+)?\s*", re.ASCII)
_RUNS = re.compile(r"\s*[0-9]{1,10}\s*(,\s*[0-9]{1,10}\s*)*", re.ASCII)


class _Member(NamedTuple):
    """A shape of a group."""

    shape: Shape
    z_order: int | None
    original_id: str | None


def is_this(content: Any) -> bool:
    """Whether XML is of this format."""
    return (
        isinstance(content, Element)
        and content.tag == "annotations"
        and content.find("version") is not None
    )


def read(content: Any, source: str) -> Parsed:
    """Read CVAT for images.

    Args:
        content: root element of the XML file.
        source: its name, for messages.

    Raises:
        FormatError: what is wrong, and with which shape of which image.
    """
    if not is_this(content):
        raise FormatError(
            f"{source}: no CVAT annotations: expected the element annotations with a version"
        )
    version = (content.findtext("version") or "").strip()
    if version != _VERSION:
        raise FormatError(f"{source}: version {version[:20]!r} of CVAT's XML: expected {_VERSION}")
    if content.find("track") is not None:
        raise FormatError(
            f"{source}: tracks of a video, and masks of images are expected: export the task as "
            "'CVAT for images 1.1'"
        )
    left_out: Counter[str] = Counter()
    return Parsed(
        format=NAME,
        tool="cvat",
        images=tuple(
            _image(element, index, content.find("meta"), source, left_out)
            for index, element in enumerate(content.findall("image"))
        ),
        left_out=dict(left_out),
    )


def _image(
    element: Element, index: int, meta: Element | None, source: str, left_out: Counter[str]
) -> AnnotatedImage:
    name = element.get("name")
    if not name:
        raise FormatError(f"{source}: image {element.get('id', f'number {index}')} has no name")
    where = f"{source}: image {name}"
    width, height = (_whole(element, side, where, 1) for side in ("width", "height"))
    if width * height > PIXEL_LIMIT:
        raise FormatError(f"{where}: {width} x {height} is more than {PIXEL_LIMIT:,} pixels")
    annotator = _annotator(meta, element.get("task_id"))
    # Shapes by their group; those without one by their place.
    groups: dict[tuple[bool, int], list[_Member]] = {}
    for place, entry in enumerate(element):
        if entry.tag in _NO_MASKS:
            left_out[_NO_MASKS[entry.tag]] += 1
            continue
        at = f"{where}: {entry.tag} number {place}"
        if entry.tag not in _SHAPES:
            raise FormatError(f"{at}: no shape of CVAT: expected a mask or a polygon")
        shape = _SHAPES[entry.tag](entry, width, height, at)
        group = _whole(entry, "group_id", at) if entry.get("group_id") else 0
        z_order = _whole(entry, "z_order", at, -(2**31)) if entry.get("z_order") else None
        member = _Member(shape, z_order, _original_id(entry))
        groups.setdefault((True, group) if group else (False, place), []).append(member)
    return AnnotatedImage(
        name=name,
        width=width,
        height=height,
        annotations=tuple(_annotation(members, annotator) for members in groups.values()),
        source=source,
    )


def _original_id(entry: Element) -> str | None:
    values = (one.text for one in entry.findall("attribute") if one.get("name") == _ID)
    return next((value.strip() for value in values if value and value.strip()), None)


def _annotation(members: list[_Member], annotator: str | None) -> Annotation:
    ids = {one.original_id for one in members}
    return Annotation(
        shapes=tuple(one.shape for one in members),
        original_id=ids.pop() if len(ids) == 1 else None,
        annotator=annotator,
        z_order=max((one.z_order for one in members if one.z_order is not None), default=None),
    )


def _mask(entry: Element, width: int, height: int, where: str) -> Patch:
    left, top = (_whole(entry, name, where) for name in ("left", "top"))
    w, h = (_whole(entry, name, where, 1) for name in ("width", "height"))
    if left + w > width or top + h > height:
        raise FormatError(
            f"{where}: its box of {w} x {h} pixels at {left}, {top} reaches beyond its image of {width} x {height}"
        )
    text = entry.get("rle", "")
    if not _RUNS.fullmatch(text):
        raise FormatError(f"{where}: its rle is {text[:60]!r}: expected run lengths with commas")
    runs = np.array(text.split(","), np.int64)
    if runs.max() > w * h or runs.sum() != w * h:
        raise FormatError(
            f"{where}: its rle has {sum(runs.tolist())} pixels, its box {w} x {h} says {w * h}"
        )
    return Patch(left, top, np.repeat(np.arange(len(runs)) % 2 == 1, runs).reshape(h, w))


def _polygon(entry: Element, width: int, height: int, where: str) -> Polygons:
    ring: list[float] = []
    for point in entry.get("points", "").split(";"):
        pair = point.split(",")
        if len(pair) != 2:
            raise FormatError(f"{where}: a point is {point[:60]!r}: expected x,y")
        for text, side in zip(pair, (width, height), strict=True):
            value = _number(text, f"{where}: a coordinate")
            if not -side <= value <= 2 * side:
                raise FormatError(
                    f"{where}: a coordinate is {value:g}, far outside of its image of {width} x {height}"
                )
            ring.append(value)
    if len(ring) < 6:
        raise FormatError(f"{where}: {len(ring) // 2} points: expected three at least")
    return Polygons([ring])


_SHAPES: dict[str, Callable[[Element, int, int, str], Shape]] = {"mask": _mask, "polygon": _polygon}


def _annotator(meta: Element | None, task_id: str | None) -> str | None:
    """The assignee, else the owner: of the image's task if it is known. None if there are several."""
    if meta is None:
        return None
    of_task = [task for task in meta.iter("task") if task_id and task.findtext("id") == task_id]
    scope = of_task[0] if of_task else meta
    for role in ("assignee", "owner"):
        found = {(user.findtext("username") or "").strip() for user in scope.iter(role)} - {""}
        if found:
            return found.pop() if len(found) == 1 else None
    return None


def _whole(element: Element, name: str, where: str, low: int = 0) -> int:
    text = element.get(name)
    if text is None:
        raise FormatError(f"{where} has no {name}: expected a whole number")
    return whole(_number(text, f"{where}: {name}"), f"{where}: {name}", low)


def _number(text: str, what: str) -> float:
    if not _NUMBER.fullmatch(text):
        raise FormatError(f"{what} is {text[:60]!r}: expected a number")
    return number(float(text), what)


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """`annotations.xml`, and `labels.txt` for CVAT's constructor of labels, without which it drops the ids."""
    file = "annotations.xml"
    yield "labels.txt", json.dumps(_LABELS, indent=1).encode()
    head = (
        f'<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>{_VERSION}</version>\n'
    )
    yield file, head.encode() + tostring(_meta()) + b"\n"
    for number_, image in enumerate(images):
        element = Element("image", id=str(number_), name=image.name)
        element.set("width", str(image.record.width))
        element.set("height", str(image.record.height))
        for mask in image.record.masks:
            element.append(_element(mask))
            writing.lost["scores of masks"] += mask.predicted_iou is not None
            writing.lost["times of masks"] += mask.time_s is not None
            writing.lost["annotators of masks"] += mask.annotator is not None
        indent(element)
        yield file, tostring(element, encoding="unicode").encode() + b"\n"
    yield file, b"</annotations>\n"


def _meta() -> Element:
    """The labels once more: datumaro, and CVAT where a project takes the file, read no XML without them."""
    meta = Element("meta")
    labels = SubElement(SubElement(meta, "task"), "labels")
    for label in _LABELS:
        entry = SubElement(labels, "label")
        SubElement(entry, "name").text = label["name"]
        attributes = SubElement(entry, "attributes")
        for one in label["attributes"]:
            attribute = SubElement(attributes, "attribute")
            SubElement(attribute, "name").text = one["name"]
            SubElement(attribute, "mutable").text = str(one["mutable"])
            SubElement(attribute, "input_type").text = one["input_type"]
            SubElement(attribute, "default_value").text = one["default_value"]
            SubElement(attribute, "values").text = "\n".join(one["values"])
    indent(meta)
    return meta


def _element(mask: MaskRecord) -> Element:
    left, top, right, bottom = window(mask)
    flat = rle.decode(mask.segmentation)[top : bottom + 1, left : right + 1].reshape(-1)
    edges = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    element = Element(
        "mask",
        label="object",
        source="manual" if mask.source in _BY_PEOPLE else "auto",
        occluded="0",
        rle=", ".join(map(str, [0, *runs] if flat[0] else runs)),
        left=str(left),
        top=str(top),
        width=str(right - left + 1),
        height=str(bottom - top + 1),
    )
    if mask.z_order is not None:
        element.set("z_order", str(mask.z_order))
    SubElement(element, "attribute", name=_ID).text = str(mask.id)
    return element
