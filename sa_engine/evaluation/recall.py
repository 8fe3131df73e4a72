"""Recall of runs of automatic masks, from start to report; they are compared as models are in `results`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sa_engine import __version__
from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.evaluation.proposals import ALL, IOUS, ImageRecall, run_recall
from sa_engine.evaluation.results import (
    BOOTSTRAP,
    SIZES,
    Estimate,
    bootstrap,
    data_dict,
    short_names,
    table,
)
from sa_engine.storage import AnyPath, location, write_results

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class RunRecall:
    """A run's recall on the report's images, by image id."""

    name: str
    out: AnyPath
    images: dict[int, ImageRecall]


@dataclass(frozen=True, kw_only=True)
class RecallReport:
    """Runs of automatic masks compared on the images that all of them and the truth have.

    Attributes:
        kind: of IoU, "masks" or "boxes".
        limits: numbers of proposals per image, ascending.
        data: the truth.
        left_out: ids of its images that not all runs have.
        runs: at least one; the others are compared with the first.
        split: of the truth.
        seed: of the bootstrap.
    """

    kind: str
    limits: tuple[int, ...]
    data: DataSet
    left_out: tuple[int, ...]
    runs: tuple[RunRecall, ...]
    split: str
    seed: int

    @property
    def sizes(self) -> tuple[str, ...]:
        """All masks, then COCO's sizes."""
        return (ALL, *SIZES)

    def masks(self, size: str) -> int:
        """Number of true masks of a size."""
        return sum(image.found[size].shape[1] for image in self.runs[0].images.values())

    def estimate(
        self, run: RunRecall, size: str, limits: Sequence[int] | None = None
    ) -> Estimate | None:
        """Average recall by number of proposals, with its bootstrap over the images that have such masks."""
        limits = limits or self.limits
        images = [image for image in run.images.values() if image.found[size].size]
        if not images:
            return None
        sums = np.array([image.sums(size, limits) for image in images])
        counts = np.array([image.found[size].shape[1] for image in images])
        return bootstrap(sums, counts, (self.seed,))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {
            "schema_version": SCHEMA_VERSION,
            "protocol": {
                "kind": self.kind,
                "proposals": self.limits,
                "iou": IOUS.round(2).tolist(),
                "ranked_by": "mean of predicted_iou and stability_score",
            },
            "settings": {"split": self.split, "seed": self.seed, "sa_engine": __version__},
            "bootstrap": BOOTSTRAP,
            "sizes": SIZES,
            "data": data_dict(self.data),
            "images": len(self.runs[0].images),
            "masks": {size: self.masks(size) for size in self.sizes},
            "left_out": self.left_out,
            "runs": [self._run_dict(run) for run in self.runs],
        }

    def _run_dict(self, run: RunRecall) -> dict[str, Any]:
        names = [str(limit) for limit in self.limits]
        own = {size: self.estimate(run, size) for size in self.sizes}
        content: dict[str, Any] = {
            "name": run.name,
            "run": str(run.out),
            "proposals": sum(image.proposals for image in run.images.values()),
            "average_recall": {size: one and one.named(names) for size, one in own.items()},
        }
        if run is not self.runs[0]:
            differences = self._minus_first(run)
            content["minus_first"] = {
                size: one and one.named(names) for size, one in differences.items()
            }
        content["images"] = [
            {
                "image_id": image_id,
                "source_path": image.source_path,
                "proposals": image.proposals,
                "masks": {size: found.shape[1] for size, found in image.found.items()},
                "sum_recall": {
                    size: dict(zip(names, image.sums(size, self.limits).tolist(), strict=True))
                    for size in image.found
                },
            }
            for image_id, image in run.images.items()
        ]
        return content

    def _minus_first(self, run: RunRecall) -> dict[str, Estimate | None]:
        pairs = {
            size: (self.estimate(run, size), self.estimate(self.runs[0], size))
            for size in self.sizes
        }
        return {
            size: one - other if one and other else None for size, (one, other) in pairs.items()
        }

    def __str__(self) -> str:
        """Give the tables for a person; below the first row, half the widths of its 95 % intervals."""
        tables = []
        for run in self.runs:
            counts = [image.proposals for image in run.images.values()]
            title = (
                f"{run.name}  (proposals per image: mean {np.mean(counts):.1f}, most {max(counts)})"
            )
            tables.append(self._table(title, {s: self.estimate(run, s) for s in self.sizes}))
        first, *others = self.runs
        tables += [
            self._table(f"{run.name} minus {first.name}", self._minus_first(run), difference=True)
            for run in others
        ]
        return "\n\n".join(tables)

    def _table(
        self, title: str, estimates: dict[str, Estimate | None], difference: bool = False
    ) -> str:
        form, digits = ("+.4f", 4) if difference else (".3f", 3)
        rows: list[tuple[str, Any, Any, list[str]]] = [
            (self.kind, "images", "masks", [f"AR@{limit}" for limit in self.limits])
        ]
        for size, one in estimates.items():
            if one is None:
                continue
            values, widths = one.cells(form, digits)
            if size == ALL:
                images = len(self.runs[0].images)
                rows += [(self.data.name, images, self.masks(ALL), values), ("", "", "", widths)]
            else:
                rows.append((f"  {size}", "", self.masks(size), values))
        return table(title, rows)

    def notes(self) -> list[str]:
        """What a reader is to know beside the numbers."""
        if not self.left_out:
            return []
        total = len(self.data.image_ids)
        return [
            f"{len(self.left_out)} of {total} images of {self.data.name} are not in every run, and not counted"
        ]


