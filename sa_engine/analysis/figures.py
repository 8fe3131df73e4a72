"""The paper's figures of a data set (§5), gathered record by record in histograms of fixed size."""

from collections import Counter
from typing import Any

import cv2
import numpy as np

from sa_engine import rle
from sa_engine.records import ImageRecord, MaskRecord

HEAT_CELLS = 64
BINS = 50
# Relative size: a tenth and three tenths of the image's side, 1 % and 9 % of its area.
SIZES = {"small": (0.0, 0.1), "medium": (0.1, 0.3), "large": (0.3, np.inf)}
HULLS = 200_000  # masks whose concavity is computed, about, of a data set that has more
_WHOLE_IMAGE = 0.9
_SEED = 0


class Histogram:
    """Counts of values from 0 to 1 in `BINS` equal bins, and their exact mean."""

    def __init__(self) -> None:
        self.counts = np.zeros(BINS, np.int64)
        self._sum = 0.0

    def add(self, values: np.ndarray) -> None:
        """Count (N,) values; what lies outside of 0 to 1 goes into the outermost bins."""
        self.counts += np.histogram(np.clip(values, 0, 1), BINS, (0, 1))[0]
        self._sum += float(values.sum())

    @property
    def number(self) -> int:
        """How many values were counted."""
        return int(self.counts.sum())

    @property
    def mean(self) -> float | None:
        """Of all values; None if there are none."""
        return self._sum / self.number if self.number else None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"number": self.number, "mean": self.mean, "counts": self.counts.tolist()}


