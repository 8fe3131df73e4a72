"""Figures of evaluations: mIoU against the number of points, the paper's figure 9; recall against that of proposals."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_engine.evaluation.interactive import BOX, ORACLE
from sa_engine.evaluation.recall import RecallReport
from sa_engine.evaluation.results import Estimate, Report

_COLUMNS = 4
_CURVE = 60  # points along a curve of recall
_PANEL = 3.2  # inches


def plot(report: Report) -> bytes:
    """Draw a report as a PNG: a panel for each data set, a line for each model with its 95 % band.

    A hollow ring is the oracle, a dashed line the box prompt.
    """
    estimates = report.estimates()
    panels = list(range(len(report.rows))) if len(report.data) > 1 else [0]
    columns = min(_COLUMNS, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(_PANEL * columns + 0.6, _PANEL * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat
    for axis in axes[len(panels) :]:
        axis.set_visible(False)
    for axis, panel in zip(axes, panels, strict=False):
        axis.set_title(report.rows[panel])
        for number, (model, own) in enumerate(zip(report.models, estimates, strict=True)):
            _draw(axis, report.protocol.metrics, own[panel], f"C{number}", model.name)
        axis.set_xlabel("points")
        axis.set_xticks(report.protocol.points)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("mIoU")
    if ORACLE in report.protocol.metrics:
        axes[0].plot([], [], "o", color="grey", markerfacecolor="none", label="oracle, 1 point")
    if BOX in report.protocol.metrics:
        axes[0].plot([], [], "--", color="grey", linewidth=1, label="box")
    axes[0].legend(loc="lower right", fontsize="small")
    return _png(figure)


def _draw(axis: Axes, metrics: Sequence[str], one: Estimate, colour: str, name: str) -> None:
    clicks = [index for index, metric in enumerate(metrics) if metric.isdigit()]
    points = np.array([int(metrics[index]) for index in clicks])
    low, high = one.interval[:, clicks]
    axis.plot(points, one.values[clicks], "o-", color=colour, label=name)
    axis.fill_between(points, low, high, color=colour, alpha=0.15, linewidth=0)
    if ORACLE in metrics:
        axis.plot(1, one.values[metrics.index(ORACLE)], "o", color=colour, markerfacecolor="none")
    if BOX in metrics:
        axis.axhline(one.values[metrics.index(BOX)], color=colour, linestyle="--", linewidth=1)


def plot_recall(report: RecallReport) -> bytes:
    """Draw recall against the number of proposals as a PNG: a panel for all masks and for each size, a line for each
    run with its 95 % band.
    """
    limits = np.unique(np.geomspace(1, report.limits[-1], _CURVE).astype(int))
    panels = [size for size in report.sizes if report.masks(size)]
    figure = Figure(figsize=(_PANEL * len(panels) + 0.6, _PANEL + 0.6), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharex=True, sharey=True).flat
    for axis, size in zip(axes, panels, strict=True):
        axis.set_title(f"{size}: {report.masks(size):,} masks")
        for number, run in enumerate(report.runs):
            one = report.estimate(run, size, limits.tolist())
            assert one is not None, "there are masks"
            axis.plot(limits, one.values, color=f"C{number}", label=run.name)
            axis.fill_between(limits, *one.interval, color=f"C{number}", alpha=0.15, linewidth=0)
        axis.set_xscale("log")
        axis.set_xlabel("proposals per image")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"average recall of {report.kind}")
    axes[0].set_ylim(0, 1)
    axes[0].legend(loc="upper left", fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # Without the version of matplotlib, so that equal reports are equal files.
    figure.savefig(buffer, format="png", dpi=150, metadata={"Software": None})
    return buffer.getvalue()
