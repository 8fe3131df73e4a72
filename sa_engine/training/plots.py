"""How a training went, as a picture."""

import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from sa_engine.training.tally import TIMES

_LOSSES = {"total": "all", "focal": "focal", "dice": "dice", "iou": "IoU"}
_IOUS = {"point_miou": "first point", "box_miou": "first box", "last_miou": "last step"}


def plot_curves(
    lines: Sequence[dict[str, Any]],
    loss_names: Mapping[str, str] = _LOSSES,
    iou_names: Mapping[str, str] = _IOUS,
    measured_title: str = "validation: mIoU, 1 point (box: of boxes)",
) -> bytes:
    """Draw the lines of a `metrics.jsonl` as a PNG: losses, IoU of the training masks, validation, time per mask.

    Against iterations, the validation against minutes of training; the time of the last panel is stacked by what takes
    it. The names are those of a line, and of the legend; without `iou_names` there is no such panel.
    """
    steps = [line for line in lines if "total" in line]
    validations = [line for line in lines if "validation" in line]
    figure = Figure(figsize=(14, 3.6), layout="constrained")
    axes = list(figure.subplots(1, 4 if iou_names else 3))
    losses, measured, times = axes[0], *axes[-2:]
    _draw(losses, steps, loss_names, "loss")
    losses.set_yscale("log")
    if iou_names:
        _draw(axes[1], steps, iou_names, "mean IoU of training masks")
    for name in validations[0]["validation"] if validations else ():
        values = [line["validation"][name] for line in validations]
        style = {"linewidth": 3, "color": "black"} if name == "mean" else {}
        measured.plot(
            [line["seconds"] / 60 for line in validations], values, "o-", label=name, **style
        )
    measured.set_title(measured_title)
    key = next((key for line in steps for key in line if key.startswith(TIMES)), f"{TIMES}mask")
    parts = sorted({part for line in steps for part in line[key]})
    if steps:
        stacked = [[line[key].get(part, 0.0) for line in steps] for part in parts]
        times.stackplot([line["iteration"] for line in steps], stacked, labels=parts)
    times.set_title(f"milliseconds per {key.removeprefix(TIMES)}")
    for axis in axes:
        axis.set_xlabel("minutes of training" if axis is measured else "iteration")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize="small", framealpha=0.5)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _draw(
    axis: Axes, lines: Sequence[dict[str, Any]], names: Mapping[str, str], title: str
) -> None:
    iterations = [line["iteration"] for line in lines]
    for name, label in names.items():
        axis.plot(iterations, [line[name] for line in lines], label=label)
    axis.set_title(title)
