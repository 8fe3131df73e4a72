"""Two versions of the same masks: which image is which, and which mask became which."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath

import numpy as np
from scipy.optimize import linear_sum_assignment

from sa_engine import rle
from sa_engine.errors import SaEngineError
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.storage import AnyPath

LEAST_IOU = 0.5  # of a pair that is found without an id
_RELEASED = re.compile(r"sa_[0-9]+")  # what a picture is called in every run


class PairingError(SaEngineError):
    """Two runs whose images cannot be paired."""


class ImageIndex:
    """The images of a run, to be found by those of another run; each is found once.

    Images are the same if their photos have the same bytes, else if one's photo is the other's released picture: so it
    is when what `export --with-images` wrote was corrected; else if their photos have the same name, with or without
    its suffix. `sa_<number>`, as pictures are called in every run, decides only where content is not known.

    Args:
        out: the run's folder, for messages.
        records: of its images.

    Raises:
        PairingError: two images of one name.
    """

    def __init__(self, out: AnyPath, records: Iterable[ImageRecord]) -> None:
        self.out = out
        self.rest: dict[str, ImageRecord] = {}
        self._copies: defaultdict[str, list[str]] = defaultdict(list)
        for record in records:
            name = stem(record.source_path or record.file_name)
            if name in self.rest:
                raise PairingError(f"{out} has {name} twice: take a run in which names differ")
            self.rest[name] = record
            self._copies[record.sha256 or ""].append(name)

    def take(
        self,
        record: ImageRecord,
        out: AnyPath,
        advice: str,
        picture_sha256: Callable[[int], str | None],
    ) -> ImageRecord | None:
        """The image that `record` is of, no longer in `rest`; None if there is none.

        Args:
            record: an image of another run.
            out: that run's folder, for messages.
            advice: what to do if the images differ in size.
            picture_sha256: that run's `FinishedRun.picture_sha256`; asked for images that are found by name alone.

        Raises:
            PairingError: an image of two sizes, or two images, by its photo's name and its picture's.
        """
        copies = self._copies[record.sha256] if record.sha256 else []
        # Of copies of a photo, first the one of the same name.
        copies = sorted(copies, key=lambda name: name != stem(record.source_path or ""))
        name = next((name for name in copies if name in self.rest), None)
        if name is None:
            name = self._called(record, out, picture_sha256)
        other = None if name is None else self.rest.pop(name)
        if other and (other.width, other.height) != (record.width, record.height):
            raise PairingError(
                f"{record.source_path} has {record.width} x {record.height} pixels in {out}, and {other.width} x "
                f"{other.height} in {self.out}: {advice}"
            )
        return other

    def _called(
        self, record: ImageRecord, out: AnyPath, picture_sha256: Callable[[int], str | None]
    ) -> str | None:
        """The name of an image of which there is no photo of the same bytes."""
        both = dict.fromkeys((stem(record.source_path or ""), stem(record.file_name)))
        names = [name for name in both if name in self.rest]
        if not names:
            return None
        released = picture_sha256(record.image_id)
        told = {name: released and self.rest[name].sha256 for name in names}
        for name in names:
            if told[name] and told[name] == released:
                return name
        left = [name for name in names if not (told[name] and _RELEASED.fullmatch(name))]
        if len(left) > 1:
            raise PairingError(
                f"image {record.image_id} of {out} may be {left[0]} of {self.out}, by its photo's name, or {left[1]}, "
                "by its picture's, and their content is not known: take runs with pictures and Parquet, or photos "
                "that are not called sa_<number>"
            )
        return left[0] if left else None


def stem(name: str) -> str:
    """A photo's path without its suffix, under which its picture may be found again."""
    return str(PurePosixPath(name).with_suffix("")) if name else ""


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
