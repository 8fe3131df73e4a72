"""The paper's figures 5 and 6, drawn: PNG files in memory."""

import io
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from sa_engine.analysis.figures import BINS, HEAT_CELLS, SIZES, Figures, Histogram

_COLOURS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea", "#dc2626", "#0891b2")
_DPI = 130
_WIDTH, _HEIGHT = 6.4, 3.4  # inches
_HEAT_IN = 2.1
_PER_ROW = 3
_PER_CELL = 4  # masks on average, for a cell to say something
_STEPS = 24  # bars of masks per image, at most


def heat_maps(sets: Sequence[Figures]) -> bytes:
    """Mask centres of each data set, beside each other; white is none, the darkest each one's most."""
    columns = min(len(sets), _PER_ROW)
    rows = -(-len(sets) // columns)
    figure = Figure((max(_HEAT_IN * columns, 2.6), (_HEAT_IN + 0.3) * rows), layout="constrained")
    for axes, found in zip(figure.subplots(rows, columns, squeeze=False).flat, sets, strict=False):
        axes.imshow(_coarse(found), cmap="Blues", extent=(0, 1, 1, 0), vmin=0)
        axes.set_title(_short(found.name), fontsize=9)
    for axes in figure.axes:
        axes.set(xticks=[], yticks=[])
    for axes in figure.axes[len(sets) :]:
        axes.set_axis_off()
    return _png(figure)


def masks_per_image(sets: Sequence[Figures]) -> bytes:
    """Share of the images by their number of masks."""
    most = max(max(found.per_image.counts, default=0) for found in sets)
    step = max(1, -(-(int(most) + 1) // _STEPS))
    edges = np.arange(0, most + step + 1, step)

    def draw(axes: Axes, found: Figures, colour: str) -> None:
        numbers = list(found.per_image.counts)
        images = list(found.per_image.counts.values())
        _stairs(axes, np.histogram(numbers, edges, weights=images)[0], edges, found.name, colour)

    return _figure(sets, draw, "masks per image", "images")


def relative_size(sets: Sequence[Figures]) -> bytes:
    """Share of the masks by sqrt(mask area / image area)."""
    return _shares(sets, lambda found: found.size, "relative mask size", "masks")


def scores(sets: Sequence[Figures], name: str) -> bytes | None:
    """Share of the scored masks by `predicted_iou` or `stability`; None if none has that score."""
    scored = [found for found in sets if getattr(found, name).number]
    if not scored:
        return None
    title = {"predicted_iou": "predicted IoU", "stability": "stability score"}[name]
    return _shares(scored, lambda found: getattr(found, name), title, "masks")


def concavity(sets: Sequence[Figures]) -> bytes:
    """Share of the masks of each size class by 1 - area / hull area."""
    figure = Figure((_WIDTH, _HEIGHT), layout="constrained")
    panels = figure.subplots(1, len(SIZES), sharey=True)
    for axes, name in zip(panels, SIZES, strict=True):
        for found, colour in zip(sets, _cycle(len(sets)), strict=True):
            _stairs_of(axes, found.concavity[name], found.name, colour)
        axes.set_title(name, fontsize=9)
        _dress(axes, "concavity", "masks" if name == "small" else "")
    if len(sets) > 1:
        panels[-1].legend(frameon=False, fontsize=8)
    return _png(figure)


def _shares(
    sets: Sequence[Figures], choose: Callable[[Figures], Histogram], x: str, of: str
) -> bytes:
    def draw(axes: Axes, found: Figures, colour: str) -> None:
        _stairs_of(axes, choose(found), found.name, colour)

    return _figure(sets, draw, x, of)


def _figure(
    sets: Sequence[Figures], draw: Callable[[Axes, Figures, str], None], x: str, of: str
) -> bytes:
    figure = Figure((_WIDTH, _HEIGHT), layout="constrained")
    axes = figure.subplots()
    for found, colour in zip(sets, _cycle(len(sets)), strict=True):
        draw(axes, found, colour)
    _dress(axes, x, of)
    if len(sets) > 1:
        axes.legend(frameon=False, fontsize=8)
    return _png(figure)


def _stairs_of(axes: Axes, histogram: Histogram, name: str, colour: str) -> None:
    _stairs(axes, histogram.counts, np.linspace(0, 1, BINS + 1), name, colour)


def _stairs(axes: Axes, counts: np.ndarray, edges: np.ndarray, name: str, colour: str) -> None:
    shares = counts / max(counts.sum(), 1)
    axes.stairs(shares, edges, color=colour, linewidth=1.4, label=_short(name))
    axes.stairs(shares, edges, color=colour, alpha=0.12, fill=True)


def _dress(axes: Axes, x: str, of: str) -> None:
    axes.set_xlabel(x, fontsize=9)
    axes.set_ylabel(f"share of {of}" if of else "", fontsize=9)
    axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.tick_params(labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)


def _coarse(found: Figures) -> np.ndarray:
    """The heat map in cells so large that they hold some masks each, or in all its cells."""
    block = next((b for b in (1, 2, 4) if found.masks * b**2 > HEAT_CELLS**2 * _PER_CELL), 4)
    side = HEAT_CELLS // block
    return found.heat.reshape(side, block, side, block).sum(axis=(1, 3))


def _cycle(number: int) -> list[str]:
    return [_COLOURS[index % len(_COLOURS)] for index in range(number)]


def _short(name: str) -> str:
    # "$" would begin a formula.
    return (name if len(name) <= 32 else f"{name[:31]}…").replace("$", r"\$")


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, facecolor="white", metadata={"Software": None})
    return buffer.getvalue()
