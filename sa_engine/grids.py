"""Point grids and image crops (paper appendix B). Boxes are XYXY in pixels of the image, right and bottom exclusive."""

import math
from itertools import product
from typing import NamedTuple

import numpy as np


class Crop(NamedTuple):
    """A part of the image that is prompted by itself."""

    box: tuple[int, int, int, int]  # XYXY
    layer: int  # 0 is the whole image; layer i has 2**i crops a side

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        x0, y0, x1, y1 = self.box
        return y1 - y0, x1 - x0


def point_grid(side: int) -> np.ndarray:
    """Centres of a regular side x side grid: (side**2, 2) float64 x, y in (0, 1), row by row."""
    centres = (np.arange(side) + 0.5) / side
    x, y = np.meshgrid(centres, centres)
    return np.stack([x, y], axis=-1).reshape(-1, 2)


def layer_grid(points_per_side: int, layer: int, downscale_factor: int) -> np.ndarray:
    """Grid of a crop layer: 32x32, 16x16 and 8x8 points in the paper's setting."""
    return point_grid(points_per_side // downscale_factor**layer)


def crops(height: int, width: int, layers: int, overlap_ratio: float) -> list[Crop]:
    """The whole image, then 2x2, 4x4, ... overlapping crops.

    Layer i's crops overlap by ``overlap_ratio`` of the image's short side, halved with every further layer, as in the
    released SA-1B's own crop boxes. Crops that would be empty (images of a few pixels) are left out.
    """
    found = [Crop((0, 0, width, height), 0)]
    for layer in range(1, layers + 1):
        side = 2**layer
        overlap = int(overlap_ratio * min(height, width) * (2 / side))
        crop_width = _crop_length(width, side, overlap)
        crop_height = _crop_length(height, side, overlap)
        for column, row in product(range(side), range(side)):
            x0, y0 = (crop_width - overlap) * column, (crop_height - overlap) * row
            box = (x0, y0, min(x0 + crop_width, width), min(y0 + crop_height, height))
            if box[0] < box[2] and box[1] < box[3]:
                found.append(Crop(box, layer))
    return found


def _crop_length(length: int, crops_per_side: int, overlap: int) -> int:
    return math.ceil((overlap * (crops_per_side - 1) + length) / crops_per_side)
