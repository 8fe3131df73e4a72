"""A report as one HTML file: tables first, then the figures; no script, nothing to load."""

import base64
import html
from typing import TYPE_CHECKING

from sa_engine.analysis import plots
from sa_engine.analysis.text import summary_cells, table_cells

if TYPE_CHECKING:
    from sa_engine.analysis.report import Report

_STYLE = """
:root { color-scheme: light; }
body { background: #fff; color: #18181b; font: 16px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 64rem; padding: 1rem; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-size: .875rem; font-variant-numeric: tabular-nums; }
th, td { border-bottom: 1px solid #e4e4e7; padding: .3rem .6rem; text-align: right; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
th { border-bottom-color: #71717a; font-weight: 600; }
figure { break-inside: avoid; margin: 1.5rem 0; }
img { height: auto; max-width: 100%; }
figcaption, .small { color: #52525b; font-size: .875rem; }
@media print { body { font-size: 11pt; padding: 0; } .wide { overflow: visible; } }
"""
_TIME = (
    "Seconds per mask where the annotation tool told a time; blank where it did not. A time that "
    "covers an image is shared evenly by the masks of the same annotator with that same time. An "
    "image without any mask counts as an image of its run's stage. “timed” is the number of masks "
    "whose time is known."
)


def page(report: "Report") -> str:
    """The whole page."""
    sets = [report.figures, *report.compared]
    parts = [_notes(report), "<h2>Stages</h2>", _table(table_cells(report.stages.rows(), True))]
    parts.append(f'<p class="small">{_TIME}</p>')
    if people := report.stages.annotators():
        parts += ["<h2>Annotators</h2>", _table(table_cells(people, False))]
    parts += ["<h2>Summary</h2>", _table(summary_cells(sets)), "<h2>Figures</h2>", *_figures(sets)]
    title = f"Masks of {html.escape(report.figures.name)}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{title}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def _notes(report: "Report") -> str:
    lines = [
        f"{run['dir']}: {run['images']:,} images, {run['masks']:,} masks ({run['stage']}"
        f"{', compared' if run['compared'] else ''})"
        for run in report.runs
    ]
    lines += [f"Note: {note}" for note in report.notes()]
    return '<p class="small">' + "<br>".join(map(html.escape, lines)) + "</p>"


def _table(cells: list[list[str]]) -> str:
    head, *rows = ([html.escape(text) for text in row] for row in cells)
    lines = ["".join(f"<td>{text}</td>" for text in row) for row in rows]
    return (
        '<div class="wide"><table><thead><tr>'
        + "".join(f"<th>{text}</th>" for text in head)
        + "</tr></thead><tbody>"
        + "".join(f"<tr>{line}</tr>" for line in lines)
        + "</tbody></table></div>"
    )


def _figures(sets: list[plots.Figures]) -> list[str]:
    hulls = ", ".join(
        f"{sum(part.number for part in found.concavity.values()):,} of {found.masks:,} masks of "
        f"{found.name}"
        for found in sets
    )
    drawn = [
        (plots.heat_maps(sets), "Mask centres: the middle of each box, divided by the image's "
         "width and height; dark is many, each map by its own maximum."),
        (plots.masks_per_image(sets), "Masks per image, those without any included."),
        (plots.relative_size(sets), "Relative size: the square root of mask area / image area. "
         "Small is below 0.1, large from 0.3 on."),
        (plots.concavity(sets), "Concavity: 1 - mask area / area of its convex hull around the "
         f"pixels' corners, by relative size; computed for {hulls}."),
        (plots.scores(sets, "predicted_iou"), "Predicted IoU, of the masks that have one."),
        (plots.scores(sets, "stability"), "Stability score, of the masks that have one."),
    ]  # fmt: skip
    return [_figure(png, caption) for png, caption in drawn if png is not None]


def _figure(png: bytes, caption: str) -> str:
    data, text = base64.b64encode(png).decode(), html.escape(caption)
    return (
        f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
        f"<figcaption>{text}</figcaption></figure>"
    )
