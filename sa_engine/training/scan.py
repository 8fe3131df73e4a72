"""What there is to train on: all images of some runs, in columns, read once without decoding a mask."""

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from sa_engine.errors import SaEngineError
from sa_engine.evaluation.data import DataSet
from sa_engine.finished import DIGEST_COLUMNS, image_digests
from sa_engine.holdout import kept_from_training, photo_hash
from sa_engine.reader import Source, iter_tables
from sa_engine.records import SOURCES
from sa_engine.storage import AnyPath

_COLUMNS = (
    *DIGEST_COLUMNS,
    "source_path",
    "masks.list.element.area",
    "masks.list.element.source",
)


class TrainingDataError(SaEngineError):
    """Data that no model can be trained on."""


@dataclass(frozen=True)
class RunSummary:
    """What is trained on of a run, and what is left out and why.

    Attributes:
        name: for tables.
        out: the run's folder.
        fingerprint: sha256 over the photos' hashes and all masks of the images trained on.
        images: trained on.
        masks: trained on, of these images.
        validation_images: kept from training to judge it.
        validation_masks: all masks on them.
        held_out: images that `holdout.json` keeps from every training.
        without_masks: images that have no mask.
        without_usable_masks: images whose masks are all among the two that follow.
        large_masks: masks that cover too much of their image.
        empty_masks: masks without pixels.
    """

    name: str
    out: str
    fingerprint: str
    images: int
    masks: int
    validation_images: int
    validation_masks: int
    held_out: int
    without_masks: int
    without_usable_masks: int
    large_masks: int
    empty_masks: int

    def to_dict(self) -> dict[str, Any]:
        """All of it, for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Scan:
    """N images, a row each; a mask of rows as index gives these.

    Attributes:
        run: (N,) uint16, index of its run.
        image_id: (N,) int64.
        weight: (N,) int32, the largest of its usable masks' sources.
        masks: (N,) int32, usable: neither empty nor too large.
        all_masks: (N,) int32.
        large: (N,) int32, masks that are too large.
        held_out: (N,) bool, of the runs' `holdout.json`.
        photo: (N,) uint64, a hash of the photo's content.
        digest: (N, 32) uint8, sha256 of photo and masks.
    """

    run: np.ndarray
    image_id: np.ndarray
    weight: np.ndarray
    masks: np.ndarray
    all_masks: np.ndarray
    large: np.ndarray
    held_out: np.ndarray
    photo: np.ndarray
    digest: np.ndarray

    def __len__(self) -> int:
        return len(self.image_id)

    def __getitem__(self, rows: np.ndarray) -> "Scan":
        return Scan(*(values[rows] for values in vars(self).values()))

    @property
    def fingerprint(self) -> str:
        """Sha256 over the photos' hashes and all masks, of images of one run in the order of their ids."""
        together = hashlib.sha256()
        for digest in self.digest:
            together.update(digest.tobytes().hex().encode())
        return together.hexdigest()

    def data_set(self, name: str, out: AnyPath) -> DataSet:
        """These images, of the one run `out`, with all their masks."""
        ids = tuple(self.image_id.tolist())
        return DataSet(name, out, ids, int(self.all_masks.sum()), self.fingerprint)

    def summary(self, name: str, out: AnyPath, usable: np.ndarray, aside: np.ndarray) -> RunSummary:
        """Of these images, of the one run `out`: which could be used, and which of those are for validation."""
        trained = self[usable & ~aside]
        free = self[~self.held_out]
        return RunSummary(
            name=name,
            out=str(out),
            fingerprint=trained.fingerprint,
            images=len(trained),
            masks=int(trained.masks.sum()),
            validation_images=int(aside.sum()),
            validation_masks=int(self[aside].all_masks.sum()),
            held_out=int(self.held_out.sum()),
            without_masks=int((free.all_masks == 0).sum()),
            without_usable_masks=int(((free.all_masks > 0) & (free.masks == 0)).sum()),
            large_masks=int(free.large.sum()),
            empty_masks=int((free.all_masks - free.masks - free.large).sum()),
        )


def scan_runs(
    outs: Sequence[AnyPath],
    max_mask_coverage: float,
    weights: np.ndarray,
    salt: str,
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Read all finished images of some runs.

    Args:
        outs: the runs' folders.
        max_mask_coverage: masks that cover more of their image are too large.
        weights: (S + 1,) of the masks of each of `SOURCES`, and of those without a source.
        salt: of the photos' hashes.
        progress: called with the number of images read since the last call.

    Raises:
        RunError: no run there, or a damaged one.
        TrainingDataError: none has a finished image.
    """
    parts = []
    for run, (out, holds) in enumerate(zip(outs, kept_from_training(outs), strict=True)):
        for _, table in iter_tables(out, _COLUMNS):
            parts.append(
                _images(table, holds, salt, run) | _masks(table, max_mask_coverage, weights)
            )
            if progress is not None:
                progress(len(table))
    if not parts:
        raise TrainingDataError(
            f"{', '.join(map(str, outs))}: there is no finished image to train on yet; "
            "`sa-engine status` says how far a run is"
        )
    return Scan(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _images(
    table: pa.Table, holds: Callable[[Source], bool], salt: str, run: int
) -> dict[str, np.ndarray]:
    """What is known of images without looking at their masks, in the columns of `Scan`."""
    columns = (table.column(name).to_pylist() for name in ("image_id", "sha256", "source_path"))
    sources = [Source(*row) for row in zip(*columns, strict=True)]
    digests = b"".join(map(bytes.fromhex, image_digests(table)))
    return {
        "run": np.full(len(sources), run, np.uint16),
        "image_id": np.array([source.image_id for source in sources], np.int64),
        "held_out": np.array([holds(source) for source in sources], bool),
        "photo": np.array([int(photo_hash(one, salt)[:16], 16) for one in sources], np.uint64),
        "digest": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }


def _masks(table: pa.Table, max_mask_coverage: float, weights: np.ndarray) -> dict[str, np.ndarray]:
    """What is known of images by their masks, in the columns of `Scan`."""
    pixels = np.array(
        [
            w * h
            for w, h in zip(
                *(table.column(n).to_pylist() for n in ("width", "height")), strict=True
            )
        ]
    )
    lists = table.column("masks").combine_chunks()
    counts = np.array(pc.list_value_length(lists).to_pylist(), np.int32)
    masks = lists.flatten()
    area = np.from_dlpack(masks.field("area"))
    known = pc.index_in(masks.field("source"), value_set=pa.array(SOURCES))
    source = np.from_dlpack(known.fill_null(len(SOURCES)))
    image = np.repeat(np.arange(len(counts)), counts)
    large = area > max_mask_coverage * pixels[image]
    usable = (area > 0) & ~large
    weight = np.ones(len(counts), np.int32)
    np.maximum.at(weight, image[usable], weights[source[usable]])
    return {
        "weight": weight,
        "masks": np.bincount(image[usable], minlength=len(counts)).astype(np.int32),
        "all_masks": counts,
        "large": np.bincount(image[large], minlength=len(counts)).astype(np.int32),
    }
