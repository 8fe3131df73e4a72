"""What an evaluation says: means over masks and data sets, their intervals, differences between models.

The mean of a data set is over its masks, the mean of several is over the data sets, each counting the same (paper
§7.1). Intervals are 95 % bootstrap intervals over images: masks of one image are not independent. All models of a
report are resampled with the same draws, so that the interval of their difference is that of pairs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from sa_engine.evaluation.data import DataSet
from sa_engine.evaluation.interactive import Evaluation, ImageScores, Protocol

SCHEMA_VERSION = 1
RESAMPLES = 1000
_PERCENTILES = (2.5, 97.5)
BOOTSTRAP = {"resamples": RESAMPLES, "percentiles": _PERCENTILES, "over": "images"}
# COCO's bounds, here of pixels of the released image.
SIZES = {"small": (0, 32**2), "medium": (32**2, 96**2), "large": (96**2, None)}
_NAME, _CELL = 16, 9


@dataclass(frozen=True)
class Estimate:
    """K numbers and what they are in R resamples of the images; differences and means are estimates again."""

    values: np.ndarray  # (K,)
    resampled: np.ndarray  # (R, K)

    @property
    def interval(self) -> np.ndarray:
        """(2, K): lower and upper ends of the 95 % intervals."""
        return np.percentile(self.resampled, _PERCENTILES, axis=0)

    def named(self, names: Sequence[str]) -> dict[str, dict[str, float]]:
        """Value, low and high of each number, for JSON."""
        return {
            name: {"value": value, "low": low, "high": high}
            for name, value, low, high in zip(
                names, self.values.tolist(), *self.interval.tolist(), strict=True
            )
        }

    def cells(self, form: str, digits: int) -> tuple[list[str], list[str]]:
        """For tables: the values, and half the widths of their intervals."""
        low, high = self.interval
        return (
            [f"{value:{form}}" for value in self.values],
            [f"±{width:.{digits}f}" for width in (high - low) / 2],
        )

    def __sub__(self, other: Estimate) -> Estimate:
        return Estimate(self.values - other.values, self.resampled - other.resampled)

    @staticmethod
    def mean(estimates: Sequence[Estimate]) -> Estimate:
        """Their mean, each counting the same."""
        return Estimate(
            np.mean([one.values for one in estimates], axis=0),
            np.mean([one.resampled for one in estimates], axis=0),
        )


def estimate(evaluation: Evaluation, seed: Sequence[int] = (0,)) -> Estimate:
    """Mean IoU over a data set's masks, by metric, with its bootstrap over images.

    Args:
        evaluation: the scores of I images.
        seed: of the draws; equal seeds and numbers of images draw the same.
    """
    counts = np.array([len(image.areas) for image in evaluation.images])
    sums = np.array([_sums(image, evaluation.protocol) for image in evaluation.images])
    return bootstrap(sums, counts, seed)


def bootstrap(sums: np.ndarray, counts: np.ndarray, seed: Sequence[int]) -> Estimate:
    """Means over masks, with their bootstrap over images.

    Args:
        sums: (I, K) over the masks of each image.
        counts: (I,) numbers of these masks, none of them 0.
        seed: of the draws; equal seeds and numbers of images draw the same.
    """
    images = len(counts)
    rng = np.random.default_rng(seed)
    resampled = []
    for _ in range(RESAMPLES):
        drawn = np.bincount(rng.integers(images, size=images), minlength=images)
        resampled.append(drawn @ sums / (drawn @ counts))
    return Estimate(sums.sum(axis=0) / counts.sum(), np.array(resampled))


def by_size(evaluation: Evaluation) -> dict[str, tuple[int, np.ndarray | None]]:
    """Number of masks and their mean IoU by metric, (K,), for each of `SIZES`; None where there is no mask."""
    areas = np.concatenate([image.areas for image in evaluation.images])
    iou = np.stack(
        [
            np.concatenate([image.iou[metric] for image in evaluation.images])
            for metric in evaluation.protocol.metrics
        ],
        axis=1,
    )
    return {
        name: (int(inside.sum()), iou[inside].mean(axis=0) if inside.any() else None)
        for name, inside in of_sizes(areas).items()
    }


def of_sizes(areas: np.ndarray) -> dict[str, np.ndarray]:
    """Which of N masks, by their areas in pixels, are of each of `SIZES`: (N,) bool."""
    return {
        name: (areas >= low) & (areas < (np.inf if high is None else high))
        for name, (low, high) in SIZES.items()
    }


@dataclass(frozen=True)
class ModelResult:
    """A model and its scores on every data set, in the order of the report's."""

    name: str
    fingerprint: str
    seconds: float
    evaluations: tuple[Evaluation, ...]

    def estimates(self, seed: int) -> list[Estimate]:
        """Of every data set; the draws of one do not depend on the others."""
        return [estimate(one, (seed, index)) for index, one in enumerate(self.evaluations)]


