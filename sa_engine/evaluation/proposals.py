"""How many of the true masks proposals find: recall as COCO computes it, without classes (paper §7.3, §D.3).

An image's proposals are tried by falling score. Each finds the true mask that it overlaps most, of those that it
overlaps by the IoU asked for and that none before it has found; of equals the last, as COCO has it. Average recall is
the share of true masks that the first K proposals of each image find, averaged over IoUs of 0.5 to 0.95. That of small,
medium or large masks leaves the others out, so that no proposal is used up by a mask of another size.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from pycocotools import mask as coco

from sa_engine import rle
from sa_engine.evaluation.data import DataSet
from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.evaluation.results import of_sizes
from sa_engine.finished import FinishedRun
from sa_engine.pairing import ImageIndex
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.rle import RLE
from sa_engine.storage import AnyPath

IOUS = np.linspace(0.5, 0.95, 10)
NOT_FOUND = np.iinfo(np.int64).max
ALL = "all"
KINDS = ("masks", "boxes")

Regions = list[RLE] | np.ndarray
"""Masks, or boxes: (N, 4) float XYXY in pixels, the right and lower edges outside."""


@dataclass(frozen=True)
class Proposals:
    """What may be an object in an image.

    Attributes:
        regions: N masks or boxes.
        scores: (N,), the best first to be tried; equals in their order.
    """

    regions: Regions
    scores: np.ndarray

    def best(self, limit: int) -> Regions:
        """At most `limit` regions, by falling score."""
        order = np.argsort(-self.scores, kind="stable")[:limit]
        if isinstance(self.regions, np.ndarray):
            return self.regions[order]
        return [self.regions[index] for index in order]


def regions_of(masks: Sequence[MaskRecord], kind: str) -> Regions:
    """The masks themselves, or the boxes around their pixels; `kind` is one of `KINDS`."""
    segmentations = [mask.segmentation for mask in masks]
    return segmentations if kind == "masks" else rle.boxes(segmentations)


def proposals_of(record: ImageRecord, kind: str) -> Proposals:
    """An image's masks, ranked by the mean of predicted IoU and stability score (paper §D.3).

    Raises EvaluationError for a mask without these scores.
    """
    scores = []
    for mask in record.masks:
        if mask.predicted_iou is None or mask.stability_score is None:
            raise EvaluationError(
                f"mask {mask.id} of {record.source_path or record.file_name} has no predicted IoU or no stability "
                "score, by which proposals are ranked: give a run of `sa-engine auto`"
            )
        scores.append((mask.predicted_iou + mask.stability_score) / 2)
    return Proposals(regions_of(record.masks, kind), np.array(scores))


def overlaps(truth: Regions, proposals: Proposals, limit: int = 1000) -> np.ndarray:
    """IoU of the `limit` best proposals, the best first, with true regions of the same kind: (P, G) float64."""
    best = proposals.best(limit)
    if not isinstance(best, np.ndarray) and not isinstance(truth, np.ndarray):
        return rle.iou(best, truth)
    if not len(best) or not len(truth):
        return np.zeros((len(best), len(truth)))
    sides = [np.hstack([one[:, :2], one[:, 2:] - one[:, :2]]) for one in map(np.asarray, (best, truth))]  # fmt: skip
    return coco.iou(*sides, [0] * len(truth))


def first_found(iou: np.ndarray) -> np.ndarray:
    """Which proposal finds each true region.

    Args:
        iou: (P, G) of proposals, the best first, with true regions.

    Returns:
        (10, G) int64: for each of `IOUS` the proposal's rank, from 0 on; `NOT_FOUND` where there is none.
    """
    count = iou.shape[1]
    found = np.full((len(IOUS), count), NOT_FOUND)
    for rank in np.flatnonzero(iou.max(axis=1, initial=0) >= IOUS[0]):
        fits = (found == NOT_FOUND) & (iou[rank] >= IOUS[:, None])
        last = count - 1 - np.where(fits, iou[rank], 0)[:, ::-1].argmax(axis=1)
        rows = np.flatnonzero(fits.any(axis=1))
        found[rows, last[rows]] = rank
    return found


@dataclass(frozen=True)
class ImageRecall:
    """What an image's proposals found.

    Attributes:
        source_path: of the photo.
        proposals: their number, those beyond the limit too.
        found: as from `first_found`, for `ALL` true masks and for those of each of COCO's sizes.
    """

    source_path: str | None
    proposals: int
    found: dict[str, np.ndarray]

    def sums(self, size: str, limits: Sequence[int]) -> np.ndarray:
        """(K,): for each number of proposals, the true masks found, averaged over IoUs."""
        found = self.found[size]
        return (found < np.array(limits)[:, None, None]).sum(axis=2).mean(axis=1)


def image_recall(
    truth: ImageRecord, proposals: Proposals, kind: str, limit: int = 1000
) -> ImageRecall:
    """What proposals find of an image's true masks; see `first_found`. Sizes are COCO's, of the true masks' areas."""
    iou = overlaps(regions_of(truth.masks, kind), proposals, limit)
    sizes = of_sizes(np.array([mask.area for mask in truth.masks]))
    every = {ALL: np.ones(len(truth.masks), bool), **sizes}
    found = {size: first_found(iou[:, inside]) for size, inside in every.items()}
    return ImageRecall(truth.source_path, len(proposals.scores), found)


def run_recall(
    data: DataSet,
    run: AnyPath,
    kind: str = "masks",
    limit: int = 1000,
    done: Callable[[int], object] = lambda images: None,
) -> dict[int, ImageRecall]:
    """What a run's masks find of the truth.

    Args:
        data: the truth.
        run: folder of a run of automatic masks over the same photos, see `ImageIndex`.
        kind: of IoU, one of `KINDS`.
        limit: proposals per image.
        done: called with the number of images that were added.

    Returns:
        For every image that both have, by its id in the truth. One in which the run has no mask is among them.

    Raises:
        RunError: no run there.
        EvaluationError: no image in both, or masks without scores.
        PairingError: an image of two sizes, or one that may be two.
    """
    finished = FinishedRun(run)
    wanted = set(data.image_ids)
    index = ImageIndex(data.out, (one for one in iter_records(data.out) if one.image_id in wanted))
    recalls = {}
    for record in iter_records(run):
        advice = "make both runs with the same short_side"
        truth = index.take(record, run, advice, finished.picture_sha256)
        if truth is not None:
            proposals = proposals_of(record, kind)
            recalls[truth.image_id] = image_recall(truth, proposals, kind, limit)
            done(1)
    if not recalls:
        raise EvaluationError(
            f"no image of {run} is one of {data.out} with masks: expected finished images of the same photos"
        )
    return dict(sorted(recalls.items()))