def measure(
    truth: str,
    runs: Sequence[str],
    *,
    kind: str = "masks",
    limits: tuple[int, ...] = (10, 100, 1000),
    split: str = "all",
    seed: int = 0,
    detectors: Sequence[str] = (),
    checkpoint: str = "vit_t",
    progress: bool = False,
) -> RecallReport:
    """Measure how many of the true masks the masks of runs find, and the boxes of detectors.

    Args:
        truth: folder of a run of shards whose masks are the truth.
        runs: folders of runs of automatic masks over the same photos.
        kind: of IoU, "masks" or "boxes".
        limits: numbers of proposals per image, ascending.
        split: of the truth, see `open_data`.
        seed: of the bootstrap.
        detectors: folders of detectors, for boxes; they come after the runs.
        checkpoint: the model whose embedding detectors see.
        progress: show a bar on stderr.

    Raises:
        SaEngineError: no run, no masks, no image in all of them, or what `run_recall` raises.
    """
    places, folders = [location(run) for run in runs], [Path(one) for one in detectors]
    every = [*map(str, places), *map(str, folders)]
    if len(set(every)) < len(every):
        raise EvaluationError(f"a run is named twice: {', '.join(every)}")
    if detectors and kind != "boxes":
        raise EvaluationError("a detector gives boxes, and masks are compared: add --boxes")
    if not every:
        raise EvaluationError("nothing to measure: name a run, or a detector with --detector")
    out = location(truth)
    data = open_data(out, short_names([str(out)])[0], split)
    total = len(every) * len(data.image_ids)
    with tqdm(total=total, unit="image", disable=not progress, dynamic_ncols=True) as bar:
        found = [run_recall(data, place, kind, limits[-1], bar.update) for place in places]
        if folders:
            from sa_engine.detection.measure import detector_recall  # needs torch; runs do not

            found += [
                detector_recall(data, folder, checkpoint, limits[-1], bar.update)
                for folder in folders
            ]
    common = set.intersection(*map(set, found))
    if not common:
        raise EvaluationError(f"no image of {out} is in all of {', '.join(every)}")
    names = short_names(every)
    return RecallReport(
        kind=kind,
        limits=limits,
        data=data,
        left_out=tuple(one for one in data.image_ids if one not in common),
        runs=tuple(
            RunRecall(name, place, {i: image for i, image in recalls.items() if i in common})
            for name, place, recalls in zip(names, [*places, *folders], found, strict=True)
        ),
        split=split,
        seed=seed,
    )


def write(report: RecallReport, out: AnyPath) -> list[AnyPath]:
    """Write `recall.json` and `recall.png` into a folder, each whole or not at all.

    Raises RunError if they cannot be written.
    """
    from sa_engine.evaluation.plots import plot_recall

    content = json.dumps(report.to_dict(), indent=1, allow_nan=False) + "\n"
    return write_results(out, {"recall.json": content.encode(), "recall.png": plot_recall(report)})
