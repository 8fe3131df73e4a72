"""Masks of redactions are told from masks of things."""

import numpy as np
import pytest
from pycocotools import mask as coco

from sa_engine.privacy.flags import flag_redacted
from sa_engine.records import ImageRecord, MaskRecord, image_name, mask_id

HEIGHT, WIDTH = 60, 90  # of the released image


def record(*parts: tuple[slice, slice]) -> ImageRecord:
    masks = []
    for index, part in enumerate(parts):
        pixels = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
        pixels[part] = 1
        rle = coco.encode(pixels)
        masks.append(
            MaskRecord(
                id=mask_id(1, index),
                segmentation={"size": [HEIGHT, WIDTH], "counts": rle["counts"].decode()},
                area=int(pixels.sum()),
                bbox=[0.0, 0.0, 1.0, 1.0],
                predicted_iou=0.9,
                stability_score=0.96,
                point_coords=[[1.0, 1.0]],
                crop_box=[0.0, 0.0, float(WIDTH), float(HEIGHT)],
            )
        )
    return ImageRecord(
        image_id=1,
        width=WIDTH,
        height=HEIGHT,
        file_name=image_name(1),
        source_path="photo.jpg",
        sha256="0" * 64,
        masks=tuple(masks),
    )


BOX = slice(10, 40), slice(20, 50)


@pytest.mark.parametrize(
    ("part", "redacted"),
    [
        (BOX, True),
        ((slice(8, 41), slice(20, 50)), True),  # IoU 30 / 33
        ((slice(10, 34), slice(20, 50)), True),  # inside
        ((slice(0, 40), slice(20, 50)), False),  # IoU 30 / 40: a head with its neck
        ((slice(16, 22), slice(26, 32)), True),  # a cell of the mosaic
        ((slice(16, 22), slice(46, 52)), False),  # a third of it is outside
        ((slice(0, 60), slice(0, 90)), False),
        ((slice(50, 60), slice(0, 10)), False),
    ],
)
@pytest.mark.parametrize("scale", [1, 3])
def test_a_mask_is_flagged_if_it_is_of_a_redaction(
    part: tuple[slice, slice], redacted: bool, scale: int
) -> None:
    boxes = [(20 * scale, 10 * scale, 50 * scale, 40 * scale), (0, 0, 2, 2)]
    flagged = flag_redacted(record(part), boxes, HEIGHT * scale, WIDTH * scale)
    assert [mask.redacted for mask in flagged.masks] == [redacted]


def test_a_mask_within_two_boxes_together_is_flagged() -> None:
    boxes = [(0, 0, 20, 20), (20, 0, 40, 20)]
    flagged = flag_redacted(record((slice(5, 15), slice(10, 30))), boxes, HEIGHT, WIDTH)
    assert flagged.masks[0].redacted


def test_without_regions_every_mask_is_of_a_thing() -> None:
    flagged = flag_redacted(record(BOX, (slice(0, 5), slice(0, 5))), [], HEIGHT, WIDTH)
    assert [mask.redacted for mask in flagged.masks] == [False, False]
    assert flag_redacted(record(), [(0, 0, 5, 5)], HEIGHT, WIDTH).masks == ()
