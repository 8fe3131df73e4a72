"""The paper's table of the data engine's stages (§4): images, masks and seconds per mask."""

from collections import Counter
from collections.abc import Iterable
from typing import Any

from sa_engine.analysis.figures import Tally
from sa_engine.records import ImageRecord, MaskRecord

TOO_LONG_S = 30.0  # §4: annotators go on when a mask takes longer
_TICKS = 10  # the median is told to a tenth of a second
Key = tuple[str, int | None]  # source, round


class StageRow:
    """The masks of one stage and round, or of one annotator in it.

    Attributes:
        source, round: as the masks state them; "unknown" and None if they do not.
        annotator: None in the row of all annotators.
        runs: folders that the masks are from.
        images: with such a mask, or without any in a run of this stage.
        masks: how many.
        timed: masks whose time is known.
    """

    def __init__(self, key: Key, annotator: str | None = None) -> None:
        self.source, self.round = key
        self.annotator = annotator
        self.runs: list[str] = []
        self._per_image, self._ticks = Tally(), Tally()
        self._seconds, self._too_long = 0.0, 0
        self._edits: Counter[str] = Counter()
        self._added_seconds, self._added_timed = 0.0, 0

    def add(self, run: str, timed: list[tuple[MaskRecord, float | None]], deleted: int = 0) -> None:
        """Take in an image: its masks, the known times of them, and how many that were shown are gone."""
        if run not in self.runs:
            self.runs.append(run)
        self._per_image.add(len(timed))
        self._edits.update(mask.edit_status for mask, _ in timed if mask.edit_status)
        self._edits["deleted"] += deleted
        added = _known([one for one in timed if one[0].edit_status == "added"])
        self._added_seconds += sum(added)
        self._added_timed += len(added)
        for value in _known(timed):
            self._ticks.add(round(value * _TICKS))
            self._seconds += value
            self._too_long += value > TOO_LONG_S

    @property
    def images(self) -> int:
        return self._per_image.number

    @property
    def masks(self) -> int:
        return int(sum(n * images for n, images in self._per_image.counts.items()))

    @property
    def timed(self) -> int:
        return self._ticks.number

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values; None is what is not known."""
        middle = self._ticks.median
        return {
            "source": self.source,
            "round": self.round,
            "annotator": self.annotator,
            "runs": self.runs,
            "images": self.images,
            "masks": self.masks,
            "masks_per_image_mean": self._per_image.mean,
            "masks_per_image_median": self._per_image.median,
            "masks_timed": self.timed,
            "seconds_per_mask_median": None if middle is None else middle / _TICKS,
            "seconds_per_mask_mean": self._seconds / self.timed if self.timed else None,
            "share_above_30_s": self._too_long / self.timed if self.timed else None,
            **self._returned(),
        }

    def _returned(self) -> dict[str, float | None]:
        """What became of prefilled masks (§4, stage 2); None if nothing was prefilled."""
        edits, timed = self._edits, self._added_timed
        prefilled = edits["kept"] + edits["edited"] + edits["deleted"]
        known = self.images if edits.total() else 0
        return {
            "masks_per_image_prefilled": prefilled / known if known else None,
            "masks_per_image_added": edits["added"] / known if known else None,
            "share_kept": edits["kept"] / prefilled if prefilled else None,
            "share_deleted": edits["deleted"] / prefilled if prefilled else None,
            "seconds_per_added_mask_mean": self._added_seconds / timed if timed else None,
        }


class StageTable:
    """Rows in the order in which their masks come; runs are added one after another."""

    def __init__(self) -> None:
        self._rows: dict[Key, StageRow] = {}
        self._annotators: dict[tuple[Key, str], StageRow] = {}

    def add(self, run: str, record: ImageRecord, stage: Key, deleted: int = 0) -> None:
        """Take in an image of a run.

        Args:
            run: its folder.
            record: the image.
            stage: what its run is, for an image without any mask, and for masks that are gone.
            deleted: masks that its annotator was shown and deleted; of several annotators nobody knows whose they are.
        """
        groups: dict[Key, list[tuple[MaskRecord, float | None]]] = (
            {stage: []} if deleted or not record.masks else {}
        )
        for mask, seconds in zip(record.masks, mask_seconds(record.masks), strict=True):
            groups.setdefault((mask.source or "unknown", mask.round), []).append((mask, seconds))
        for key, timed in groups.items():
            gone = deleted if key == stage else 0
            self._rows.setdefault(key, StageRow(key)).add(run, timed, gone)
            names = {mask.annotator for mask, _ in timed}
            for name in sorted(name for name in names if name is not None):
                own = [(mask, seconds) for mask, seconds in timed if mask.annotator == name]
                row = self._annotators.setdefault((key, name), StageRow(key, name))
                row.add(run, own, gone if len(names) == 1 else 0)

    def rows(self) -> list[dict[str, Any]]:
        """A row per source and round, with the masks up to and with it."""
        rows, total = [], 0
        for row in self._rows.values():
            total += row.masks
            rows.append({**row.to_dict(), "masks_cumulative": total})
        return rows

    def annotators(self) -> list[dict[str, Any]]:
        """A row per source, round and annotator."""
        return [row.to_dict() for row in self._annotators.values()]


def mask_seconds(masks: Iterable[MaskRecord]) -> list[float | None]:
    """What each mask of an image took; None if that is not known.

    A time of scope "image" is shared evenly by the masks that it covers: those with the same annotator and the same
    time, but for prefilled ones that were kept, which nobody drew (§4 has stage 2's seconds per mask without those).
    """
    masks = list(masks)
    drawn = (mask for mask in masks if mask.edit_status != "kept")
    covered = Counter((m.annotator, m.time_s) for m in drawn if m.time_scope == "image")
    found: list[float | None] = []
    for mask in masks:
        if mask.time_s is None or mask.time_scope not in ("mask", "image"):
            found.append(None)
        elif mask.time_scope == "mask":
            found.append(mask.time_s)
        elif mask.edit_status == "kept":
            found.append(None)
        else:
            found.append(mask.time_s / covered[mask.annotator, mask.time_s])
    return found


def _known(timed: list[tuple[MaskRecord, float | None]]) -> list[float]:
    return [seconds for _, seconds in timed if seconds is not None]
