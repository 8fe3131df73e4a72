"""Shapes into pixels: what a mask is made of, as each tool's own code draws it.

COCO's, CVAT's and Label Studio's polygons are drawn by pycocotools.
"""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
from pycocotools import mask as coco

from sa_engine import rle
from sa_engine.formats.model import (
    AnnotatedImage,
    FormatError,
    Parsed,
    Patch,
    Polygons,
    Runs,
    Shape,
)
from sa_engine.rle import RLE

_TOLERANCE = 1.0  # pixels that a corner may lie outside: tools round


def rasterize(shapes: Sequence[Shape], height: int, width: int) -> RLE:
    """The union of shapes as a mask of an image.

    Args:
        shapes: in pixels of the image.
        height, width: of the image.

    Raises:
        FormatError: run lengths of another size or that are no run lengths, or pixels outside of the image.
    """
    parts = [_part(shape, height, width) for shape in shapes]
    if len(parts) == 1:
        return parts[0]
    merged = coco.merge(parts)
    return {"size": [height, width], "counts": merged["counts"].decode("ascii")}


def compact(parsed: Parsed) -> Parsed:
    """The same masks with rectangles of pixels as run lengths, which take a hundredth of the memory.

    Rectangles that reach beyond their image stay, to be told of by `rasterize`.
    """
    return replace(parsed, images=tuple(_compact_image(image) for image in parsed.images))


def _compact_image(image: AnnotatedImage) -> AnnotatedImage:
    if image.height is None or image.width is None:
        return image
    size = (image.height, image.width)
    masks = (
        replace(one, shapes=tuple(_compact_shape(shape, *size) for shape in one.shapes))
        for one in image.annotations
    )
    return replace(image, annotations=tuple(masks))


def _compact_shape(shape: Shape, height: int, width: int) -> Shape:
    if not isinstance(shape, Patch):
        return shape
    try:
        return Runs(height, width, _part(shape, height, width)["counts"])
    except FormatError:
        return shape


def _part(shape: Shape, height: int, width: int) -> RLE:
    if isinstance(shape, Polygons):
        _check_inside(shape, height, width)
        drawn = coco.merge(coco.frPyObjects([list(ring) for ring in shape.rings], height, width))
        return {"size": [height, width], "counts": drawn["counts"].decode("ascii")}
    if isinstance(shape, Patch):
        h, w = shape.pixels.shape
        if shape.left < 0 or shape.top < 0 or shape.left + w > width or shape.top + h > height:
            raise FormatError(
                f"a mask of {w} x {h} pixels at {shape.left}, {shape.top} reaches beyond its image "
                f"of {width} x {height}"
            )
        return rle.encode_window(
            np.asarray(shape.pixels, bool), shape.top, shape.left, height, width
        )
    if (shape.height, shape.width) != (height, width):
        raise FormatError(
            f"an RLE of {shape.width} x {shape.height} pixels for an image of {width} x {height}"
        )
    return _from_runs(shape)


def _check_inside(shape: Polygons, height: int, width: int) -> None:
    """Raise FormatError for corners beyond the image, whose pixels pycocotools would drop without a word."""
    for ring in shape.rings:
        for values, size, axis in ((ring[::2], width, "x"), (ring[1::2], height, "y")):
            low, high = min(values), max(values)
            if low < -_TOLERANCE or high > size + _TOLERANCE:
                raise FormatError(
                    f"a polygon reaches from {axis} = {low:g} to {high:g}, beyond its image of "
                    f"{width} x {height} pixels"
                )


def _from_runs(shape: Runs) -> RLE:
    size = [shape.height, shape.width]
    if isinstance(shape.counts, str):
        found: RLE = {"size": size, "counts": shape.counts}
        try:
            rle.runs(
                found
            )  # before pycocotools, which reads beyond its memory where an RLE is damaged
        except ValueError as error:
            raise FormatError(f"its RLE is damaged: {error}") from None
        return found
    packed = coco.frPyObjects({"size": size, "counts": list(shape.counts)}, *size)
    return {"size": size, "counts": packed["counts"].decode("ascii")}
