"""What annotators made of prefilled masks (paper §4, "Semi-automatic stage"): kept, edited, deleted, or added."""

from collections import defaultdict
from dataclasses import replace

from sa_engine.finished import FinishedRun
from sa_engine.pairing import Pair, PairingError, pair_masks, stem
from sa_engine.plan import read_plan
from sa_engine.reader import iter_tables
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths

_COLUMNS = ("image_id", "file_name", "source_path", "sha256")


def fingerprint_of_prefill(out: AnyPath) -> str:
    """What decides the masks of a run that was handed out. Raises RunError if it is none, or is not finished."""
    paths = RunPaths(out)
    info, plan = read_run(paths), read_plan(paths.plan)
    missing = len(plan) - len(read_markers(paths, range(len(plan))))
    if missing:
        raise RunError(
            f"{missing} of {len(plan)} shards of {out} are not finished: masks that annotators were shown may be "
            "missing, and would come in as added; finish it first (`sa-engine status`)"
        )
    return info.fingerprint


class PrefilledRun:
    """The run of shards that annotators started from; where images lie is kept, masks are read image by image.

    Args:
        out: its folder.

    Raises:
        RunError: no run of shards there.
    """

    def __init__(self, out: AnyPath) -> None:
        self.out = out
        self._run = FinishedRun(out)
        self._of_photo: dict[str, set[int]] = defaultdict(set)
        self._of_name: dict[str, set[int]] = defaultdict(set)
        for _, table in iter_tables(out, _COLUMNS):
            for row in table.select(_COLUMNS).to_pylist():
                self._of_photo[row["sha256"] or ""].add(row["image_id"])
                for name in (row["source_path"], row["file_name"]):
                    self._of_name[stem(name or "")].add(row["image_id"])

    def sort(self, record: ImageRecord) -> tuple[ImageRecord, list[MaskRecord]] | None:
        """Say of every mask of an image what was done to get it.

        The image is that of the same photo, else the one whose photo, or released picture, is called as this photo is.

        Args:
            record: as annotators returned it.

        Returns:
            The image, each mask with its `edit_status` ("kept", "edited" or "added") and, if it was shown to the
            annotators, `edit_iou`, `prefill_id`, `box_score` and the model's fingerprint; and the masks that were
            deleted. None if the image was not prefilled.

        Raises:
            PairingError: it has another size, or could be several.
        """
        shown = self._shown(record)
        if shown is None:
            return None
        if (shown.width, shown.height) != (record.width, record.height):
            raise PairingError(
                f"it has {record.width} x {record.height} pixels, and {shown.width} x {shown.height} in {self.out}: "
                "annotate the pictures that were handed out"
            )
        pairs = pair_masks(shown.masks, record.masks)
        of = {pair.after.id: pair for pair in pairs if pair.after is not None}
        masks = tuple(_told(mask, of[mask.id]) for mask in record.masks)
        deleted = [pair.before for pair in pairs if pair.before and pair.after is None]
        return replace(record, masks=masks), deleted

    def _shown(self, record: ImageRecord) -> ImageRecord | None:
        """The image as annotators were shown it."""
        named = self._of_name.get(stem(record.source_path or ""), set())
        copies = self._of_photo.get(record.sha256 or "", set()) if record.sha256 else set()
        found = (named & copies) or copies or named
        if len(found) > 1:
            raise PairingError(
                f"it could be any of the images {', '.join(map(str, sorted(found)))} of {self.out}, by its name: hand "
                "out pictures whose names are those of no other photos"
            )
        return self._run.record(next(iter(found))) if found else None


def _told(mask: MaskRecord, pair: Pair) -> MaskRecord:
    before = pair.before
    if before is None:
        return replace(mask, edit_status=pair.fate)
    return replace(
        mask,
        edit_status=pair.fate,
        edit_iou=pair.iou,
        prefill_id=before.id,
        box_score=before.box_score,
        model_fingerprint=before.model_fingerprint,
    )
