"""What the masks of runs look like: read once, told as a table, as JSON or as a page."""

import json
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tqdm import tqdm

from sa_engine.analysis.figures import HULLS, Figures
from sa_engine.analysis.stages import Key, StageTable
from sa_engine.analysis.text import summary_cells, table_cells, text_table
from sa_engine.partial import LEFT_OUT
from sa_engine.plan import read_plan
from sa_engine.reader import read_failures, shard_records
from sa_engine.returns import DELETED
from sa_engine.run_dir import read_run
from sa_engine.shards import ShardStats, read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths, location, write_results

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Report:
    """All numbers of a report.

    Attributes:
        runs: folder, stage, shards and missing shards of every run.
        stages: see `StageTable`.
        figures: of the runs together.
        compared: of every data set beside them.
    """

    runs: list[dict[str, Any]]
    stages: StageTable
    figures: Figures
    compared: list[Figures]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "runs": self.runs,
            "stages": self.stages.rows(),
            "annotators": self.stages.annotators(),
            "figures": self.figures.to_dict(),
            "compared": [figures.to_dict() for figures in self.compared],
        }

    def notes(self) -> list[str]:
        """What a reader has to know of the runs."""
        found = []
        for run in self.runs:
            if run["missing_shards"]:
                found.append(
                    f"{run['dir']} is not finished: {run['missing_shards']} of {run['shards']} "
                    "shards are missing here"
                )
            if not run["masks"]:
                found.append(f"{run['dir']} has no masks")
        return found

    def __str__(self) -> str:
        """Give the tables to a person."""
        parts = [text_table(table_cells(self.stages.rows(), True))]
        if people := self.stages.annotators():
            parts.append(text_table(table_cells(people, False)))
        if self.compared:
            parts.append(text_table(summary_cells([self.figures, *self.compared])))
        where = [
            f"{run['dir']}: {run['images']:,} images, {run['masks']:,} masks ({run['stage']})"
            for run in self.runs
        ]
        return "\n\n".join([*parts, "\n".join(where)])


def make_report(dirs: Sequence[str], compare: Sequence[str] = ()) -> Report:
    """Read the committed shards of runs, and of data sets to compare them with.

    Args:
        dirs: folders of the runs of a project, in the order of its rounds.
        compare: folders of other runs, each a data set of its own.

    Raises:
        RunError: a folder is named twice or holds no run of shards, or nothing is finished.
    """
    seen: set[str] = set()
    for name in (*dirs, *compare):
        if str(location(name)) in seen:
            raise RunError(f"{name} is named twice: name each run once")
        seen.add(str(location(name)))
    opened = [_Run(location(name)) for name in dirs]
    others = [_Run(location(name)) for name in compare]
    table = StageTable()
    figures = _figures(" + ".join(run.out.name for run in opened), opened)
    runs = [_read(run, figures, table) for run in opened]
    names = [run.out.name for run in (*opened, *others)]
    compared = [
        # Runs of one name are told apart by their folders.
        _figures(
            run.out.name
            if names.count(run.out.name) == 1
            else f"{run.out.parent.name}/{run.out.name}",
            [run],
        )
        for run in others
    ]
    told = [_read(run, found, None) for run, found in zip(others, compared, strict=True)]
    return Report([*runs, *({**run, "compared": True} for run in told)], table, figures, compared)


def write_report(report: Report, dest: AnyPath) -> list[AnyPath]:
    """Write `report.html` and `report.json` into a folder, which is made if missing."""
    from sa_engine.analysis.page import page  # matplotlib takes a second

    return write_results(
        dest,
        {
            "report.html": page(report).encode(),
            "report.json": json.dumps(report.to_dict(), allow_nan=False).encode(),
        },
    )


class _Run:
    """A run's folder, opened: its plan and its committed shards."""

    def __init__(self, out: AnyPath) -> None:
        self.out, paths = out, RunPaths(out)
        info, self.plan = read_run(paths), read_plan(paths.plan)
        if "formats" not in info.config:
            raise RunError(f"{out} has no masks to report on: it is no run of shards")
        self.stage = info.stage
        source = "automatic" if info.stage == "auto" else info.config.get("source")
        if info.stage == "prefill" or info.config.get("prefill"):
            source = "semi-automatic"
        self.key: Key = (source or "unknown", info.config.get("round"))
        self.markers = read_markers(paths, range(len(self.plan)))
        if not self.markers:
            raise RunError(
                f"{out} has no finished shard: none of {len(self.plan)}; run it first, or see "
                f"sa-engine status {out}"
            )

    @property
    def masks(self) -> int:
        return sum(stats.counts.get("masks", 0) for stats in self.markers.values())

    def deleted(self, stats: ShardStats) -> Counter[int]:
        """How many masks annotators deleted in a shard's images, by the image's id."""
        if f"{DELETED} {LEFT_OUT}" not in stats.counts:
            return Counter()
        failures = read_failures(RunPaths(self.out), stats.name)
        return Counter(failure.image_id for failure in failures if failure.error == DELETED)


def _figures(name: str, runs: list[_Run]) -> Figures:
    masks = sum(run.masks for run in runs)
    return Figures(name, share=min(1.0, HULLS / masks) if masks else 1.0)


def _read(run: _Run, figures: Figures, table: StageTable | None) -> dict[str, Any]:
    """Take a run's records in; gives what there is to say of it."""
    images = masks = 0
    shards = tqdm(
        run.markers.items(), unit="shard", desc=run.out.name, disable=not sys.stderr.isatty()
    )
    for index, stats in shards:
        if not stats.files:
            continue
        deleted = run.deleted(stats)
        for record in shard_records(run.out, run.plan[index], stats):
            images, masks = images + 1, masks + len(record.masks)
            try:
                figures.add(record)
            except ValueError as error:
                raise RunError(
                    f"{run.out}: image {record.image_id} has a damaged mask: {error}; see sa-engine "
                    f"verify {run.out}"
                ) from None
            if table is not None:
                table.add(str(run.out), record, run.key, deleted[record.image_id])
    return {
        "dir": str(run.out),
        "stage": run.stage,
        "shards": len(run.plan),
        "missing_shards": len(run.plan) - len(run.markers),
        "images": images,
        "masks": masks,
        "compared": False,
    }
