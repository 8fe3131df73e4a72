"""COCO instances: one JSON file with images and annotations; CVAT's and many other tools' exports too.

Written are polygons, from which pycocotools makes the same masks again, or run lengths; beside COCO's fields, each
annotation has ours, as far as they are known.

Traps: several polygons of an annotation are a union, never a hole (cocoapi#153); `counts` may be a list or text, and a
flat `segmentation` of run lengths without a size is not a polygon (CVAT#6014); CVAT marks every brush mask as a crowd.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from sa_engine import rle
from sa_engine.formats import outline
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    NamedImage,
    Parsed,
    Polygons,
    Runs,
    Shape,
    Writing,
    number,
    whole,
)
from sa_engine.records import MaskRecord

NAME = "coco"
SUFFIX = ".json"
_CATEGORY = {"id": 1, "name": "object", "supercategory": "object"}
_OWN_FIELDS = ("id", "segmentation", "area", "bbox")


def is_this(content: Any) -> bool:
    """Whether JSON is of this format."""
    return isinstance(content, dict) and {"images", "annotations"} <= content.keys()


def read(content: Any, source: str) -> Parsed:
    """Read COCO instances.

    Args:
        content: of the JSON file.
        source: its name, for messages.

    Raises:
        FormatError: what is wrong, and with which annotation.
    """
    if not is_this(content):
        raise FormatError(
            f"{source}: no COCO annotations: expected an object with images and annotations"
        )
    images = _by_id(content["images"], source)
    annotations: dict[Any, list[Annotation]] = {image_id: [] for image_id in images}
    left_out: Counter[str] = Counter()
    seen: set[Any] = set()
    for index, entry in enumerate(_list(content["annotations"], f"{source}: annotations")):
        where = f"{source}: annotation {_shown(entry, index)}"
        if not isinstance(entry, dict):
            raise FormatError(f"{where} is no object")
        if entry.get("id") in seen and entry.get("id") is not None:
            raise FormatError(f"{where}: another annotation has the same id")
        seen.add(entry.get("id"))
        image_id = entry.get("image_id")
        if not isinstance(image_id, int | str) or image_id not in images:
            raise FormatError(f"{where} is of image {image_id!r}, and there is no such image")
        if not entry.get("segmentation"):
            left_out["boxes without a mask"] += 1
            continue
        annotations[image_id].append(_annotation(entry, images[image_id], where))
    return Parsed(
        format=NAME,
        tool=tool_of(content),
        images=tuple(
            AnnotatedImage(
                name=image["file_name"],
                width=image.get("width"),
                height=image.get("height"),
                annotations=tuple(annotations[image_id]),
                source=source,
            )
            for image_id, image in images.items()
        ),
        left_out=dict(left_out),
    )


def _by_id(images: Any, source: str) -> dict[Any, dict[str, Any]]:
    found: dict[Any, dict[str, Any]] = {}
    for index, image in enumerate(_list(images, f"{source}: images")):
        where = f"{source}: image {_shown(image, index)}"
        if not isinstance(image, dict) or not isinstance(image.get("id"), int | str):
            raise FormatError(f"{where} has no id")
        if not isinstance(image.get("file_name"), str) or not image["file_name"]:
            raise FormatError(f"{where} has no file_name")
        for side in ("width", "height"):
            if image.get(side) is not None:
                whole(image[side], f"{where}: {side}", 1)
        if image["id"] in found:
            raise FormatError(f"{where}: another image has the same id")
        found[image["id"]] = image
    return found


def _annotation(entry: dict[str, Any], image: dict[str, Any], where: str) -> Annotation:
    attributes: Any = entry.get("attributes")
    attributes = attributes if isinstance(attributes, dict) else {}
    annotator = entry.get("annotator", attributes.get("annotator"))
    return Annotation(
        shapes=(_shape(entry["segmentation"], image, where),),
        original_id=None if entry.get("id") is None else str(entry["id"]),
        annotator=None if annotator is None else str(annotator),
        crowd=bool(entry.get("iscrowd")),
        **_sa1b(entry, where),
    )


def _shape(segmentation: Any, image: dict[str, Any], where: str) -> Shape:
    if isinstance(segmentation, dict):
        return _runs(segmentation, image, where)
    if not isinstance(segmentation, list):
        raise FormatError(
            f"{where}: its segmentation is {str(segmentation)[:60]!r}: expected polygons or RLE"
        )
    if all(isinstance(value, int | float) for value in segmentation):
        raise FormatError(
            f"{where}: its segmentation is one flat list, of run lengths perhaps: expected a list of polygons, or an "
            "object with size and counts"
        )
    for ring in segmentation:
        if not isinstance(ring, list) or len(ring) < 6 or len(ring) % 2:
            raise FormatError(
                f"{where}: a polygon is {str(ring)[:60]}: expected x and y of three points at least"
            )
        for value in ring:
            number(value, f"{where}: a polygon's coordinate")
    return Polygons(segmentation)


def _runs(rle: dict[str, Any], image: dict[str, Any], where: str) -> Runs:
    size, counts = rle.get("size"), rle.get("counts")
    if not isinstance(size, list) or len(size) != 2:
        raise FormatError(f"{where}: its RLE has the size {size!r}: expected [height, width]")
    height, width = (whole(side, f"{where}: its RLE's size", 1) for side in size)
    sides = (image.get("height"), image.get("width"))
    if None not in sides and (height, width) != sides:
        raise FormatError(
            f"{where}: its RLE is {width} x {height}, its image {sides[1]} x {sides[0]}: they must be the same"
        )
    if isinstance(counts, str):
        return Runs(height, width, counts)
    runs = [whole(run, f"{where}: a run of its RLE") for run in _list(counts, f"{where}: counts")]
    if sum(runs) != height * width:
        raise FormatError(
            f"{where}: its RLE has {sum(runs)} pixels, its size {height} x {width} says {height * width}"
        )
    return Runs(height, width, runs)


def _sa1b(entry: dict[str, Any], where: str) -> dict[str, Any]:
    """SA-1B's scores and prompts, if they are there."""
    found: dict[str, Any] = {}
    for name in ("predicted_iou", "stability_score"):
        if entry.get(name) is not None:
            found[name] = number(entry[name], f"{where}: {name}")
    for name in ("point_coords", "crop_box"):
        if entry.get(name) is not None:
            found[name] = entry[name]
    return found


