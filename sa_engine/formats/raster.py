"""Shapes into pixels: what a mask is made of, as each tool's own code draws it.

COCO's, CVAT's and Label Studio's polygons are drawn by pycocotools.
"""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as coco

from sa_engine import rle
from sa_engine.formats.model import FormatError, Patch, Polygons, Runs, Shape
from sa_engine.rle import RLE


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


def _part(shape: Shape, height: int, width: int) -> RLE:
    if isinstance(shape, Polygons):
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
