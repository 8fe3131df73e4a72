"""Label Studio's own JSON: a list of tasks, each with the annotations of one or more annotators.

Traps: a task that was skipped or never submitted looks like one in which all was deleted; polygons are in percent of
the image; a region's further answers repeat its shape under another type; times are of a whole annotation;
`file_upload` is the image, or the file of tasks that was imported; the JSON-MIN and COCO exports say less, and the
latter loses holes.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any
from urllib.parse import quote

from sa_engine import rle
from sa_engine.formats.brush import decode_brush, encode_brush
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    NamedImage,
    Parsed,
    Polygons,
    Runs,
    Writing,
    number,
    whole,
)
from sa_engine.images import PIXEL_LIMIT
from sa_engine.records import ImageRecord, MaskRecord

NAME = "label-studio"
SUFFIX = ".json"
TOOL = "label studio"
_BRUSHES = ("brushlabels", "brush")
_POLYGONS = ("polygonlabels", "polygon")
_PLACE = re.compile(r"://|\?d=|\.\w{2,5}$", re.ASCII)
# Of an import of tasks, each has the name of the imported file as its upload.
_LISTS = (".json", ".jsonl", ".csv", ".tsv", ".txt")
_Size = tuple[int, int]  # width, height
_FROM, _TO = "brush", "image"
_CONFIG = f"""<View>
  <Image name="{_TO}" value="${_TO}" zoom="true"/>
  <BrushLabels name="{_FROM}" toName="{_TO}"><Label value="object"/></BrushLabels>
</View>
"""
_BY_MODELS = ("automatic", "semi-automatic")
_FAR = 100  # percent of a side that a corner may lie outside


def is_this(content: Any) -> bool:
    """Whether JSON is of this format, or of its smaller form JSON-MIN, which `read` refuses."""
    return isinstance(content, list) and all(isinstance(task, dict) for task in content)


def read(content: Any, source: str) -> Parsed:
    """Read tasks.

    Args:
        content: of the JSON file.
        source: its name, for messages.

    Raises:
        FormatError: what is wrong, and with which region of which task.
    """
    if not is_this(content):
        raise FormatError(f"{source}: no Label Studio annotations: expected a list of tasks")
    left_out: Counter[str] = Counter()
    return Parsed(
        format=NAME,
        tool=TOOL,
        images=tuple(
            _image(task, f"{source}: task {task.get('id', f'number {index}')}", source, left_out)
            for index, task in enumerate(content)
        ),
        left_out=dict(left_out),
    )


def _image(task: dict[str, Any], where: str, source: str, left_out: Counter[str]) -> AnnotatedImage:
    if "annotations" not in task:
        raise FormatError(
            f"{where} has no annotations, as in JSON-MIN: export JSON from Label Studio, which has the sizes of images"
        )
    for what in ("drafts", "predictions"):
        if isinstance(task.get(what), list) and task[what]:
            left_out[what] += len(task[what])
    size: _Size | None = None
    submitted = False
    masks: list[Annotation] = []
    keys: list[str] = []
    for index, entry in enumerate(_objects(task["annotations"], f"{where}: annotations")):
        at = f"{where}: annotation {entry.get('id', f'number {index}')}"
        if entry.get("was_cancelled"):
            left_out["cancelled annotations"] += 1
            continue
        submitted = True
        regions = _objects(entry.get("result"), f"{at}: result")
        keys += [str(region.get("to_name")) for region in regions]
        for place, region in enumerate(regions):
            size = _agreed(size, region, f"{at}: region {region.get('id', f'number {place}')}")
        masks += _masks(entry, regions, size, at, left_out)
    if not submitted:
        left_out["tasks that were skipped or not submitted"] += 1
    width, height = size or (None, None)
    return AnnotatedImage(
        name=_name(task, where, keys),
        width=width,
        height=height,
        annotations=tuple(masks),
        source=source,
        submitted=submitted,
    )


def _masks(
    entry: dict[str, Any],
    regions: list[dict[str, Any]],
    size: _Size | None,
    where: str,
    left_out: Counter[str],
) -> list[Annotation]:
    time_s = entry.get("lead_time")
    if time_s is not None:
        time_s = number(time_s, f"{where}: lead_time", 0)
    annotator = _annotator(entry.get("completed_by"), where)
    found: list[Annotation] = []
    for index, region in enumerate(regions):
        at = f"{where}: region {region.get('id', f'number {index}')}"
        kind = region.get("type")
        if kind not in _BRUSHES + _POLYGONS:
            left_out[str(kind)[:60]] += 1
            continue
        if region.get("original_width") is None or size is None:
            raise FormatError(f"{at} has no original_width and original_height")
        (value,) = _objects([region.get("value")], f"{at}: value")
        shape = _brush(value, size, at) if kind in _BRUSHES else _polygon(value, size, at)
        found.append(
            Annotation(
                shapes=(shape,),
                original_id=None if region.get("id") is None else str(region["id"]),
                annotator=annotator,
                time_s=time_s,
                time_scope=None if time_s is None else "image",
            )
        )
    return found


def _agreed(size: _Size | None, region: dict[str, Any], where: str) -> _Size | None:
    """The size of the task's image, after one more region."""
    if region.get("item_index"):
        raise FormatError(f"{where} is of a task's second image: expected one image in a task")
    if region.get("image_rotation"):
        raise FormatError(
            f"{where} was drawn on an image that was turned by {region['image_rotation']} degrees in Label Studio: "
            "expected 0"
        )
    sides = region.get("original_width"), region.get("original_height")
    if sides == (None, None):
        return size
    width, height = (whole(side, f"{where}: its original size", 1) for side in sides)
    if width * height > PIXEL_LIMIT:
        raise FormatError(f"{where}: {width} x {height} is more than {PIXEL_LIMIT:,} pixels")
    if size not in (None, (width, height)):
        raise FormatError(f"{where}: its image is {width} x {height}, but {size} one region before")
    return width, height


