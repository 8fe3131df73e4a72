"""A finished image as it is released (paper §5): its size, its record, its picture."""

from collections.abc import Sequence

import numpy as np

from sa_engine.images import encode_jpeg, fit_short_side, resize_image
from sa_engine.option_groups import FilterConfig, ShardConfig
from sa_engine.plan import PlannedImage
from sa_engine.records import ImageRecord, MaskRecord, image_name


def at_released_size(image: np.ndarray, config: FilterConfig) -> np.ndarray:
    """A (H, W, 3) image as it is released: at most `short_side` pixels on its short side."""
    return resize_image(image, *fit_short_side(image.shape[0], image.shape[1], config.short_side))


def released_image(
    item: PlannedImage,
    released: np.ndarray,
    sha256: str,
    masks: Sequence[MaskRecord],
    config: ShardConfig,
) -> tuple[ImageRecord, bytes | None]:
    """The record of an image and its JPEG file, if pictures are written.

    Args:
        item: what was planned.
        released: (H, W, 3) uint8 RGB at the released size.
        sha256: of the photo's file.
        masks: in the released frame.
        config: of the run.
    """
    height, width = released.shape[:2]
    record = ImageRecord(
        image_id=item.image_id,
        width=width,
        height=height,
        file_name=image_name(item.image_id),
        source_path=item.key,
        sha256=sha256,
        masks=tuple(masks),
    )
    return record, encode_jpeg(released, config.jpeg_quality) if config.write_images else None
