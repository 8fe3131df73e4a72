"""The images and masks that a model is trained on, of one or more runs (paper §A, §7.6).

In memory is one row of numpy arrays per image; records and pictures are read when their turn comes. Which images a step
gets follows from the seed and the step's number alone, so that a resumed training and any number of workers agree.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from sa_engine import rle
from sa_engine.evaluation.data import DataSet, of_sources
from sa_engine.evaluation.interactive import BOX
from sa_engine.evaluation.run import short_names
from sa_engine.finished import FinishedRun
from sa_engine.modeling.sam import IMAGE_SIZE
from sa_engine.reader import Source
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.storage import AnyPath
from sa_engine.training.frame import Frame
from sa_engine.training.scan import (
    RunSummary,
    Scan,
    TrainingDataError,
    photo_number,
    scan_runs,
)

# What stands beside the data sets' names in a validation's figures; "mean" is no name of any data set.
_TAKEN = ("iteration", BOX)

__all__ = ["Boxes", "RunSummary", "Sample", "TrainingData", "TrainingDataError"]


@dataclass(frozen=True)
class Sample:
    """One image of a step, in the model-input frame (h, w <= image_size; it lies at the top left of the padded square).

    Attributes:
        run: index of its run.
        image_id: in its run.
        size: (h, w) of the image's pixels in the model-input frame.
        pixels: (h, w, 3) uint8 RGB; None where an embedding is used instead.
        masks: (M, h, w) bool, M >= 1, each with pixels, in the order of the record.
    """

    run: int
    image_id: int
    size: tuple[int, int]
    pixels: np.ndarray | None
    masks: np.ndarray


@dataclass(frozen=True)
class Boxes:
    """One image of a step of a detector, whole, in the model-input frame.

    Attributes:
        size: (h, w) of the image's pixels in the model-input frame.
        pixels: (h, w, 3) uint8 RGB; None where an embedding is used instead.
        boxes: (N, 4) float64 XYXY around its usable masks, in the order of the record.
    """

    size: tuple[int, int]
    pixels: np.ndarray | None
    boxes: np.ndarray


class TrainingData:
    """The images of one or more runs that a model may be trained on, each known by its index.

    For many threads at once, and to be pickled: another process reads the same files.

    Attributes:
        runs: what is used of each run.
        fingerprint: sha256 over the fingerprints of what is trained on of the runs, and of what is validated on.
    """

    def __init__(
        self,
        runs: Sequence[FinishedRun],
        summaries: Sequence[RunSummary],
        scan: Scan,
        validation: Sequence[DataSet],
        photos: np.ndarray,
        max_mask_coverage: float,
        sources: tuple[str, ...],
        seed: int,
    ) -> None:
        self.runs = tuple(summaries)
        fingerprints = [run.fingerprint for run in self.runs]
        fingerprints += [kept.fingerprint for kept in validation]
        self.fingerprint = hashlib.sha256("".join(fingerprints).encode()).hexdigest()
        self._finished, self._validation = tuple(runs), tuple(validation)
        self._run, self._image_id, self._photos = scan.run, scan.image_id, np.unique(photos)
        self._slot_ends = np.cumsum(scan.weight, dtype=np.int64)
        self._max_mask_coverage, self._sources, self._seed = max_mask_coverage, sources, seed

    @classmethod
    def open(
        cls,
        runs: Sequence[AnyPath],
        *,
        max_mask_coverage: float = 0.9,
        oversample: Mapping[str, float] | None = None,
        repeat: Sequence[int] = (),
        validation: float = 0.0,
        sources: Sequence[str] = (),
        holdouts: Sequence[AnyPath] = (),
        seed: int = 0,
        progress: Callable[[int], object] | None = None,
    ) -> "TrainingData":
        """Read what there is, all records once.

        Images that a run's `holdout.json` holds out are neither trained on nor used for validation; nor are copies of
        them in the other runs. An image with a mask without pixels, which nothing can be measured on, is not used for
        validation either, nor are copies of it; it is trained on without that mask.

        Args:
            runs: folders of runs of shards.
            max_mask_coverage: masks that cover more of their image are dropped (paper §A: 90 %).
            oversample: by source of masks, how often an image that has such a mask is seen in an epoch: whole numbers
                from 1 on (paper §7.6: 10 for manual and semi-automatic). The largest counts; sources not named: 1.
            repeat: by which that is multiplied, for each of the runs; nothing: 1.
            validation: share of the images kept from training, chosen by the hashes of their photos: adding images
                moves none of the others, and copies of a photo stay together. If it is above 0 and there are two
                different photos, neither side is empty: where the hashes would leave it so, one photo changes sides.
            sources: of the masks that are trained and validated on, of `SOURCES`; nothing: all, and those without one.
            holdouts: other runs, whose held-out photos are held out of these too.
            seed: of the order, and of the choice for validation.
            progress: called with the number of images read since the last call.

        Raises:
            RunError: no run of shards there, or a damaged one.
            TrainingDataError: nothing to train on, a run named twice, or an option out of its range.
        """
        places = [str(run) for run in runs]
        _check(places, max_mask_coverage, validation)
        if repeat and len(repeat) != len(places):
            raise TrainingDataError(
                f"repeat has {len(repeat)} numbers: expected one for each of {len(places)} --data"
            )
        finished = [FinishedRun(run) for run in runs]
        scan = scan_runs(
            runs, max_mask_coverage, oversample or {}, sources, _salt(seed), holdouts, progress
        )
        usable = ~scan.held_out & (scan.masks > 0)
        aside = scan.for_validation(usable, validation)
        names = [f"{name} (data)" if name in _TAKEN else name for name in short_names(places)]
        summaries, sets = [], []
        for run, (name, out) in enumerate(zip(names, runs, strict=True)):
            own = scan.run == run
            if (own & aside).any():
                sets.append(scan[own & aside].data_set(name, out, sources))
            summaries.append(scan[own].summary(name, out, usable[own], aside[own]))
        trained = scan[usable & ~aside]
        if not len(trained):
            raise TrainingDataError(_nothing_left(summaries))
        if repeat:
            trained.weight[:] *= np.array(repeat, np.int32)[trained.run]
        photos = scan.photo[usable]
        return cls(
            finished, summaries, trained, sets, photos, max_mask_coverage, tuple(sources), seed
        )

    def __len__(self) -> int:
        return len(self._image_id)

    @property
    def slots(self) -> int:
        """Images seen in an epoch: each as often as it is oversampled."""
        return int(self._slot_ends[-1])

    def batch(
        self, iteration: int, size: int, rank: int = 0, world: int = 1
    ) -> list[tuple[int, int]]:
        """A worker's share of the global batch of an iteration.

        An epoch is a random order of the slots, of which an image has as many as it is oversampled; iteration i takes
        the slots from i * size to (i + 1) * size, on through the epochs.

        Returns:
            (position in the global batch, index of the image), for the positions rank, rank + world, and so on.
        """
        share = []
        for position in range(rank, size, world):
            epoch, slot = divmod(iteration * size + position, self.slots)
            found = _permutation(self._seed, epoch, self.slots)[slot]
            share.append((position, int(np.searchsorted(self._slot_ends, found, side="right"))))
        return share

    def load(
        self,
        index: int,
        rng: np.random.Generator,
        *,
        image_size: int = IMAGE_SIZE,
        max_masks: int = 64,
        jitter: tuple[float, float] | None = None,
        pixels: bool = True,
    ) -> Sample | None:
        """Read an image and its masks.

        Args:
            index: below `len`.
            rng: of the jitter and of the sample of masks; the same state gives the same `Sample`.
            image_size: side of the model input.
            max_masks: masks at most, a random sample of them.
            jitter: range of scales of `Frame.jittered`; None: the whole image. Masks that are lost, or cover more of
                what is seen than `max_mask_coverage`, are dropped.
            pixels: whether to read the picture; it needs no `jitter` otherwise.

        Returns:
            None if no mask is left.

        Raises:
            RunError: the image cannot be read; it names the run, the shard and the image.
        """
        if jitter is not None and not pixels:
            raise ValueError("an embedding is of the whole image: it cannot be jittered")
        run, record = self._record(index)
        if jitter is None:
            frame = Frame.fit(record.height, record.width, image_size)
        else:
            frame = Frame.jittered(record.height, record.width, image_size, jitter, rng)
        masks = self._masks(record, frame, max_masks, rng)
        if not masks:
            return None
        image = frame.pixels(self._finished[run].picture(record)) if pixels else None
        return Sample(run, record.image_id, frame.size, image, np.stack(masks))

    def boxes(self, index: int, image_size: int = IMAGE_SIZE, pixels: bool = True) -> Boxes:
        """Read an image and the boxes around its masks.

        Args:
            index: below `len`.
            image_size: longest side of the image in the model input.
            pixels: whether to read the picture.

        Raises:
            RunError: the image cannot be read; it names the run, the shard and the image.
        """
        run, record = self._record(index)
        frame = Frame.fit(record.height, record.width, image_size)
        (height, width), segmentations = (
            frame.size,
            [mask.segmentation for mask in self._usable(record)],
        )
        scale = np.array([width / record.width, height / record.height] * 2)
        image = frame.pixels(self._finished[run].picture(record)) if pixels else None
        return Boxes(frame.size, image, rle.boxes(segmentations) * scale)

    def content_key(self, index: int) -> str:
        """Sha256 (hex) of the image's content, see `FinishedRun.content_key`: equal keys, equal pixels."""
        run, record = self._record(index)
        return self._finished[run].content_key(record)

    def validation_sets(self) -> list[DataSet]:
        """What is kept aside of each run, as `evaluate_model` wants it; runs of which nothing is are not there."""
        return list(self._validation)

    def has_photo(self, image: Source) -> bool:
        """Whether an image of any run is trained on or kept to validate on, by its content as `photo_hash` knows it."""
        number = np.uint64(photo_number(image, _salt(self._seed)))
        place = int(np.searchsorted(self._photos, number))
        return place < len(self._photos) and self._photos[place] == number

    def _record(self, index: int) -> tuple[int, ImageRecord]:
        run = int(self._run[index])
        return run, self._finished[run].record(int(self._image_id[index]))

    def _usable(self, record: ImageRecord) -> list[MaskRecord]:
        """An image's masks of a source that is trained on which are neither empty nor too large."""
        most = self._max_mask_coverage * (record.height * record.width)
        wanted = of_sources(record, self._sources)
        return [mask for mask in wanted if 0 < mask.area <= most]

    def _masks(
        self, record: ImageRecord, frame: Frame, count: int, rng: np.random.Generator
    ) -> list[np.ndarray]:
        """A random sample of an image's masks as the frame shows them, in the order of the record."""
        usable = self._usable(record)
        most_seen = self._max_mask_coverage * (frame.size[0] * frame.size[1])
        found: dict[int, np.ndarray] = {}
        for number in rng.permutation(len(usable)).tolist():
            mask = frame.mask(usable[number].segmentation)
            if mask is not None and (frame.whole or mask.sum() <= most_seen):
                found[number] = mask
            if len(found) == count:
                break
        return [found[number] for number in sorted(found)]


