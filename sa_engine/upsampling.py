"""From low-resolution logits to masks at full size, looking at pixels only where a mask's edge may be.

The released model upsamples its 256x256 logits twice, bilinearly: to the padded model input, then to the image. Both
steps together are one separable linear map in which every pixel is a weighted mean of 3x3 neighbouring logits. Pixels
are grouped into *cells* that share those 3x3 logits. A cell whose logits all lie above the thresholds, or all below,
needs no upsampling to be counted, so area, stability score and box of a mask come exactly from its few edge cells.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

TAPS = 3
# Edge cells upsampled at once: on a CPU their pixels stay in cache.
CELLS_AT_ONCE = {"cpu": 8192}
DEFAULT_CELLS_AT_ONCE = 262_144


class Measures(NamedTuple):
    """What the filters need to know of N masks."""

    areas: Tensor  # (N,) int64, pixels with a logit above 0
    stability: Tensor  # (N,) float32, NaN where even the loosest mask is empty
    boxes: Tensor  # (N, 4) int64 XYXY inclusive, meaningless where the area is 0


class Axis(NamedTuple):
    """The map along one axis: 256 logits to n pixels, pixels grouped into C cells of at most P pixels."""

    matrix: Tensor  # (n, 256) float32: the whole map
    taps: Sequence[slice]  # the n pixels' logits, on the host so that no GPU is waited for
    base: Tensor  # (C,) int64: first of the TAPS logits that the cell's pixels depend on
    first: Tensor  # (C,) int64: the cell's first pixel
    length: Tensor  # (C,) int64: its pixels
    weights: Tensor  # (P * TAPS, C) float32, NaN beyond length: above no threshold


class Upsampler:
    """Measures and renders masks of one geometry.

    Args:
        low_size: side of the square low-resolution logits (256).
        image_size: side of the padded model input (1024).
        input_size: (height, width) of the image inside the padded model input.
        size: (height, width) of the masks wanted.
        device: where the logits are.
    """

    def __init__(
        self,
        low_size: int,
        image_size: int,
        input_size: tuple[int, int],
        size: tuple[int, int],
        device: torch.device,
    ) -> None:
        self.rows, self.columns = (
            _axis(low_size, image_size, inner, outer, device)
            for inner, outer in zip(input_size, size, strict=True)
        )
        self.cells_at_once = CELLS_AT_ONCE.get(device.type, DEFAULT_CELLS_AT_ONCE)
        self.pixels = self.rows.length[:, None] * self.columns.length[None, :]

    def window(self, box: Sequence[int]) -> tuple[slice, slice]:
        """Rows and columns of the logits that the pixels of an XYXY box (inclusive) depend on."""
        x0, y0, x1, y1 = box
        rows, columns = self.rows.taps, self.columns.taps
        return slice(rows[y0].start, rows[y1].stop), slice(columns[x0].start, columns[x1].stop)

    def render(self, logits: Tensor, box: tuple[int, int, int, int]) -> Tensor:
        """Pixels inside an XYXY box (inclusive), as (h, w) bool.

        ``logits`` are those of :meth:`window`, so that a mask can be kept as its small logits until it is wanted.
        """
        x0, y0, x1, y1 = box
        rows, columns = self.window(box)
        down = self.rows.matrix[y0 : y1 + 1, rows]
        across = self.columns.matrix[x0 : x1 + 1, columns]
        return down @ logits @ across.T > 0

    def measure(self, logits: Tensor, offset: float) -> Measures:
        """Area, stability score (§B: IoU of the masks at logits ``+offset`` and ``-offset``) and box.

        Args:
            logits: (N, 256, 256) float32.
            offset: in logits.
        """
        low, high = _cell_range(logits, self.rows.base, self.columns.base)
        inside = low > offset
        edge = ~inside & (high > -offset)
        counts = (inside * self.pixels).sum(dim=(1, 2))[:, None].expand(-1, 3).clone()
        extents = _extents_inside(inside, self.rows, self.columns)
        for cells in edge.nonzero().split(self.cells_at_once):
            self._add_edge(logits, cells, offset, counts, extents)
        tight, areas, loose = counts.unbind(dim=1)
        boxes = torch.stack([-extents[:, 0], -extents[:, 1], extents[:, 2], extents[:, 3]], dim=1)
        return Measures(areas, tight / loose, boxes)

    def _add_edge(
        self, logits: Tensor, cells: Tensor, offset: float, counts: Tensor, extents: Tensor
    ) -> None:
        """Add the pixels of edge cells, (K, 3) of mask, row and column, to counts (N, 3) and extents (N, 4)."""
        values = self._values(logits, cells)
        # As float32: exact for so few pixels, and several times faster than comparing and summing bools.
        above, bits = [], torch.empty_like(values)
        for threshold in (offset, 0.0, -offset):
            above.append(torch.gt(values, threshold, out=bits).sum(dim=(0, 1)))
        mask, row, column = cells.unbind(dim=1)
        counts.index_add_(0, mask, torch.stack(above, dim=1).long())
        ends = torch.stack(
            [
                -self.columns.first[column],
                -self.rows.first[row],
                self.columns.first[column] + self.columns.length[column] - 1,
                self.rows.first[row] + self.rows.length[row] - 1,
            ],
            dim=1,
        )
        outer = (above[1] > 0) & (ends > extents[mask]).any(dim=1)
        self._extend(values[..., outer], cells[outer], extents)

    def _values(self, logits: Tensor, cells: Tensor) -> Tensor:
        """Upsampled logits (P, Q, K) of cells, (K, 3) of mask, row and column; NaN beyond a cell's pixels.

        Cells come last: every step is then one long vector operation, far faster than K products of 3x3 matrices.
        """
        mask, row, column = cells.unbind(dim=1)
        _, height, width = logits.shape
        corner = (mask * height + self.rows.base[row]) * width + self.columns.base[column]
        flat = logits.reshape(-1)
        near = [[flat[corner + (i * width + j)] for j in range(TAPS)] for i in range(TAPS)]
        down, across = (
            axis.weights.index_select(1, index).unflatten(0, (-1, TAPS)).unbind(dim=1)
            for axis, index in ((self.rows, row), (self.columns, column))
        )
        columns = [_sum_products(down, [near[i][j] for i in range(TAPS)]) for j in range(TAPS)]
        return _sum_products([part[:, None] for part in columns], across)

    def _extend(self, values: Tensor, cells: Tensor, extents: Tensor) -> None:
        """Grow extents (N, 4), in place, by the pixels above 0 of cells, (P, Q, K), each with at least one."""
        mask, row, column = cells.unbind(dim=1)
        inside = torch.gt(values, 0, out=torch.empty_like(values))
        top, bottom = _first_and_last(inside.amax(dim=1))
        left, right = _first_and_last(inside.amax(dim=0))
        x, y = self.columns.first[column], self.rows.first[row]
        ends = torch.stack([-(x + left), -(y + top), x + right, y + bottom], dim=1)
        extents.scatter_reduce_(0, mask[:, None].expand(-1, 4), ends, "amax")


def _sum_products(left: Sequence[Tensor], right: Sequence[Tensor]) -> Tensor:
    """Sum of elementwise products."""
    total = left[0] * right[0]
    for a, b in zip(left[1:], right[1:], strict=True):
        total = total.addcmul_(a, b)
    return total


@lru_cache(maxsize=64)
def cached_upsampler(
    low_size: int,
    image_size: int,
    input_size: tuple[int, int],
    size: tuple[int, int],
    device: torch.device,
) -> Upsampler:
    """An :class:`Upsampler`, shared by all crops of the same size."""
    with torch.inference_mode(False):
        return Upsampler(low_size, image_size, input_size, size, device)


def _axis(low: int, image: int, inner: int, outer: int, device: torch.device) -> Axis:
    """The two bilinear steps along one axis as weights of TAPS neighbours; ``inner`` of ``image`` pixels are used."""
    first_step = torch.zeros(image, low, dtype=torch.float64)
    lower, upper, share = _bilinear(low, image)
    first_step.scatter_add_(1, lower[:, None], (1 - share)[:, None])
    first_step.scatter_add_(1, upper[:, None], share[:, None])
    lower, upper, share = _bilinear(inner, outer)
    matrix = first_step[lower] * (1 - share)[:, None] + first_step[upper] * share[:, None]
    base = (matrix != 0).double().argmax(dim=1).clamp(max=low - TAPS)
    _, group, sizes = base.unique_consecutive(return_inverse=True, return_counts=True)
    # The clamped ends make cells half as large again as the others: cut in two, all pad to less.
    longest = -(-outer // len(sizes))
    place = torch.arange(outer) - (sizes.cumsum(0) - sizes)[group]
    _, length = (group * outer + place // longest).unique_consecutive(return_counts=True)
    first = length.cumsum(0) - length
    position = torch.arange(longest)
    outside = position[None, :] >= length[:, None]
    pixels = (first[:, None] + position).clamp(max=outer - 1)
    taps = matrix.gather(1, base[:, None] + torch.arange(TAPS))
    weights = taps[pixels].masked_fill(outside[..., None], torch.nan).float()
    used = (matrix != 0).long()
    ends = low - used.flip(1).argmax(dim=1)
    spans = [slice(*span) for span in zip(used.argmax(dim=1).tolist(), ends.tolist(), strict=True)]
    parts = (matrix.float(), base[first], first, length, weights.flatten(1).T)
    map_, *cells = (part.contiguous().to(device) for part in parts)
    return Axis(map_, spans, *cells)


def _bilinear(source: int, target: int) -> tuple[Tensor, Tensor, Tensor]:
    """Lower and upper source index (target,) and the upper one's share, pixel centres at half integers."""
    position = ((torch.arange(target).double() + 0.5) * (source / target) - 0.5).clamp(min=0)
    lower = position.floor().long().clamp(max=source - 1)
    return lower, (lower + 1).clamp(max=source - 1), position - lower


