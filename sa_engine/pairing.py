"""Two versions of an image's masks: which mask became which."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from sa_engine import rle
from sa_engine.records import MaskRecord

LEAST_IOU = 0.5  # of a pair that is found without an id


@dataclass(frozen=True)
class Pair:
    """A mask before and after a person's work; None where there is none.

    Attributes:
        before, after: the mask.
        iou: of the two; 0 if one is missing.
    """

    before: MaskRecord | None
    after: MaskRecord | None
    iou: float

    @property
    def fate(self) -> str:
        """What became of it: "kept", "edited", "deleted" or "added"."""
        if self.before is None:
            return "added"
        if self.after is None:
            return "deleted"
        return "kept" if self.iou == 1 else "edited"


def pair_masks(before: Sequence[MaskRecord], after: Sequence[MaskRecord]) -> list[Pair]:
    """Pair the masks of two versions of an image.

    First by id, if a tool has kept it as a mask's original id; then those that are left, one to one such that the sum
    of their IoUs is largest, and of these the pairs with an IoU of at least `LEAST_IOU`.

    Args:
        before, after: masks in the same frame.

    Returns:
        A pair for each mask: those of `before` in its order, then those that were added.
    """
    iou = rle.iou([mask.segmentation for mask in before], [mask.segmentation for mask in after])
    partner: dict[int, int] = {}
    by_id = {str(mask.id): index for index, mask in enumerate(before)}
    for index, mask in enumerate(after):
        found = by_id.pop(mask.original_id or "", None)
        if found is not None:
            partner[found] = index
    rows = np.array([row for row in range(len(before)) if row not in partner], int)
    taken = set(partner.values())
    columns = np.array([column for column in range(len(after)) if column not in taken], int)
    if len(rows) and len(columns):
        rest = iou[np.ix_(rows, columns)]
        for row, column in zip(*linear_sum_assignment(rest, maximize=True), strict=True):
            if rest[row, column] >= LEAST_IOU:
                partner[int(rows[row])] = int(columns[column])
    pairs = [
        Pair(mask, after[partner[row]], float(iou[row, partner[row]]))
        if row in partner
        else Pair(mask, None, 0.0)
        for row, mask in enumerate(before)
    ]
    taken = set(partner.values())
    return pairs + [
        Pair(None, mask, 0.0) for column, mask in enumerate(after) if column not in taken
    ]
