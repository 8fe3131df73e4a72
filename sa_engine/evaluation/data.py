"""The truth of an evaluation: images and masks of a run's finished shards."""

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow.compute as pc

from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.finished import DIGEST_COLUMNS, FinishedRun, image_digests
from sa_engine.holdout import chooser
from sa_engine.reader import iter_tables
from sa_engine.records import ImageRecord
from sa_engine.storage import AnyPath


@dataclass(frozen=True)
class DataSet:
    """Images with masks, all of a run's or some; iterating gives (record, (H, W, 3) uint8 RGB).

    Attributes:
        name: for tables.
        out: the run's folder.
        image_ids: of the images, ascending.
        masks: on them.
        fingerprint: sha256 over the photos' hashes and all masks of the images.
    """

    name: str
    out: AnyPath
    image_ids: tuple[int, ...]
    masks: int
    fingerprint: str

    def __iter__(self) -> Iterator[tuple[ImageRecord, np.ndarray]]:
        run = FinishedRun(self.out)
        for image_id in self.image_ids:
            record = run.record(image_id)
            yield record, run.picture(record)


def open_data(
    out: AnyPath, name: str, split: str = "all", limit: int | None = None, seed: int = 0
) -> DataSet:
    """The images of a run that have masks; reads all its records once.

    Args:
        out: folder of a run of shards, as `ingest` and `auto` write them.
        name: for tables.
        split: "holdout", the images of `holdout.json`; "rest", the others; "all".
        limit: so many images, a random sample of them; None: all.
        seed: of the sample.

    Raises:
        RunError: no run there, a damaged one, or no split.
        EvaluationError: no masks there.
    """
    FinishedRun(out)  # raises for what is no run of shards
    inside = chooser(out, split)
    finished = 0
    digests: dict[int, tuple[int, str]] = {}
    for _, table in iter_tables(out, DIGEST_COLUMNS):
        ids = table.column("image_id").to_pylist()
        finished += len(ids)
        counts = pc.list_value_length(table.column("masks")).to_pylist()
        for image_id, count, digest in zip(ids, counts, image_digests(table), strict=True):
            if count and inside(image_id):
                digests[image_id] = count, digest
    if not digests:
        where = "" if split == "all" else f" in its split {split!r}"
        raise EvaluationError(
            f"{out} has no masks to evaluate with{where}: none of its {finished} finished images has any; "
            "`sa-engine status` says how far it is"
        )
    chosen = sorted(digests)
    if limit is not None and limit < len(chosen):
        chosen = sorted(np.random.default_rng(seed).choice(chosen, limit, replace=False).tolist())
    together = hashlib.sha256("".join(digests[one][1] for one in chosen).encode())
    masks = sum(digests[one][0] for one in chosen)
    return DataSet(name, out, tuple(chosen), masks, together.hexdigest())
