"""Which masks are those of a redaction rather than of a thing."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pycocotools import mask as coco

from sa_engine.privacy.redact import Box
from sa_engine.records import ImageRecord

_SAME_IOU = 0.8
_INSIDE = 0.95


def flag_redacted(
    record: ImageRecord, boxes: Sequence[Box], height: int, width: int
) -> ImageRecord:
    """Say of each mask whether it is a redaction: a whole box, or something within boxes.

    The first is a mask whose pixels match a box's at an IoU of 0.8 or more, the second one that lies
    in boxes with 95 % of its area or more, as the cells of a mosaic do.

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
    flags = [False] * len(masks)
    if masks and scaled:
        regions = coco.frPyObjects(np.array(scaled), record.height, record.width)
        same = coco.iou(masks, regions, [False] * len(regions)).max(axis=1) >= _SAME_IOU
        # As COCO's crowds: the share of the mask itself.
        inside = coco.iou(masks, [coco.merge(regions)], [True])[:, 0] >= _INSIDE
        flags = (same | inside).tolist()
    flagged = [replace(mask, redacted=flag) for mask, flag in zip(record.masks, flags, strict=True)]
    return replace(record, masks=tuple(flagged))