def _brush(value: dict[str, Any], size: _Size, where: str) -> Runs:
    """As COCO's compressed text: all masks of a large export are in memory at once."""
    if value.get("format") != "rle":
        raise FormatError(f"{where}: its format is {value.get('format')!r}: expected 'rle'")
    width, height = size
    mask = decode_brush(value.get("rle", []), height, width, where)
    return Runs(height, width, rle.encode(mask)["counts"])


def _polygon(value: dict[str, Any], size: _Size, where: str) -> Polygons:
    points = value.get("points")
    if not isinstance(points, list) or len(points) < 3:
        raise FormatError(f"{where}: its points are {str(points)[:60]}: expected three at least")
    ring: list[float] = []
    for point in points:
        if not isinstance(point, list) or len(point) != 2:
            raise FormatError(f"{where}: a point is {str(point)[:60]}: expected [x, y] in percent")
        for percent, side in zip(point, size, strict=True):
            found = number(percent, f"{where}: a coordinate", -_FAR)
            if found > 100 + _FAR:
                raise FormatError(f"{where}: a coordinate is {found:g}: expected percent")
            ring.append(found * side / 100)
    return Polygons([ring])


def _annotator(user: Any, where: str) -> str | None:
    if isinstance(user, dict):
        user = next((user[key] for key in ("email", "username", "id") if user.get(key)), None)
    if not isinstance(user, int | str | None):
        raise FormatError(f"{where}: completed_by is {str(user)[:60]!r}: expected a user")
    return None if user is None else str(user)


def _name(task: dict[str, Any], where: str, keys: list[str]) -> str:
    """Of the image: of its upload, else of the data at these keys, else the first that looks like one."""
    upload = task.get("file_upload")
    if isinstance(upload, str) and upload and not upload.lower().endswith(_LISTS):
        return upload
    data = task.get("data")
    if not isinstance(data, dict):
        raise FormatError(f"{where}: its data is {str(data)[:60]!r}: expected an object")
    texts = [data.get(key) for key in (*keys, "image")]
    texts += [text for text in data.values() if isinstance(text, str) and _PLACE.search(text)]
    for text in texts:
        if isinstance(text, str) and text and not text.startswith("data:"):
            return text
    raise FormatError(f"{where}: no file_upload, nor an image's path in its data: {str(data)[:60]}")


def _objects(value: Any, what: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(one, dict) for one in value):
        raise FormatError(f"{what}: {str(value)[:60]!r} found, a list of objects expected")
    return value


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """`tasks.json`, and `labeling_config.txt` for the project. Pictures are sought in Label Studio's local files.

    Masks that people drew are annotations, one of each annotator and time, and an empty one where they drew none; those
    of models are predictions. Who drew them stays out: Label Studio takes no user that it does not know.
    """
    yield "labeling_config.txt", _CONFIG.encode()
    comma = b"[\n"
    for image in images:
        path = f"{writing.pictures}/{image.name}" if writing.pictures else image.name
        by_models = [mask for mask in image.record.masks if mask.source in _BY_MODELS]
        people: dict[tuple[str | None, float | None], list[MaskRecord]] = {}
        if writing.by_people and not image.record.masks:
            people[None, None] = []  # else nobody would have looked at it
        for mask in image.record.masks:
            if mask.source not in _BY_MODELS:
                time_s = mask.time_s if mask.time_scope == "image" else None
                writing.lost["times of single masks"] += mask.time_scope == "mask"
                people.setdefault((mask.annotator, time_s), []).append(mask)
            writing.lost["annotators of masks"] += mask.annotator is not None
            writing.lost["z-order of masks"] += mask.z_order is not None
            writing.lost["stability scores of masks"] += mask.stability_score is not None
        task: dict[str, Any] = {
            "data": {_TO: f"/data/local-files/?d={quote(path)}"},
            "annotations": [
                {
                    "result": [_region(mask, image.record) for mask in masks],
                    **({} if time_s is None else {"lead_time": time_s}),
                }
                for (_, time_s), masks in people.items()
            ],
            "predictions": [],
        }
        if by_models:
            result = [_region(mask, image.record) for mask in by_models]
            task["predictions"] = [{"model_version": "sa-engine", "result": result}]
        yield "tasks.json", comma + json.dumps(task, ensure_ascii=False).encode()
        comma = b",\n"
    yield "tasks.json", b"\n]\n" if comma == b",\n" else b"[]\n"


def _region(mask: MaskRecord, record: ImageRecord) -> dict[str, Any]:
    score = {} if mask.predicted_iou is None else {"score": mask.predicted_iou}
    return {
        "id": str(mask.id),
        "type": "brushlabels",
        "from_name": _FROM,
        "to_name": _TO,
        "original_width": record.width,
        "original_height": record.height,
        "image_rotation": 0,
        "value": {
            "format": "rle",
            "rle": encode_brush(rle.decode(mask.segmentation)),
            "brushlabels": ["object"],
        },
        **score,
    }
