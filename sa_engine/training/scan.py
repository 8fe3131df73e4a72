"""What there is to train on: all images of some runs, in columns, read once without decoding a mask."""

import hashlib
from collections.abc import Callable, Mapping, Sequence
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
        validation_masks: all masks on them, of the sources that are trained on.
        held_out: images that `holdout.json` keeps from every training.
        without_masks: images that have no mask.
        without_usable_masks: images whose masks are all among the three that follow.
        large_masks: masks that cover too much of their image.
        empty_masks: masks without pixels.
        other_masks: masks of sources that are not trained on.
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
    other_masks: int

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
        masks: (N,) int32, usable: of a source that is trained on, neither empty nor too large.
        all_masks: (N,) int32.
        large, empty: (N,) int32, masks of such a source that are too large, or have no pixel.
        other: (N,) int32, masks of other sources.
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
    empty: np.ndarray
    other: np.ndarray
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

    def data_set(self, name: str, out: AnyPath, sources: Sequence[str] = ()) -> DataSet:
        """These images, of the one run `out`, with all their masks of some sources; nothing: of any."""
        ids, masks = tuple(self.image_id.tolist()), int((self.all_masks - self.other).sum())
        return DataSet(name, out, ids, masks, self.fingerprint, tuple(sources))

    def for_validation(self, usable: np.ndarray, share: float) -> np.ndarray:
        """Which of the `usable` images, (N,) bool, are kept to validate on: (N,) bool, see `TrainingData.open`."""
        measurable = usable & ~np.isin(self.photo, self.photo[usable & (self.empty > 0)])
        if share == 0 or not measurable.any():
            return np.zeros_like(usable)
        photos, least = self.photo[usable], self.photo[measurable].min()
        chosen = self.photo < np.uint64(int(share * 2**64))
        if len(others := photos[photos != least]):
            chosen |= self.photo == least
            chosen &= self.photo != others.max()
        return measurable & chosen

    def summary(self, name: str, out: AnyPath, usable: np.ndarray, aside: np.ndarray) -> RunSummary:
        """Of these images, of the one run `out`: which could be used, and which of those are for validation."""
        trained, validated = self[usable & ~aside], self[aside]
        free = self[~self.held_out]
        return RunSummary(
            name=name,
            out=str(out),
            fingerprint=trained.fingerprint,
            images=len(trained),
            masks=int(trained.masks.sum()),
            validation_images=len(validated),
            validation_masks=int((validated.all_masks - validated.other).sum()),
            held_out=int(self.held_out.sum()),
            without_masks=int((free.all_masks == 0).sum()),
            without_usable_masks=int(((free.all_masks > 0) & (free.masks == 0)).sum()),
            large_masks=int(free.large.sum()),
            empty_masks=int(free.empty.sum()),
            other_masks=int(free.other.sum()),
        )


def scan_runs(
    outs: Sequence[AnyPath],
    max_mask_coverage: float,
    oversample: Mapping[str, float],
    sources: Sequence[str],
    salt: str,
    holdouts: Sequence[AnyPath] = (),
    progress: Callable[[int], object] | None = None,
) -> Scan:
    """Read all finished images of some runs; see `TrainingData.open`.

    Args:
        outs: the runs' folders.
        max_mask_coverage: masks that cover more of their image are too large.
        oversample: see there.
        sources: of the masks that can be used; nothing: all.
        salt: of the photos' hashes.
        holdouts: other runs whose held-out photos are held out of these too.
        progress: called with the number of images read since the last call.

    Raises:
        RunError: no run there, or a damaged one.
        TrainingDataError: none has a finished image, or there is no such source.
    """
    weights, wanted = _weights(oversample), _wanted(sources)
    parts = []
    kept = kept_from_training([*outs, *holdouts])[: len(outs)]
    for run, (out, holds) in enumerate(zip(outs, kept, strict=True)):
        for _, table in iter_tables(out, _COLUMNS):
            parts.append(
                _images(table, holds, salt, run) | _masks(table, max_mask_coverage, weights, wanted)
            )
            if progress is not None:
                progress(len(table))
    if not parts:
        raise TrainingDataError(
            f"{', '.join(map(str, outs))}: there is no finished image to train on yet; "
            "`sa-engine status` says how far a run is"
        )
    return Scan(**{name: np.concatenate([part[name] for part in parts]) for name in parts[0]})


def _weights(oversample: Mapping[str, float]) -> np.ndarray:
    """The weight of each of `SOURCES`, and of no source: (S + 1,) int64. Raises TrainingDataError."""
    for source, weight in oversample.items():
        if source not in SOURCES:
            raise TrainingDataError(
                f"oversample names the source {source!r}: expected one of {', '.join(SOURCES)}"
            )
        if weight < 1 or weight != int(weight):
            raise TrainingDataError(
                f"oversample of {source} is {weight}: expected a whole number from 1 on"
            )
    return np.array([*(oversample.get(source, 1) for source in SOURCES), 1], np.int64)


def _wanted(sources: Sequence[str]) -> np.ndarray:
    """Which of `SOURCES`, and whether masks of no source, are trained on: (S + 1,) bool. Raises TrainingDataError."""
    if unknown := sorted(set(sources) - set(SOURCES)):
        raise TrainingDataError(
            f"sources names {unknown[0]!r}: expected some of {', '.join(SOURCES)}"
        )
    return np.array([not sources or source in sources for source in (*SOURCES, None)])


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
        "photo": np.array([photo_number(one, salt) for one in sources], np.uint64),
        "digest": np.frombuffer(digests, np.uint8).reshape(-1, 32),
    }


def photo_number(image: Source, salt: str) -> int:
    """Of an image's content as `photo_hash` knows it: 64 bits, evenly distributed."""
    return int(photo_hash(image, salt)[:16], 16)


def _masks(
    table: pa.Table, max_mask_coverage: float, weights: np.ndarray, wanted: np.ndarray
) -> dict[str, np.ndarray]:
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
    other = ~wanted[source]
    large = ~other & (area > max_mask_coverage * pixels[image])
    empty = ~other & (area == 0)
    usable = ~(other | large | empty)
    weight = np.ones(len(counts), np.int32)
    np.maximum.at(weight, image[usable], weights[source[usable]])
    kinds = {"masks": usable, "large": large, "empty": empty, "other": other}
    return {
        "weight": weight,
        "all_masks": counts,
        **{
            name: np.bincount(image[of_kind], minlength=len(counts)).astype(np.int32)
            for name, of_kind in kinds.items()
        },
    }