class Tally:
    """How often each value came: exact statistics in a memory that does not grow with their number."""

    def __init__(self) -> None:
        self.counts: Counter[float] = Counter()

    def add(self, value: float) -> None:
        """Count a value."""
        self.counts[value] += 1

    @property
    def number(self) -> int:
        """How many values were counted."""
        return self.counts.total()

    @property
    def mean(self) -> float | None:
        """Of all values; None if there are none."""
        total = sum(value * count for value, count in self.counts.items())
        return total / self.number if self.number else None

    @property
    def median(self) -> float | None:
        """Of all values, between the middle two of an even number; None if there are none."""
        if not self.counts:
            return None
        values = sorted(self.counts)
        ends = np.cumsum([self.counts[value] for value in values])
        low, high = np.searchsorted(ends, [(self.number - 1) // 2, self.number // 2], side="right")
        return (values[low] + values[high]) / 2


class Figures:
    """What the masks of a data set look like.

    Attributes:
        name: what a person calls it.
        share: of the masks whose concavity is computed, by a seeded draw; 1.0 is all.
        images, masks: how many.
        empty: images without any mask.
        heat: (HEAT_CELLS, HEAT_CELLS) mask centres by row and column of the normalised image.
        per_image: masks of every image.
        size: sqrt(mask area / image area).
        concavity: 1 - area / hull area, by size class.
        sources: masks by source.
        predicted_iou, stability: of the masks that have such a score.
        border: masks that touch the image's border.
        whole: masks that cover more than 90 % of their image.
        duplicates: masks that equal an earlier one of their image.
    """

    def __init__(self, name: str, share: float = 1.0) -> None:
        self.name, self.share = name, share
        self.images = self.masks = self.empty = 0
        self.border = self.whole = self.duplicates = 0
        self.heat = np.zeros((HEAT_CELLS, HEAT_CELLS), np.int64)
        self.per_image = Tally()
        self.size, self.predicted_iou, self.stability = Histogram(), Histogram(), Histogram()
        self.concavity = {name: Histogram() for name in SIZES}
        self.sources: Counter[str] = Counter()
        self._draw = np.random.default_rng(_SEED)

    def add(self, record: ImageRecord) -> None:
        """Take in an image and its masks."""
        masks = record.masks
        self.images += 1
        self.masks += len(masks)
        self.per_image.add(len(masks))
        if not masks:
            self.empty += 1
            return
        sides = np.array([record.width, record.height])
        boxes = np.array([mask.bbox for mask in masks])
        # SA-1B's width is xmax - xmin: one pixel less than what the box covers.
        centres = (boxes[:, :2] + (boxes[:, 2:] + 1) / 2) / sides
        column, row = np.clip((centres * HEAT_CELLS).astype(int), 0, HEAT_CELLS - 1).T
        np.add.at(self.heat, (row, column), 1)
        last = boxes[:, :2] + boxes[:, 2:]
        touches = (boxes[:, :2] <= 0).any(axis=1) | (last >= sides - 1).any(axis=1)
        self.border += int(touches.sum())
        covered = np.array([mask.area for mask in masks]) / (record.width * record.height)
        self.whole += int((covered > _WHOLE_IMAGE).sum())
        self.size.add(np.sqrt(covered))
        self.duplicates += len(masks) - len({mask.segmentation["counts"] for mask in masks})
        self.sources.update(mask.source or "unknown" for mask in masks)
        self.predicted_iou.add(_known([mask.predicted_iou for mask in masks]))
        self.stability.add(_known([mask.stability_score for mask in masks]))
        self._add_concavity(masks, np.sqrt(covered))

    def _add_concavity(self, masks: tuple[MaskRecord, ...], sizes: np.ndarray) -> None:
        drawn = self._draw.random(len(masks)) < self.share
        values = np.array(
            [
                concavity(mask.segmentation) if chosen else np.nan
                for mask, chosen in zip(masks, drawn, strict=True)
            ]
        )
        for name, (low, high) in SIZES.items():
            of_class = values[(sizes >= low) & (sizes < high)]
            self.concavity[name].add(of_class[~np.isnan(of_class)])

    def summary(self) -> dict[str, Any]:
        """The numbers that a table shows; None where there is nothing to tell."""
        parts = list(self.concavity.values())
        number = sum(part.number for part in parts)
        total = sum((part.mean or 0.0) * part.number for part in parts)
        return {
            "images": self.images,
            "masks": self.masks,
            "images_without_masks": self.empty,
            "masks_per_image_mean": self.per_image.mean,
            "masks_per_image_median": self.per_image.median,
            "relative_size_mean": self.size.mean,
            **{f"share_{name}": value for name, value in self.size_shares().items()},
            "concavity_mean": total / number if number else None,
            **{f"concavity_{name}": part.mean for name, part in self.concavity.items()},
            "concavity_masks": number,
            "share_touching_border": self._of_masks(self.border),
            "share_above_90_percent": self._of_masks(self.whole),
            "share_duplicates": self._of_masks(self.duplicates),
            "predicted_iou_mean": self.predicted_iou.mean,
            "stability_score_mean": self.stability.mean,
        }

    def size_shares(self) -> dict[str, float | None]:
        """Share of the masks in each size class; the classes begin and end with bins."""
        edges = np.arange(BINS) / BINS
        return {
            name: self._of_masks(
                int(self.size.counts[(edges >= low - 1e-9) & (edges < high - 1e-9)].sum())
            )
            for name, (low, high) in SIZES.items()
        }

    def _of_masks(self, number: int) -> float | None:
        return number / self.masks if self.masks else None

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {
            "name": self.name,
            "summary": self.summary(),
            "sources": dict(self.sources),
            "centres": self.heat.tolist(),
            "masks_per_image": sorted(
                [int(n), count] for n, count in self.per_image.counts.items()
            ),
            "relative_size": self.size.to_dict(),
            "concavity": {name: part.to_dict() for name, part in self.concavity.items()},
            "concavity_share_of_masks": self.share,
            "predicted_iou": self.predicted_iou.to_dict(),
            "stability_score": self.stability.to_dict(),
        }


def concavity(mask: rle.RLE) -> float:
    """1 - area / area of the convex hull (§5); 0 for an empty mask.

    The hull is that of the pixels' corners, so that a rectangle has 0. It is found from the runs'
    ends; no image is decoded. Raises ValueError for a damaged RLE.
    """
    lengths, height = rle.runs(mask), mask["size"][0]
    ends = lengths.cumsum()[1::2]
    starts = ends - lengths[1::2]
    filled = ends > starts
    if not filled.any():
        return 0.0
    left, top = np.divmod(starts[filled], height)
    right, bottom = np.divmod(ends[filled] - 1, height)
    area = int(lengths[1::2].sum())
    wraps = right > left  # from the foot of a column to the head of a later one
    foot = np.where(wraps, height, bottom + 1)
    head = np.where(wraps, 0, top)
    corners = [(left, top), (left + 1, top), (left, foot), (left + 1, foot)]
    corners += [(right, head), (right + 1, head), (right, bottom + 1), (right + 1, bottom + 1)]
    corners += [(left[wraps] + 1, head[wraps]), (right[wraps], foot[wraps])]
    points = np.concatenate([np.stack(corner, axis=1) for corner in corners]).astype(np.int32)
    return 1 - area / cv2.contourArea(cv2.convexHull(points))


def _known(scores: list[float | None]) -> np.ndarray:
    return np.array([score for score in scores if score is not None], dtype=float)
