"""What annotators made of prefilled masks (paper §4, "Semi-automatic stage"): kept, edited, deleted, or added."""

from collections import defaultdict
from dataclasses import replace

from sa_engine.finished import FinishedRun
from sa_engine.pairing import LEAST_IOU, Pair, PairingError, pair_masks, stem
from sa_engine.plan import read_plan
from sa_engine.reader import iter_tables
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths

DELETED = "prefilled masks"  # left out of a run: its annotators deleted them
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
        self._knows_photos = "parquet" in self._run.config["formats"]
        self._of_photo: dict[str, set[int]] = defaultdict(set)
        self._of_name: dict[str, set[int]] = defaultdict(set)
        for _, table in iter_tables(out, _COLUMNS):
            for row in table.select(_COLUMNS).to_pylist():
                self._of_photo[row["sha256"] or ""].add(row["image_id"])
                for name in (row["source_path"], row["file_name"]):
                    self._of_name[stem(name or "")].add(row["image_id"])

    def sort(self, record: ImageRecord) -> tuple[ImageRecord, list[MaskRecord]]:
        """Say of every mask of an image what was done to get it.

        The image is the one whose photo has the same bytes, else the one that is called as this one, by its photo or
        its released picture, and whose released picture has the same bytes: every hand-out has an `sa_1.jpg`.

        Args:
            record: as annotators returned it, of the picture that they were shown.

        Returns:
            The image, with the hash of the photo that it was made of, by which `split` knows it; each mask with its
            `edit_status` ("kept", "edited" or "added") and, if it was shown to the annotators, `edit_iou`,
            `prefill_id`, `box_score` and the model's fingerprint; and the masks that were deleted.

        Raises:
            PairingError: it is none of the images, could be several, has another size, or its masks are of another.
        """
        shown = self._shown(record)
        if (shown.width, shown.height) != (record.width, record.height):
            raise PairingError(
                f"it has {record.width} x {record.height} pixels, and {shown.width} x {shown.height} in {self.out}: "
                "annotate the pictures that were handed out"
            )
        pairs = pair_masks(shown.masks, record.masks)
        self._check_ids(shown, pairs)
        of = {pair.after.id: pair for pair in pairs if pair.after is not None}
        masks = tuple(_told(mask, of[mask.id]) for mask in record.masks)
        deleted = [pair.before for pair in pairs if pair.before and pair.after is None]
        return replace(record, masks=masks, sha256=shown.sha256 or record.sha256), deleted

    def _check_ids(self, shown: ImageRecord, pairs: list[Pair]) -> None:
        """Raise PairingError if none of several masks that carry ids of shown masks is where it was shown."""
        ious = [
            pair.iou
            for pair in pairs
            if pair.before and pair.after and pair.after.original_id == str(pair.before.id)
        ]
        if len(ious) > 1 and max(ious) < LEAST_IOU:
            raise PairingError(
                f"{len(ious)} of its masks have the ids of masks of image {shown.image_id} of {self.out}, and the IoU "
                f"of none of them with that mask is above {max(ious):.2f}: these annotations are of another hand-out; "
                "if all were drawn anew, take the image in without --prefill"
            )

    def _shown(self, record: ImageRecord) -> ImageRecord:
        """The image as annotators were shown it."""
        named = self._of_name.get(stem(record.source_path or ""), set())
        copies = self._of_photo.get(record.sha256, set()) if record.sha256 else set()
        found = (named & copies) or copies or self._same_picture(named, record.sha256)
        if not found and named:
            raise PairingError(
                f"image {' or '.join(map(str, sorted(named)))} of {self.out} is called so, and is another: expected "
                f"the bytes of {self._expected()}; --prefill names the run that was handed out, --images what was "
                "handed out, unchanged"
            )
        if not found:
            raise PairingError(
                f"{self.out} has no such image, by its photo's content or name: --prefill names the run that was "
                "handed out; take in images that were not prefilled by themselves, without --prefill"
            )
        if len(found) > 1:
            raise PairingError(
                f"it could be any of the images {', '.join(map(str, sorted(found)))} of {self.out}, by its name: hand "
                "out pictures whose names are those of no other photos"
            )
        return self._run.record(next(iter(found)))

    def _same_picture(self, named: set[int], sha256: str | None) -> set[int]:
        """Those of some images that were released as a file of these bytes; all, if the run knows nothing of bytes."""
        if self._run.has_pictures:
            return {image for image in named if self._run.picture_sha256(image) == sha256}
        return set() if self._knows_photos else named

    def _expected(self) -> str:
        known = ["its released picture (`export --with-images`)"] * self._run.has_pictures
        return " or ".join([*known, *["its photo"] * self._knows_photos])


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