def tool_of(content: dict[str, Any]) -> str | None:
    """The tool that wrote the file, as far as it says so."""
    info = content.get("info") if isinstance(content.get("info"), dict) else {}
    text = json.dumps([info, content.get("licenses")]).lower()
    return next(
        (name for name in ("label studio", "cvat", "labelme", "x-anylabeling") if name in text),
        None,
    )


def _write(
    images: Iterable[NamedImage], writing: Writing, polygons: bool
) -> Iterator[tuple[str, bytes]]:
    """One file; its list of images comes last, so that only this is held in memory."""
    file = "annotations.json"
    head = {
        "info": {"description": "sa-engine"},
        "licenses": [],
        "categories": [_CATEGORY],
    }
    yield file, json.dumps(head)[:-1].encode() + b', "annotations": ['
    entries: list[dict[str, Any]] = []
    comma = b"\n"
    for image in images:
        record = image.record
        entries.append(
            {
                "id": record.image_id,
                "file_name": image.name,
                "width": record.width,
                "height": record.height,
            }
        )
        for mask in record.masks:
            entry = _entry(mask, record.image_id, writing.tolerance, polygons)
            yield file, comma + json.dumps(entry, allow_nan=False).encode()
            comma = b",\n"
    yield file, b'\n], "images": ' + json.dumps(entries).encode() + b"}\n"


write = partial(_write, polygons=True)
write_rle = partial(_write, polygons=False)


def _entry(mask: MaskRecord, image_id: int, tolerance: float, polygons: bool) -> dict[str, Any]:
    segmentation: Any = mask.segmentation
    if polygons:
        rings = outline.edge_rings(rle.decode(mask.segmentation), tolerance)
        segmentation = [ring.reshape(-1).tolist() for ring in rings]
    left, top, width, height = mask.bbox
    ours = {name: value for name, value in vars(mask).items() if value is not None}
    return {
        "id": mask.id,
        "image_id": image_id,
        "category_id": _CATEGORY["id"],
        "iscrowd": 0,
        "bbox": [left, top, width + 1, height + 1],  # SA-1B's is one less
        "area": mask.area,
        "segmentation": segmentation,
        **{name: value for name, value in ours.items() if name not in _OWN_FIELDS},
    }


def _list(value: Any, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise FormatError(f"{what}: {type(value).__name__} found, a list expected")
    return value


def _shown(entry: Any, index: int) -> str:
    return str(entry.get("id", f"number {index}")) if isinstance(entry, dict) else f"number {index}"
