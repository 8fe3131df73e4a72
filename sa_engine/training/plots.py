"""How a training went, as a picture."""

import io
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

_LOSSES = {"total": "all", "focal": "focal", "dice": "dice", "iou": "IoU"}
_IOUS = {"point_miou": "first point", "box_miou": "first box", "last_miou": "last step"}


def plot_curves(lines: Sequence[dict[str, Any]]) -> bytes:
    """Draw the lines of a `metrics.jsonl` as a PNG: losses, IoU of the training masks, validation, time per mask.

    Against iterations; the time of the last panel is stacked by what takes it.
    """
    steps = [line for line in lines if "total" in line]
    validations = [line for line in lines if "validation" in line]
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    losses, ious, measured, times = figure.subplots(1, 4)
    _draw(losses, steps, _LOSSES, "loss")
    losses.set_yscale("log")
    _draw(ious, steps, _IOUS, "mean IoU of training masks")
    for name in validations[0]["validation"] if validations else ():
        values = [line["validation"][name] for line in validations]
        style = {"linewidth": 3, "color": "black"} if name == "mean" else {}
        measured.plot(
            [line["iteration"] for line in validations], values, "o-", label=name, **style
        )
    measured.set_title("validation: mIoU, 1 point (box: of boxes)")
    parts = sorted({part for line in steps for part in line["ms_per_mask"]})
    if steps:
        stacked = [[line["ms_per_mask"].get(part, 0.0) for line in steps] for part in parts]
        times.stackplot([line["iteration"] for line in steps], stacked, labels=parts)
    times.set_title("milliseconds per mask")
    for axis in (losses, ious, measured, times):
        axis.set_xlabel("iteration")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(axis: Axes, lines: Sequence[dict[str, Any]], names: dict[str, str], title: str) -> None:
    iterations = [line["iteration"] for line in lines]
    for name, label in names.items():
        axis.plot(iterations, [line[name] for line in lines], label=label)
    axis.set_title(title)
