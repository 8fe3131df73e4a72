"""Where an image lies in the model-input frame when it is trained on, and its pixels and masks there.

The frame is the model's square input: an image is scaled and lies at its top left; the rest is padding.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy.sparse import csr_matrix

from sa_engine import rle
from sa_engine.images import resize_image
from sa_engine.modeling.sam import input_size
from sa_engine.rle import RLE

_HALF = 0.5


@dataclass(frozen=True)
class Frame:
    """An image scaled, then cropped to what is seen of it.

    Attributes:
        source: (height, width) of the image.
        scaled: (height, width) of the whole image in the frame's pixels.
        corner: (top, left) of what is seen, in the scaled image.
        size: (h, w) of what is seen.
        whole: of an image that is shown whole, a mask that is too small to be seen keeps the one pixel of the frame
            that it covers most; else it is lost.
    """

    source: tuple[int, int]
    scaled: tuple[int, int]
    corner: tuple[int, int]
    size: tuple[int, int]
    whole: bool

    @staticmethod
    def fit(height: int, width: int, image_size: int) -> "Frame":
        """The whole image, its longest side `image_size`: what a predictor embeds."""
        size = input_size(height, width, image_size)
        return Frame((height, width), size, (0, 0), size, whole=True)

    @staticmethod
    def jittered(
        height: int,
        width: int,
        image_size: int,
        scales: tuple[float, float],
        rng: np.random.Generator,
    ) -> "Frame":
        """Large-scale jitter (paper §A: scales 0.1 to 2.0).

        The image is scaled by a factor that is uniform between `scales`, of which 1 is that of `fit`; of a side that
        is then longer than `image_size`, a random part of so many pixels is seen. Small masks are lost: another scale
        shows them.
        """
        longest = max(1, round(image_size * rng.uniform(*scales)))
        scaled = input_size(height, width, longest)
        size = min(scaled[0], image_size), min(scaled[1], image_size)
        top, left = (int(rng.integers(a - b + 1)) for a, b in zip(scaled, size, strict=True))
        return Frame((height, width), scaled, (top, left), size, whole=False)

    def pixels(self, image: np.ndarray) -> np.ndarray:
        """(h, w, 3) uint8 of an image of the size `source`, resized as a predictor does."""
        (top, left), (height, width) = self.corner, self.size
        resized = resize_image(image, *self.scaled)
        return np.ascontiguousarray(resized[top : top + height, left : left + width])

    def mask(self, mask: RLE) -> np.ndarray | None:
        """The (h, w) bool pixels of a mask of the size `source`; None if none are left.

        A mask is enlarged bilinearly and shrunk by area; a pixel belongs to it from one half on.
        """
        found = rle.decode_window(mask)
        if found is None:
            return None
        window, top, left = found
        rows, row_weights = _reached(self._rows, top, window.shape[0])
        columns, column_weights = _reached(self._columns, left, window.shape[1])
        if rows.start == rows.stop or columns.start == columns.stop:
            return None
        cover = (column_weights @ (row_weights @ window.astype(np.float32)).T).T
        inside = cover >= _HALF
        if not inside.any():
            if not self.whole:
                return None
            inside.reshape(-1)[cover.argmax()] = True
        pixels = np.zeros(self.size, bool)
        pixels[rows, columns] = inside
        return pixels

    @cached_property
    def _rows(self) -> csr_matrix:
        top, height = self.corner[0], self.size[0]
        return _resampling(self.source[0], self.scaled[0])[top : top + height]

    @cached_property
    def _columns(self) -> csr_matrix:
        left, width = self.corner[1], self.size[1]
        return _resampling(self.source[1], self.scaled[1])[left : left + width]


def _reached(weights: csr_matrix, start: int, length: int) -> tuple[slice, csr_matrix]:
    """The pixels of the frame that a stretch of the source reaches, and its weights in them."""
    part = weights[:, start : start + length]
    reached = np.flatnonzero(np.diff(part.indptr))
    pixels = slice(int(reached[0]), int(reached[-1]) + 1) if len(reached) else slice(0, 0)
    return pixels, part[pixels]


def _resampling(source: int, scaled: int) -> csr_matrix:
    """Weights of a side's pixels in those of its scaled version: (scaled, source) float32, rows sum to 1.

    Bilinear to enlarge, by area to shrink; both hold the centres of pixels in place, as resizing an image does.
    """
    step = source / scaled
    start = np.arange(scaled) * step
    if scaled >= source:
        start += step / 2 - 0.5
        first = np.floor(start)
        columns = first[:, None] + np.arange(2)
        weights = 1 - np.abs(columns - start[:, None])
    else:
        columns = np.floor(start)[:, None] + np.arange(int(np.ceil(step)) + 1)
        ends = np.minimum(columns + 1, (start + step)[:, None])
        weights = (ends - np.maximum(columns, start[:, None])).clip(min=0) / step
    rows = np.repeat(np.arange(scaled), columns.shape[1])
    places = columns.astype(int).clip(0, source - 1).reshape(-1)
    matrix = csr_matrix((weights.reshape(-1).astype(np.float32), (rows, places)), (scaled, source))
    matrix.eliminate_zeros()
    return matrix
