"""Assisted-manual stage (paper §4, stage 1): masks that annotators drew, in the tool of their choice, into shards.

What a tool wrote is read by ``sa_engine/formats``; each annotated image finds its photo by name, and its masks become
pixels of the upright photo, as they are: overlaps and holes stay, nothing is clipped. What does not come in, because it
is an exact double, has no pixel, or is a crowd, is counted and listed; so are photos that no annotator has submitted.
"""

import hashlib
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np

from sa_engine import rle, runner
from sa_engine.config import IngestConfig
from sa_engine.formats.files import read_annotations
from sa_engine.formats.matching import match_images
from sa_engine.formats.model import AnnotatedImage, Annotation, FormatError, Parsed, Runs
from sa_engine.formats.raster import rasterize
from sa_engine.images import decode_image, read_orientation, upright_mask
from sa_engine.partial import LEFT_OUT, Failure, Finished, finished_record, one_line
from sa_engine.plan import PlannedImage
from sa_engine.records import MaskRecord, mask_id
from sa_engine.release import released_image
from sa_engine.returns import DELETED, PrefilledRun
from sa_engine.rle import RLE
from sa_engine.run_dir import images_folder, planned_keys
from sa_engine.storage import AnyPath, RunError, location, sha256_file

_READERS = 8
_MEMORY = 1_500_000_000
_SIDEWAYS = (5, 6, 7, 8)


class Decoded(NamedTuple):
    """A photo, and how it is stored."""

    image: np.ndarray  # (H, W, 3) uint8 RGB, upright
    orientation: int  # EXIF's, 1 to 8
    sha256: str  # of the file


class Drawn(NamedTuple):
    """A photo with its masks."""

    photo: Decoded
    masks: list[tuple[Annotation, RLE]]
    left_out: list[Failure]


@dataclass
class IngestStage:
    """The stage as the runner knows it; every worker reads the annotations itself.

    Attributes:
        parsed: as from `matched`; None in a worker.
        hashes: sha256 of the photos that had to be read to be found, by key. They travel to the workers.
    """

    name: str = "ingest"
    parsed: "dict[str, tuple[AnnotatedImage, Parsed]] | None" = field(default=None, repr=False)
    hashes: dict[str, str | None] = field(default_factory=dict, repr=False)

    def __getstate__(self) -> dict[str, object]:
        """Leave the annotations behind: they may be larger than what should travel."""
        return {**vars(self), "parsed": None}

    def identity(self, config: IngestConfig) -> dict[str, str]:
        """Read the annotations and find the photo of each image, so that a mistake is told before any work."""
        self.parsed = matched(config, self.hashes)
        return {}

    @property
    def left_out(self) -> dict[str, int]:
        """What the annotations hold that is no mask, by reason; empty if they were not read."""
        total: Counter[str] = Counter()
        for parsed in {id(one): one for _, one in (self.parsed or {}).values()}.values():
            total.update(parsed.left_out)
        return dict(total)

    def worker_memory(self, config: IngestConfig) -> int:
        """Peak memory of a worker, beside what the annotations take."""
        return _MEMORY

    def make_worker(self, config: IngestConfig) -> "IngestWorker":
        """Read the annotations in this process."""
        found = self.parsed if self.parsed is not None else matched(config, self.hashes)
        return IngestWorker(found, config)


