"""Which masks are those of a redaction rather than of a thing."""

from collections.abc import Sequence
from dataclasses import replace

from pycocotools import mask as coco

from sa_engine.privacy.redact import Box
from sa_engine.records import ImageRecord

_SAME_IOU = 0.8


def flag_redacted(
    record: ImageRecord, boxes: Sequence[Box], height: int, width: int
) -> ImageRecord:
    """Say of each mask whether it matches a redacted box: pixels of both at an IoU of 0.8 or more.

    Args:
        record: of the released image.
        boxes: left, top, right, bottom in pixels of the photo.
        height, width: of the photo, which may be larger than the released image.

    Returns:
        The record with `redacted` true or false in every mask.
    """
    x, y = record.width / width, record.height / height
    scaled = [[b[0] * x, b[1] * y, (b[2] - b[0]) * x, (b[3] - b[1]) * y] for b in boxes]
    masks = [mask.segmentation for mask in record.masks]
    same = [False] * len(masks)
    if masks and scaled:
        regions = coco.frPyObjects(scaled, record.height, record.width)
        overlaps = coco.iou(masks, regions, [False] * len(regions))
        same = (overlaps.max(axis=1) >= _SAME_IOU).tolist()
    flagged = [
        replace(mask, redacted=is_same) for mask, is_same in zip(record.masks, same, strict=True)
    ]
    return replace(record, masks=tuple(flagged))
