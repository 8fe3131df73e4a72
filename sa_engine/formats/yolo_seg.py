"""YOLO's segmentation labels: a text file per image, a line per mask, of one ring in shares of the image's sides.

Only written. A hole is cut free by a slit, and parts are joined by a line, as YOLO's own converter of COCO does.
"""

from collections.abc import Iterable, Iterator
from pathlib import PurePosixPath

import numpy as np

from sa_engine import rle
from sa_engine.formats import outline
from sa_engine.formats.model import NamedImage, Writing
from sa_engine.records import MaskRecord

NAME = "yolo-seg"
_FEWEST = 3  # corners of a ring
_DATA = b"path: .\ntrain: images\nval: images\nnames:\n  0: object\n"


def write(images: Iterable[NamedImage], writing: Writing) -> Iterator[tuple[str, bytes]]:
    """A file of labels for each image, empty if it has no mask, and `data.yaml`."""
    yield "data.yaml", _DATA
    for image in images:
        record = image.record
        lines = [_line(mask, record.width, record.height, writing) for mask in record.masks]
        name = PurePosixPath(image.name).with_suffix(".txt")
        yield f"labels/{name}", "".join(lines).encode()


def _line(mask: MaskRecord, width: int, height: int, writing: Writing) -> str:
    rings = outline.centre_rings(rle.decode(mask.segmentation), writing.tolerance)
    if len(rings) > 1:
        writing.lost["masks whose parts are joined by a line"] += 1
    writing.lost["scores of masks"] += mask.predicted_iou is not None
    ring = outline.chain(rings)
    ring = np.concatenate([ring, ring[-1:].repeat(max(0, _FEWEST - len(ring)), axis=0)])
    # Readers that cut off the fraction (Ultralytics) and those that round (supervision) both get the pixel.
    shares = (ring + 0.25) / (width, height)
    return " ".join(["0", *(f"{value:.7f}" for value in shares.reshape(-1))]) + "\n"
