"""The truth of an evaluation: images and masks of a run's finished shards."""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.finished import DIGEST_COLUMNS, FinishedRun, image_digests
from sa_engine.holdout import chooser
from sa_engine.reader import Source, iter_tables
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.storage import AnyPath

_COLUMNS = (*DIGEST_COLUMNS, "source_path", "masks.list.element.area")


@dataclass(frozen=True)
class DataSet:
    """Images with masks, all of a run's or some; iterating gives (record, (H, W, 3) uint8 RGB).

    Attributes:
        name: for tables.
        out: the run's folder.
        image_ids: of the images, ascending.
        masks: on them.
        fingerprint: sha256 over the photos' hashes and all masks of the images.
        sources: of the masks that their records come with; nothing: all.
        left_out: images with masks that would belong to it, see `open_data`.
    """

    name: str
    out: AnyPath
    image_ids: tuple[int, ...]
    masks: int
    fingerprint: str
    sources: tuple[str, ...] = ()
    left_out: int = 0

    def __iter__(self) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        run = FinishedRun(self.out)
        for image_id in self.image_ids:
            record = run.record(image_id)
            yield replace(record, masks=of_sources(record, self.sources)), run.picture(record)

    def sample(self, count: int, seed: int = 0) -> tuple[int, ...]:
        """Ids of so many random images, or of all, in random order: a smaller sample is the beginning of a larger."""
        drawn = np.random.default_rng(seed).permutation(self.image_ids)[:count]
        return tuple(drawn.tolist())


def of_sources(record: ImageRecord, sources: Sequence[str]) -> tuple[MaskRecord, ...]:
    """An image's masks of some of `SOURCES`; of nothing: all, and those without a source."""
    return tuple(mask for mask in record.masks if not sources or mask.source in sources)


def open_data(
    out: AnyPath,
    name: str,
    split: str = "all",
    limit: int | None = None,
    seed: int = 0,
    leave_out: Callable[[Source], bool] = lambda image: False,
) -> DataSet:
    """The images of a run that have masks; reads all its records once.

    Args:
        out: folder of a run of shards, as `ingest` and `auto` write them.
        name: for tables.
        split: "holdout", the images of `holdout.json`; "rest", the others; "all".
        limit: so many images, a random sample of them; None: all.
        seed: of the sample.
        leave_out: images that do not belong to it; if that leaves none, the data set is without images.

    Raises:
        RunError: no run there, a damaged one, or no split.
        EvaluationError: no masks there, or a mask without pixels on the images that were chosen.
    """
    FinishedRun(out)  # raises for what is no run of shards
    inside = chooser(out, split)
    finished = left_out = 0
    digests: dict[int, tuple[int, str]] = {}
    empty: dict[int, int] = {}  # an image's mask
    for _, table in iter_tables(out, _COLUMNS):
        columns = (table.column(one).to_pylist() for one in ("image_id", "sha256", "source_path"))
        images = [Source(*row) for row in zip(*columns, strict=True)]
        finished += len(images)
        empty |= _empty_masks(table)
        counts = pc.list_value_length(table.column("masks")).to_pylist()
        for image, count, digest in zip(images, counts, image_digests(table), strict=True):
            if not count or not inside(image.image_id):
                continue
            if leave_out(image):
                left_out += 1
            else:
                digests[image.image_id] = count, digest
    if not digests and not left_out:
        where = "" if split == "all" else f" in its split {split!r}"
        raise EvaluationError(
            f"{out} has no masks to evaluate with{where}: none of its {finished} finished images has any; "
            "`sa-engine status` says how far it is"
        )
    chosen = sorted(digests)
    if limit is not None and limit < len(chosen):
        chosen = sorted(np.random.default_rng(seed).choice(chosen, limit, replace=False).tolist())
    for image_id in chosen:
        if image_id in empty:
            raise EvaluationError(
                f"{out}, image {image_id}: mask {empty[image_id]} has no pixel, so that nothing can be measured on "
                f"it; `sa-engine verify {out}` finds such masks: correct them, and make the run again"
            )
    together = hashlib.sha256("".join(digests[one][1] for one in chosen).encode())
    masks = sum(digests[one][0] for one in chosen)
    return DataSet(name, out, tuple(chosen), masks, together.hexdigest(), left_out=left_out)


def _empty_masks(table: pa.Table) -> dict[int, int]:
    """By image id, the id of a mask without pixels, for rows with at least `_COLUMNS`."""
    lists = table.column("masks").combine_chunks()
    images = np.repeat(
        table.column("image_id").to_pylist(), pc.list_value_length(lists).to_pylist()
    )
    masks = lists.flatten()
    empty = np.from_dlpack(masks.field("area")) == 0
    ids = np.from_dlpack(masks.field("id"))
    return dict(zip(images[empty].tolist(), ids[empty].tolist(), strict=True))
