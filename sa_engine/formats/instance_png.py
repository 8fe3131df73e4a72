"""Instance maps: a PNG per image, in which every value or colour is an instance, and 0 or black is background.

Traps: a palette's index is the id, not its colour; maps that were stored as JPEG or scaled smoothly have values that
were never drawn. Nothing in a PNG says that it is a map, so the format must be named.
"""

import io
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image

from sa_engine import rle
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    NamedImage,
    Parsed,
    Patch,
    Writing,
)
from sa_engine.images import PIXEL_LIMIT

NAME = "png"
SUFFIX = ".png"
_MOST_IDS = 5000
_GREY = ("1", "L", "P", "I", "I;16", "I;16B")
_COLOUR = ("RGB", "RGBA")


def is_this(content: Any) -> bool:
    """Never: a photo may be a PNG too."""
    return False


def read(content: Any, source: str) -> Parsed:
    """Read an instance map.

    Args:
        content: the PNG file's bytes.
        source: its name, for messages; the image is called as it.

    Raises:
        FormatError: no PNG, or one that is no instance map.
    """
    if not isinstance(content, bytes):
        raise FormatError(f"{source}: no instance map: expected a PNG file")
    ids, colours = _ids(content, source)
    height, width = ids.shape
    values, windows = _windows(ids, source)
    image = AnnotatedImage(
        name=Path(source).name,
        width=width,
        height=height,
        annotations=tuple(
            Annotation(
                shapes=(Patch(left, top, ids[top:bottom, left:right] == value),),
                original_id=_shown(int(value)) if colours else str(value),
            )
            for value, (left, top, right, bottom) in zip(values, windows.tolist(), strict=True)
        ),
        source=source,
    )
    return Parsed(format=NAME, tool=None, images=(image,))


def _ids(content: bytes, source: str) -> tuple[np.ndarray, bool]:
    """The map, (H, W) of whole numbers, and whether they are colours, as 65536 * r + 256 * g + b."""
    depth, kind = (content[24], content[25]) if len(content) > 25 else (0, 0)
    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            (width, height), mode = image.size, image.mode
            fits = width * height <= PIXEL_LIMIT
            # Pillow keeps one byte of two of a colour.
            known = mode in _GREY or (mode in _COLOUR and depth == 8)
            pixels = np.asarray(image) if fits and known else None
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise FormatError(f"{source}: not a PNG that can be read: {error}") from None
    if not fits:
        raise FormatError(
            f"{source}: a map of {width} x {height} pixels: at most {PIXEL_LIMIT:,} are read"
        )
    if pixels is None:
        raise FormatError(
            f"{source}: a PNG of mode {mode} and {depth} bits: expected ids of one channel, or colours of 8 bits"
        )
    if mode in _COLOUR:
        packed = pixels[..., 0].astype(np.uint32) << 16
        packed |= pixels[..., 1].astype(np.uint32) << 8
        packed |= pixels[..., 2]
        if mode == "RGBA":
            packed[pixels[..., 3] == 0] = 0  # nothing is seen there
        return packed, True
    if mode == "L" and kind == 0 and depth in (2, 4):
        pixels = pixels // (255 // (2**depth - 1))  # Pillow stretches them to 8 bits
    return pixels.astype(np.uint8) if mode == "1" else pixels, False


def _windows(ids: np.ndarray, source: str) -> tuple[np.ndarray, np.ndarray]:
    """All ids but 0, rising, and their windows: (N, 4) of left, top, right and bottom, the latter two exclusive."""
    height, width = ids.shape
    # By runs of a row, which are far fewer than pixels.
    starts = np.ones(ids.shape, bool)
    starts[:, 1:] = ids[:, 1:] != ids[:, :-1]
    first = np.flatnonzero(starts)
    run_values = ids.reshape(-1)[first]
    rows, left = np.divmod(first, width)
    right = np.append(first[1:], ids.size) - rows * width
    drawn = run_values != 0
    values, of = np.unique(run_values[drawn], return_inverse=True)
    if len(values) > _MOST_IDS:
        raise FormatError(
            f"{source}: {len(values):,} ids: expected at most {_MOST_IDS:,}, so it is a photo, or a map that was "
            "stored as JPEG or scaled smoothly: export it again, without either"
        )
    windows = np.tile(np.array([width, height, 0, 0]), (len(values), 1))
    np.minimum.at(windows[:, 0], of, left[drawn])
    np.minimum.at(windows[:, 1], of, rows[drawn])
    np.maximum.at(windows[:, 2], of, right[drawn])
    np.maximum.at(windows[:, 3], of, rows[drawn] + 1)
    return values, windows


def _shown(colour: int) -> str:
    return f"{colour >> 16},{colour >> 8 & 255},{colour & 255}"


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A map of 16 bits for each image: the value is the mask's number in its record, from 1.

    A pixel has one value only: the front mask's, by z-order, else the smaller mask's.
    """
    for image in images:
        record = image.record
        ids = np.zeros((record.height, record.width), np.uint16)
        numbered = sorted(
            enumerate(record.masks, 1), key=lambda pair: (pair[1].z_order or 0, -pair[1].area)
        )
        for value, mask in numbered:
            ids[rle.decode(mask.segmentation)] = value
        left = np.bincount(ids.ravel(), minlength=len(record.masks) + 1)
        for value, mask in numbered:
            if left[value] == 0:
                writing.lost["masks wholly behind others"] += 1
            elif left[value] < mask.area:
                writing.lost["masks partly behind others"] += 1
            writing.lost["scores of masks"] += mask.predicted_iou is not None
        buffer = io.BytesIO()
        Image.fromarray(ids).save(buffer, format="PNG")
        yield f"masks/{PurePosixPath(image.name).with_suffix(SUFFIX)}", buffer.getvalue()
