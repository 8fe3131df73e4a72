"""The numbers of a report as a person reads them: cells of tables."""

from typing import Any

from sa_engine.analysis.figures import Figures

_HEADS = {
    "source": "source",
    "round": "round",
    "annotator": "annotator",
    "images": "images",
    "masks": "masks",
    "masks_per_image_mean": "per image",
    "masks_per_image_median": "median",
    "masks_cumulative": "cumulative",
    "seconds_per_mask_median": "s/mask median",
    "seconds_per_mask_mean": "mean",
    "share_above_30_s": "> 30 s",
    "masks_timed": "timed",
}
# Of stages whose photos were prefilled, where there is one.
_RETURNED = {
    "masks_per_image_prefilled": "prefilled per image",
    "masks_per_image_added": "added",
    "share_kept": "kept",
    "share_deleted": "deleted",
    "seconds_per_added_mask_mean": "s/added",
}


def table_cells(rows: list[dict[str, Any]], stages: bool) -> list[list[str]]:
    """The stages' rows, or the annotators', as text, heads first; what is not known is blank."""
    prefilled = any(row["masks_per_image_prefilled"] is not None for row in rows)
    heads = _HEADS | _RETURNED if prefilled else _HEADS
    names = [name for name in heads if name != ("annotator" if stages else "masks_cumulative")]
    return [[heads[n] for n in names], *([cell(n, row[n]) for n in names] for row in rows)]


def summary_cells(sets: list[Figures]) -> list[list[str]]:
    """The summary numbers of data sets in columns, their names first."""
    columns = [figures.summary() for figures in sets]
    lines = [
        [name.replace("_", " "), *(cell(name, column[name]) for column in columns)]
        for name in columns[0]
    ]
    for source in dict.fromkeys(source for figures in sets for source in figures.sources):
        shares = [f.sources[source] / f.masks if f.masks else None for f in sets]
        lines.append([f"share {source}", *(cell("share", share) for share in shares)])
    return [["", *(figures.name for figures in sets)], *lines]


def cell(name: str, value: Any) -> str:
    """A value as a person reads it."""
    if value is None:
        return ""
    if name.startswith("share"):
        return f"{value:.1%}"
    if isinstance(value, float):
        return f"{value:,.1f}" if "masks_per_image" in name or "seconds" in name else f"{value:.3f}"
    return str(value) if isinstance(value, str) or name == "round" else f"{value:,}"


def text_table(cells: list[list[str]]) -> str:
    """Cells in columns of equal width, the first to the left."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            text.ljust(width) if number == 0 else text.rjust(width)
            for number, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