@dataclass(frozen=True, kw_only=True)
class Report:
    """Models compared on data sets.

    Attributes:
        protocol: what was measured.
        data: the data sets.
        models: at least one; the others are compared with the first.
        settings: split, device, precision, threads and versions.
    """

    protocol: Protocol
    data: tuple[DataSet, ...]
    models: tuple[ModelResult, ...]
    settings: dict[str, Any]

    def estimates(self) -> list[list[Estimate]]:
        """For every model one for each data set, then their mean."""
        found = [model.estimates(self.protocol.seed) for model in self.models]
        return [[*estimates, Estimate.mean(estimates)] for estimates in found]

    @property
    def rows(self) -> list[str]:
        """Names of the data sets, then the mean's."""
        return [*(data.name for data in self.data), "mean"]

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        estimates = self.estimates()
        return {
            "schema_version": SCHEMA_VERSION,
            "protocol": {**asdict(self.protocol), "metrics": self.protocol.metrics},
            "settings": self.settings,
            "bootstrap": BOOTSTRAP,
            "sizes": SIZES,
            "data": [data_dict(data) for data in self.data],
            "models": [
                self._model_dict(model, own, None if model is self.models[0] else estimates[0])
                for model, own in zip(self.models, estimates, strict=True)
            ],
        }

    def _model_dict(
        self, model: ModelResult, own: list[Estimate], first: list[Estimate] | None
    ) -> dict[str, Any]:
        content: dict[str, Any] = {
            "name": model.name,
            "fingerprint": model.fingerprint,
            "seconds": round(model.seconds, 1),
            "miou": self._by_row(own),
        }
        if first is not None:
            content["minus_first"] = self._by_row(_differences(own, first))
        names = self.protocol.metrics
        content["by_size"] = {
            data.name: {
                size: {"masks": count, "miou": None if mean is None else _named(names, mean)}
                for size, (count, mean) in by_size(evaluation).items()
            }
            for data, evaluation in zip(self.data, model.evaluations, strict=True)
        }
        content["images"] = {
            data.name: [_image_dict(image, self.protocol) for image in evaluation.images]
            for data, evaluation in zip(self.data, model.evaluations, strict=True)
        }
        return content

    def _by_row(self, estimates: list[Estimate]) -> dict[str, Any]:
        return {
            row: one.named(self.protocol.metrics)
            for row, one in zip(self.rows, estimates, strict=True)
        }

    def __str__(self) -> str:
        """Give the tables for a person; below each row, half the widths of its 95 % intervals."""
        estimates = self.estimates()
        first, *others = self.models
        tables = [
            self._table(f"{model.name}  ({model.fingerprint[:12]})", own, model)
            for model, own in zip(self.models, estimates, strict=True)
        ]
        tables += [
            self._table(f"{model.name} minus {first.name}", _differences(own, estimates[0]))
            for model, own in zip(others, estimates[1:], strict=True)
        ]
        return "\n\n".join(tables)

    def _table(
        self, title: str, estimates: list[Estimate], model: ModelResult | None = None
    ) -> str:
        """Means with their numbers of images and masks and the sizes; without a model, differences alone."""
        form, digits = ("+.4f", 4) if model is None else (".3f", 3)
        clicks = [
            f"{metric} point{'s' * (metric != '1')}" if metric.isdigit() else metric
            for metric in self.protocol.metrics
        ]
        rows: list[tuple[str, Any, Any, list[str]]] = [("data set", "images", "masks", clicks)]
        for index, (name, one) in enumerate(zip(self.rows, estimates, strict=True)):
            if len(self.data) == index == 1:
                continue  # the mean of one data set
            evaluation = model.evaluations[index] if model and index < len(self.data) else None
            numbers = (len(evaluation.images), evaluation.masks) if evaluation else ("", "")
            values, widths = one.cells(form, digits)
            rows += [(name, *numbers, values), ("", "", "", widths)]
            for size, (count, mean) in (by_size(evaluation) if evaluation else {}).items():
                if mean is not None:
                    rows.append((f"  {size}", "", count, [f"{value:.3f}" for value in mean]))
        return table(title, rows)


def _differences(own: list[Estimate], first: list[Estimate]) -> list[Estimate]:
    return [one - other for one, other in zip(own, first, strict=True)]


def short_names(texts: Sequence[str]) -> list[str]:
    """Last parts of paths, where these differ from each other and from the mean's name; else the whole."""
    short = [Path(text).name for text in texts]
    return short if len({*short, "mean"}) > len(short) else list(texts)


def table(title: str, rows: Sequence[tuple[str, Any, Any, list[str]]]) -> str:
    """Rows of a name, numbers of images and masks, and cells."""
    width = max(_NAME, *(len(row[0]) for row in rows))
    lines = [
        f"{name:{width}}{images:>7}{masks:>8}  {''.join(f'{cell:>{_CELL}}' for cell in cells)}"
        for name, images, masks, cells in rows
    ]
    return "\n".join([title, *map(str.rstrip, lines)])


def _sums(image: ImageScores, protocol: Protocol) -> list[float]:
    return [float(image.iou[metric].sum()) for metric in protocol.metrics]


def _named(names: Sequence[str], values: np.ndarray) -> dict[str, float]:
    return dict(zip(names, values.tolist(), strict=True))


def data_dict(data: DataSet) -> dict[str, Any]:
    """What a report says of a data set."""
    return {
        "name": data.name,
        "run": str(data.out),
        "images": len(data.image_ids),
        "masks": data.masks,
        "fingerprint": data.fingerprint,
    }


def _image_dict(image: ImageScores, protocol: Protocol) -> dict[str, Any]:
    """An image's sums: all that another bootstrap over images needs."""
    return {
        "image_id": image.image_id,
        "source_path": image.source_path,
        "masks": len(image.areas),
        "sum_iou": dict(zip(protocol.metrics, _sums(image, protocol), strict=True)),
    }