def _cell_range(logits: Tensor, rows: Tensor, columns: Tensor) -> tuple[Tensor, Tensor]:
    """Least and greatest logit of every cell's neighbourhood: two of (N, row cells, column cells)."""
    low = high = logits
    for dim, cells in ((1, rows), (2, columns)):
        length = low.shape[dim] - TAPS + 1
        parts = [(low.narrow(dim, i, length), high.narrow(dim, i, length)) for i in range(TAPS)]
        (low, high), *others = parts
        for other_low, other_high in others:
            low, high = torch.minimum(low, other_low), torch.maximum(high, other_high)
        low, high = low.index_select(dim, cells), high.index_select(dim, cells)
    return low, high


def _extents_inside(inside: Tensor, rows: Axis, columns: Axis) -> Tensor:
    """Extents (N, 4) of the cells wholly inside: -x0, -y0, x1, y1, so that all four grow by maximum."""
    none = torch.iinfo(torch.int64).min // 2
    found = []
    for cells, axis in ((inside.any(dim=1), columns), (inside.any(dim=2), rows)):
        last = axis.first + axis.length - 1
        found.append((-axis.first).where(cells, none).amax(dim=1))
        found.append(last.where(cells, none).amax(dim=1))
    x0, x1, y0, y1 = found
    return torch.stack([x0, y0, x1, y1], dim=1)


def _first_and_last(present: Tensor) -> tuple[Tensor, Tensor]:
    """First and last set row of every column: (P, K) float32, 1 where set -> two of (K,) int64."""
    count = len(present)
    order = torch.arange(count, dtype=present.dtype, device=present.device)[:, None]
    first = count - (present * (count - order)).amax(dim=0)
    last = (present * (order + 1)).amax(dim=0) - 1
    return first.long(), last.long()