class IngestWorker:
    """One annotated photo at a time, in the runner's three overlapping steps."""

    def __init__(
        self, matched: "dict[str, tuple[AnnotatedImage, Parsed]]", config: IngestConfig
    ) -> None:
        self.matched = matched
        self.config = config
        self.prefilled = None if config.prefill is None else PrefilledRun(location(config.prefill))
        files = {id(parsed): parsed for _, parsed in matched.values()}
        self.crowds_kept = {
            number: keeps_crowds(parsed, config.crowd) for number, parsed in files.items()
        }

    def prepare(self, item: PlannedImage, data: bytes) -> Decoded:
        """Decode a photo, upright."""
        if item.key not in self.matched:
            raise runner.SkipImage("no annotations name it (--allow-unmatched)")
        annotated, _ = self.matched[item.key]
        if not annotated.submitted:
            raise runner.SkipImage(f"no annotator has submitted it ({annotated.source})")
        image = decode_image(data)
        return Decoded(image, read_orientation(data), hashlib.sha256(data).hexdigest())

    def process(self, item: PlannedImage, prepared: Decoded) -> Drawn:
        """Make pixels of all masks; leave out exact doubles, empty ones, and crowds if they are not wanted."""
        annotated, parsed = self.matched[item.key]
        masks: list[tuple[Annotation, RLE]] = []
        left_out: list[Failure] = []
        seen: dict[str, str] = {}
        keep_crowds = self.crowds_kept[id(parsed)]

        def leave_out(kind: str, why: str) -> None:
            left_out.append(_left_out(item, kind, f"{why} ({annotated.source})"))

        for index, annotation in enumerate(annotated.annotations):
            which = f"mask {annotation.original_id or f'number {index}'}"
            if annotation.crowd and not keep_crowds:
                leave_out("crowds", f"{which} is a crowd")
                continue
            try:
                mask = upright(annotation, annotated, prepared)
            except FormatError as error:
                raise FormatError(f"{annotated.source}: {which}: {error}") from None
            if rle.area(mask) == 0:
                leave_out("empty masks", f"{which} has no pixel")
            elif mask["counts"] in seen:
                leave_out("doubles", f"{which} is the same as {seen[mask['counts']]}")
            else:
                seen[mask["counts"]] = which
                masks.append((annotation, mask))
        return Drawn(prepared, masks, left_out)

    def finish(self, item: PlannedImage, result: Drawn) -> Finished:
        """Make the record and the released JPEG."""
        masks = [
            self._record(item, index, annotation, mask)
            for index, (annotation, mask) in enumerate(result.masks)
        ]
        photo = result.photo
        record, jpeg = released_image(item, photo.image, photo.sha256, masks, self.config)
        left_out = list(result.left_out)
        if self.prefilled is not None:
            record, deleted = self.prefilled.sort(record)
            left_out += [
                _left_out(item, DELETED, f"the annotator deleted mask {mask.id}")
                for mask in deleted
            ]
        return finished_record(record, jpeg, left_out=left_out)

    def _record(
        self, item: PlannedImage, index: int, annotation: Annotation, mask: RLE
    ) -> MaskRecord:
        extent = rle.extent(rle.runs(mask), mask["size"][0])
        assert extent is not None, "the mask is not empty"
        xmin, ymin, xmax, ymax = map(float, extent)
        _, parsed = self.matched[item.key]
        return MaskRecord(
            id=mask_id(item.image_id, index),
            segmentation=mask,
            area=rle.area(mask),
            bbox=[xmin, ymin, xmax - xmin, ymax - ymin],
            predicted_iou=annotation.predicted_iou,
            stability_score=annotation.stability_score,
            point_coords=annotation.point_coords,
            crop_box=annotation.crop_box,
            source=self.config.source if self.prefilled is None else "semi-automatic",
            annotator=annotation.annotator or self.config.annotator,
            tool=parsed.tool or self.config.tool,
            time_s=annotation.time_s,
            time_scope=annotation.time_scope,
            round=self.config.round,
            z_order=annotation.z_order,
            original_id=annotation.original_id,
        )


def _left_out(item: PlannedImage, kind: str, message: str) -> Failure:
    return Failure(
        key=item.key,
        image_id=item.image_id,
        status=LEFT_OUT,
        step="process",
        error=kind,
        message=one_line(message),
    )


def keeps_crowds(parsed: Parsed, crowd: str) -> bool:
    """Whether the crowds of a file are masks like others; if it is left open, as its RLEs say.

    CVAT calls every mask a crowd that was drawn with a brush; so where all of them are, they are none.
    """
    if crowd != "auto":
        return crowd == "keep"
    rles = [one for image in parsed.images for one in image.annotations if _is_rle(one)]
    return bool(rles) and all(one.crowd for one in rles)


