"""Image and mask records: the one place that knows their fields.

A record has two forms: SA-1B's JSON (what the tars hold) and a row of Arrow and Parquet with every
field (`ARROW_SCHEMA`). All coordinates are pixels of the released image, whose width and height the
record states.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sa_engine.errors import SaEngineError
from sa_engine.rle import RLE

SCHEMA_VERSION = 1
MASKS_PER_IMAGE = 10_000
SOURCES = ("manual", "assisted", "semi-automatic", "automatic")
# SA-1B has a number for every score; no model predicts a negative one.
MISSING_SCORE = -1.0


class RecordError(SaEngineError):
    """A record that breaks the schema, or was written under another one."""


@dataclass(frozen=True, kw_only=True)
class MaskRecord:
    """One mask. The first eight fields are SA-1B's; None means that there is no such value.

    Attributes:
        id: unique in the data set, see `mask_id`.
        segmentation: COCO RLE, {"size": [height, width], "counts": compressed text}.
        area: pixels of the mask.
        bbox: XYWH floats; as in SA-1B, width = xmax - xmin, one less than COCO's.
        predicted_iou: the model's own estimate of the mask's quality, 0 to 1.
        stability_score: IoU of the mask with itself at shifted thresholds, 0 to 1.
        point_coords: the prompt, [[x, y]].
        crop_box: XYWH floats of the crop the mask was found in.
        source: one of `SOURCES` (paper §4: the stage of the data engine).
        annotator: who drew it.
        tool: with what.
        time_s: annotation time in seconds.
        time_scope: what `time_s` covers, "mask" or "image".
        round: of the data engine.
        z_order: drawing order, higher is in front.
        original_id: the mask's id in the file it was imported from.
        model_fingerprint: of the model that made it.
        box_score: of the detected box that prompted it.
        prefill_id: id of the mask that an annotator was shown.
        edit_status: what the annotator did with that mask.
        edit_iou: IoU of that mask with this one; older shards lack the column.
        redacted: whether it is of a redacted face or plate: None if nothing was redacted in its run.
    """

    id: int
    segmentation: RLE
    area: int
    bbox: list[float]
    predicted_iou: float | None
    stability_score: float | None
    point_coords: list[list[float]] | None
    crop_box: list[float] | None
    source: str | None = None
    annotator: str | None = None
    tool: str | None = None
    time_s: float | None = None
    time_scope: str | None = None
    round: int | None = None
    z_order: int | None = None
    original_id: str | None = None
    model_fingerprint: str | None = None
    box_score: float | None = None
    prefill_id: int | None = None
    edit_status: str | None = None
    edit_iou: float | None = None
    redacted: bool | None = None

    def __post_init__(self) -> None:
        """Raise RecordError for an unknown source."""
        if self.source is not None and self.source not in SOURCES:
            raise RecordError(
                f"mask {self.id} has source {self.source!r}: expected one of {', '.join(SOURCES)}"
            )


@dataclass(frozen=True, kw_only=True)
class ImageRecord:
    """One released image and its masks.

    Attributes:
        image_id: from 1, in the order of the plan.
        width: of the released image, in pixels.
        height: of the released image, in pixels.
        file_name: see `image_name`.
        source_path: of the photo, relative to the run's images; None if read from SA-1B's JSON.
        sha256: hex, of the photo's bytes, also where a picture made of it came back from annotators (`ingest
            --prefill`): by it a photo is known in every run. None if read from SA-1B's JSON.
        masks: in the order of their ids.
    """

    image_id: int
    width: int
    height: int
    file_name: str
    source_path: str | None
    sha256: str | None
    masks: tuple[MaskRecord, ...]


def image_name(image_id: int) -> str:
    """File name of a released image."""
    return f"sa_{image_id}.jpg"


def mask_id(image_id: int, index: int) -> int:
    """Id of an image's mask number `index` (from 0), the same in every run.

    Raises RecordError from index 10,000 on, where ids of two images would meet.
    """
    if not 0 <= index < MASKS_PER_IMAGE:
        raise RecordError(
            f"image {image_id} has a mask number {index}: expected fewer than {MASKS_PER_IMAGE}"
        )
    return image_id * MASKS_PER_IMAGE + index


def to_sa1b(record: ImageRecord) -> dict[str, Any]:
    """A record as SA-1B's JSON: its keys, their order and their types.

    What a mask lacks becomes a placeholder of the right type: `MISSING_SCORE` for scores, no
    points, and the whole image as crop box.
    """
    return {
        "image": {
            "image_id": record.image_id,
            "width": record.width,
            "height": record.height,
            "file_name": record.file_name,
        },
        "annotations": [_annotation(mask, record) for mask in record.masks],
    }


def sa1b_json(record: ImageRecord) -> bytes:
    """The file that a tar holds of a record. Raises ValueError for a number that is not finite."""
    return json.dumps(to_sa1b(record), allow_nan=False).encode()


def from_sa1b(content: dict[str, Any]) -> ImageRecord:
    """The inverse of `to_sa1b`, for released SA-1B files too; placeholders become None.

    Raises RecordError, naming the missing key, for JSON of another form.
    """
    try:
        image = content["image"]
        return ImageRecord(
            image_id=image["image_id"],
            width=image["width"],
            height=image["height"],
            file_name=image["file_name"],
            source_path=None,
            sha256=None,
            masks=tuple(_mask(annotation) for annotation in content["annotations"]),
        )
    except KeyError as error:
        raise RecordError(f"not SA-1B's JSON: there is no key {error}") from None


def _annotation(mask: MaskRecord, image: ImageRecord) -> dict[str, Any]:
    crop_box = mask.crop_box or [0, 0, image.width, image.height]
    return {
        "bbox": [float(value) for value in mask.bbox],
        "area": int(mask.area),
        "segmentation": {
            "size": [int(side) for side in mask.segmentation["size"]],
            "counts": mask.segmentation["counts"],
        },
        "predicted_iou": _score(mask.predicted_iou),
        "point_coords": [[float(x), float(y)] for x, y in mask.point_coords or []],
        "crop_box": [float(value) for value in crop_box],
        "id": int(mask.id),
        "stability_score": _score(mask.stability_score),
    }


def _score(value: float | None) -> float:
    return MISSING_SCORE if value is None else float(value)


def _mask(annotation: dict[str, Any]) -> MaskRecord:
    scores = {
        name: None if annotation[name] == MISSING_SCORE else annotation[name]
        for name in ("predicted_iou", "stability_score")
    }
    return MaskRecord(
        id=annotation["id"],
        segmentation=annotation["segmentation"],
        area=annotation["area"],
        bbox=annotation["bbox"],
        point_coords=annotation["point_coords"] or None,
        crop_box=annotation["crop_box"],
        **scores,
    )


_MASK_TYPE = pa.struct(
    [
        ("id", pa.int64()),
        ("segmentation", pa.struct([("size", pa.list_(pa.int32())), ("counts", pa.string())])),
        ("area", pa.int64()),
        ("bbox", pa.list_(pa.float64())),
        ("predicted_iou", pa.float64()),
        ("stability_score", pa.float64()),
        ("point_coords", pa.list_(pa.list_(pa.float64()))),
        ("crop_box", pa.list_(pa.float64())),
        ("source", pa.string()),
        ("annotator", pa.string()),
        ("tool", pa.string()),
        ("time_s", pa.float64()),
        ("time_scope", pa.string()),
        ("round", pa.int32()),
        ("z_order", pa.int32()),
        ("original_id", pa.string()),
        ("model_fingerprint", pa.string()),
        ("box_score", pa.float64()),
        ("prefill_id", pa.int64()),
        ("edit_status", pa.string()),
        ("edit_iou", pa.float64()),
        ("redacted", pa.bool_()),
    ]
)
ARROW_SCHEMA = pa.schema(
    [
        ("image_id", pa.int64()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("file_name", pa.string()),
        ("source_path", pa.string()),
        ("sha256", pa.string()),
        ("masks", pa.list_(_MASK_TYPE)),
    ],
    metadata={"schema_version": str(SCHEMA_VERSION)},
)

# Of shards that were written before a mask had an `edit_iou`.
_OLDER = pa.list_(pa.struct([field for field in _MASK_TYPE if field.name != "edit_iou"]))
KNOWN_SCHEMAS = (
    ARROW_SCHEMA,
    ARROW_SCHEMA.set(ARROW_SCHEMA.get_field_index("masks"), pa.field("masks", _OLDER)),
)


def to_table(records: Sequence[ImageRecord]) -> pa.Table:
    """Records as an Arrow table with `ARROW_SCHEMA`, one row per image.

    Raises RecordError, naming the field, for a number that is not finite.
    """
    masks = [mask for record in records for mask in record.masks]
    ends = np.cumsum([0, *(len(record.masks) for record in records)], dtype=np.int32)
    images = [
        pa.array([getattr(record, field.name) for record in records], type=field.type)
        for field in ARROW_SCHEMA
        if field.name != "masks"
    ]
    lists = pa.ListArray.from_arrays(pa.array(ends), _mask_array(masks), type=pa.list_(_MASK_TYPE))
    return pa.table([*images, lists], schema=ARROW_SCHEMA)


def _mask_array(masks: Sequence[MaskRecord]) -> pa.StructArray:
    """Masks in columns: much faster than Arrow's own reading of nested dicts."""
    columns = []
    values_of = zip(*(vars(mask).values() for mask in masks), strict=True)
    for field, values in zip(_MASK_TYPE, list(values_of) or [()] * len(_MASK_TYPE), strict=True):
        if field.name == "segmentation":
            parts = [pa.array([rle[f.name] for rle in values], type=f.type) for f in field.type]
            columns.append(pa.StructArray.from_arrays(parts, fields=list(field.type)))
        else:
            columns.append(pa.array(values, type=field.type))
            _check_finite(field.name, columns[-1])
    return pa.StructArray.from_arrays(columns, fields=list(_MASK_TYPE))


def _check_finite(name: str, column: pa.Array) -> None:
    while pa.types.is_list(column.type):
        column = column.flatten()
    if pa.types.is_floating(column.type) and not pc.all(pc.is_finite(column), min_count=0).as_py():
        raise RecordError(f"a mask has a {name} that is not finite")


def from_table(table: pa.Table) -> list[ImageRecord]:
    """The inverse of `to_table`. Raises RecordError for another schema version."""
    check_version(table)
    return [_from_row(row) for row in table.to_pylist()]


def _from_row(row: dict[str, Any]) -> ImageRecord:
    return ImageRecord(**{**row, "masks": tuple(MaskRecord(**mask) for mask in row["masks"])})


def check_version(table: pa.Table) -> None:
    """Raise RecordError for records of another schema version, be it but some of their columns."""
    version = (table.schema.metadata or {}).get(b"schema_version", b"none").decode()
    if version != str(SCHEMA_VERSION):
        raise RecordError(
            f"record schema version {version}: this version of sa-engine reads {SCHEMA_VERSION}"
        )