@lru_cache(2)  # a batch may reach into the next epoch
def _permutation(seed: int, epoch: int, slots: int) -> np.ndarray:
    return np.random.default_rng((seed, epoch)).permutation(slots)


def _check(places: Sequence[str], max_mask_coverage: float, validation: float) -> None:
    """Raise TrainingDataError for what `TrainingData.open` does not take."""
    if not 0 <= validation < 1:
        raise TrainingDataError(f"validation is {validation}: expected a share from 0 to below 1")
    if not 0 < max_mask_coverage <= 1:
        raise TrainingDataError(
            f"max_mask_coverage is {max_mask_coverage}: expected a share above 0, up to 1"
        )
    if len(set(places)) < len(places):
        raise TrainingDataError(f"--data names a folder twice: {', '.join(places)}")


def _salt(seed: int) -> str:
    """Of the hashes by which photos are kept for validation."""
    return f"validation:{seed}"


def _nothing_left(summaries: Sequence[RunSummary]) -> str:
    told = [
        f"{one.out}: {one.held_out} held out, {one.validation_images} for validation, "
        f"{one.without_masks} without masks, {one.without_usable_masks} with none that can be used"
        + f" ({one.other_masks} masks are of other sources)"
        * (one.other_masks > 0)
        for one in summaries
    ]
    return f"there is no image to train on; {'; '.join(told)}; `sa-engine status` says how far a run is"