def _is_rle(annotation: Annotation) -> bool:
    return any(isinstance(shape, Runs) for shape in annotation.shapes)


def upright(annotation: Annotation, annotated: AnnotatedImage, photo: Decoded) -> RLE:
    """A mask in pixels of the upright photo.

    If the annotations have the photo's sides swapped, and the photo is stored turned, they are of the photo as it is
    stored, and are turned with it.

    Raises:
        FormatError: the annotations are of an image of another size; with both.
    """
    height, width = photo.image.shape[:2]
    said = (annotated.height or height, annotated.width or width)
    if said == (height, width):
        return rasterize(annotation.shapes, height, width)
    if said == (width, height) and photo.orientation in _SIDEWAYS:
        stored = rle.decode(rasterize(annotation.shapes, *said))
        return rle.encode(upright_mask(stored, photo.orientation))
    raise FormatError(
        f"the annotations are of an image of {said[1]} x {said[0]} pixels, the photo has {width} x {height} "
        f"(EXIF orientation {photo.orientation}): annotate this photo, or give the one that was annotated"
    )


def matched(
    config: IngestConfig, hashes: dict[str, str | None]
) -> dict[str, tuple[AnnotatedImage, Parsed]]:
    """Every annotated photo's annotations, and the file they are of, by the photo's key.

    Photos whose sha256 is needed and not in `hashes` are read, and put there.

    Raises:
        FormatError: annotations that cannot be read, or that match no photo.
        RunError: a store of photos does not answer.
    """

    def hash_once(keys: Sequence[str]) -> list[str | None]:
        new = [key for key in keys if key not in hashes]
        hashes.update(zip(new, hash_photos(images_folder(config), new), strict=True))
        return [hashes[key] for key in keys]

    name = None if config.format == "auto" else config.format
    parsed = read_annotations(Path(config.annotations), name)
    images = [image for one in parsed for image in one.images]
    of = {id(image): one for one in parsed for image in one.images}
    found = match_images(images, planned_keys(config), config.allow_unmatched, hash_once)
    return {key: (image, of[id(image)]) for key, image in found.items()}


def hash_photos(folder: AnyPath, keys: Sequence[str]) -> list[str | None]:
    """Sha256 (hex) of photos below a folder; None where one cannot be read, which the run will tell.

    Raises RunError if a store does not answer: which photo is meant must not depend on it.
    """

    def sha256(key: str) -> str | None:
        path = folder / key
        try:
            # To open a device may start it, and a pipe would wait for ever.
            return None if isinstance(path, Path) and not path.is_file() else sha256_file(path)
        except OSError as error:
            if isinstance(path, Path) or isinstance(error, FileNotFoundError):
                return None
            detail = " ".join(str(error).split())
            raise RunError(f"photo {path} cannot be read: {detail}; run again") from None

    with ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(sha256, keys))


def run(config: IngestConfig, start: runner.Start = runner.RESUME) -> runner.Report:
    """Take the masks of ``config.annotations`` into shards under ``config.out``.

    Raises:
        SaEngineError: bad annotations, another run's folder, or too many failures: by default, one.
    """
    stage = IngestStage()
    # Workers may run elsewhere. A config of its own: what it knows of the annotations is of this start.
    prefill = None if config.prefill is None else str(location(config.prefill))
    config = replace(config, annotations=str(Path(config.annotations).absolute()), prefill=prefill)
    report = runner.run(stage, config, lambda: stage.identity(config), start)
    return replace(report, ignored={**report.ignored, **stage.left_out})


def describe(config: IngestConfig, start: runner.Start = runner.RESUME) -> runner.PlanSummary:
    """What :func:`run` would do, without doing or writing anything; the annotations are read too."""
    stage, config = IngestStage(), replace(config)
    stage.identity(config)
    summary = runner.describe(stage, config, start)
    return replace(summary, ignored={**summary.ignored, **stage.left_out})
