"""A run's masks in the formats of other tools: one folder, whole or not at all."""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from sa_engine.export_folder import Building, ExportError, read_marker
from sa_engine.formats import coco, cvat, instance_png, label_studio, labelme, sa1b, yolo_seg
from sa_engine.formats.model import NamedImage, Writer, Writing
from sa_engine.holdout import chooser, read_holdout
from sa_engine.plan import read_plan
from sa_engine.reader import iter_contents
from sa_engine.records import ImageRecord
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunPaths


class Format(NamedTuple):
    """How a format is written.

    Attributes:
        write: see `formats.model.Writing`.
        pictures: folder in which its tools look for pictures; "" is beside the annotations.
        original_names: whether its images are called as the photos were; else as they were released.
    """

    write: Writer
    pictures: str = "images"
    original_names: bool = True


EXPORT_FORMATS = {
    "coco": Format(coco.write),
    "coco-rle": Format(coco.write_rle),
    "cvat": Format(cvat.write),
    "label-studio": Format(label_studio.write),
    "labelme": Format(labelme.write, pictures=""),
    "png": Format(instance_png.write),
    "sa1b": Format(sa1b.write, pictures="", original_names=False),
    "yolo-seg": Format(yolo_seg.write),
}


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written.

    Attributes:
        dest: the folder.
        images, masks: how many.
        notes: what a user should know of it.
        before: an equal export had written it; it was left as it is.
    """

    dest: Path
    images: int
    masks: int
    notes: tuple[str, ...]
    before: bool = False

    def __str__(self) -> str:
        """For a terminal."""
        complete = ": complete, and left as it is" * self.before
        lines = [f"{self.images:,} images with {self.masks:,} masks in {self.dest}{complete}"]
        return "\n".join([*lines, *(f"Note: {note}" for note in self.notes)])


def export(
    out: AnyPath,
    dest: Path,
    format_name: str,
    *,
    names: str | None = None,
    pictures: bool = False,
    split: str = "all",
    ids: Collection[int] = (),
    tolerance: float = 0.0,
    progress: bool = False,
) -> Exported:
    """Write the masks of a run's finished shards for another tool, unless `dest` has just this already.

    Args:
        out: the run's folder.
        dest: folder for the output. An equal export that is there is not touched, as people may work in it.
        format_name: a key of `EXPORT_FORMATS`.
        names: "original" calls images as the photos were, "released" `sa_<id>.jpg`; None: as the format's tools expect.
        pictures: also write the released pictures, which always fit the masks.
        split: of `holdout.SPLITS`.
        ids: images to write; all if there are none.
        tolerance: pixels by which polygons may be simplified.
        progress: show a bar.

    Raises:
        ExportError: the folder holds anything else or cannot be written, pictures or an image that the run does not
            have, or two images of one name.
        RunError: no run there, or no split.
    """
    info = read_run(RunPaths(out))
    if pictures and not (info.config.get("write_images") and "tar" in info.config["formats"]):
        raise ExportError(f"{out} has no pictures in its shards: export without --with-images")
    chosen = EXPORT_FORMATS[format_name]
    original = chosen.original_names if names is None else names == "original"
    by_people = info.stage == "ingest" and not info.config.get("prefill")
    writing = Writing(pictures=chosen.pictures, tolerance=tolerance, by_people=by_people)
    in_split = chooser(out, split)
    wanted = frozenset(ids)
    chosen_ids = lambda image_id: in_split(image_id) and (not wanted or image_id in wanted)  # noqa: E731
    reading = _Reading(out, original, pictures)
    made_of = {
        "run": info.fingerprint,
        "format": format_name,
        "names": "original" if original else "released",
        "with_images": pictures,
        "split": split,
        "ids": sorted(wanted),
        "tolerance": tolerance,
        "content": reading.digest(split),
    }
    try:
        before = read_marker(dest, made_of)
        if before is not None:
            return Exported(dest=dest, **{**before, "notes": tuple(before["notes"])}, before=True)
        with Building(dest) as building:
            images = reading.images(building.folder / chosen.pictures, chosen_ids, progress)
            _write(building.folder, chosen.write(images, writing))
            _check_found(reading, wanted, split)
            short_side = info.config.get("short_side") if not pictures and original else None
            said: dict[str, Any] = {
                "images": len(reading.ids),
                "masks": reading.masks,
                "notes": tuple(_notes(out, reading, writing, short_side, split)),
            }
            building.finish(made_of, said)
    except OSError as error:
        raise ExportError(
            f"cannot read {out} or write {dest}: {error.strerror or error}; nothing was written"
        ) from None
    return Exported(dest=dest, **said)


def _write(folder: Path, pieces: Iterable[tuple[str, bytes]]) -> None:
    """Write files below a folder, each piece at the end of its own."""
    for name, piece in pieces:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.write(piece)


def _check_found(reading: "_Reading", wanted: Collection[int], split: str) -> None:
    """Raise ExportError if an image that was asked for is not there, or none is."""
    missing = sorted(set(wanted) - reading.ids)
    if missing:
        raise ExportError(
            f"{reading.out} has no finished image {missing[0]}: it failed or is not planned"
        )
    if not reading.ids:
        raise ExportError(f"{reading.out} has no finished image to export (--split {split})")


class _Reading:
    """The images of a run, one by one; what was seen of them is told afterwards."""

    def __init__(self, out: AnyPath, original: bool, with_pictures: bool) -> None:
        self.out = out
        self.original = original
        self.with_pictures = with_pictures
        self.ids: set[int] = set()
        self.masks = 0
        self.short_sides: Counter[int] = Counter()
        self._stems: dict[str, str] = {}
        paths = RunPaths(out)
        plan = read_plan(paths.plan)
        markers = read_markers(paths, range(len(plan)))
        self.open_shards = len(plan) - len(markers)
        self._shards = [(plan[index], stats) for index, stats in markers.items()]

    def digest(self, split: str) -> str:
        """Hex; another one if other images or masks may be read: of the shards' hashes, and of a split."""
        read: list[Any] = [stats.files for _, stats in self._shards]
        if split != "all" and (holdout := read_holdout(self.out)) is not None:
            read.append(sorted(holdout.image_ids))
        return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()

    def images(
        self, pictures: Path, wanted: Callable[[int], bool], progress: bool
    ) -> Iterator[NamedImage]:
        """Yield them; pictures are written below `pictures`."""
        for shard, stats in tqdm(self._shards, unit="shard", disable=not progress):
            for record, jpeg in iter_contents(self.out, shard, stats, self.with_pictures):
                if not wanted(record.image_id):
                    continue
                name = self._name(record)
                if jpeg is not None:
                    path = pictures / name
                    path.parent.mkdir(parents=True, exist_ok=True)
                    path.write_bytes(jpeg)
                self.ids.add(record.image_id)
                self.masks += len(record.masks)
                self.short_sides[min(record.width, record.height)] += 1
                yield NamedImage(name=name, record=replace(record, file_name=name))

    def _name(self, record: ImageRecord) -> str:
        name = PurePosixPath(record.source_path or "" if self.original else record.file_name)
        if not name.name or name.is_absolute() or ".." in name.parts:
            raise ExportError(
                f"image {record.image_id} was {str(name)!r}, which is no name below a folder: export with "
                "--names released"
            )
        if self.with_pictures and name.suffix.lower() not in (".jpg", ".jpeg"):
            name = name.with_suffix(".jpg")  # what the picture is now
        stem = str(name.with_suffix(""))
        if stem in self._stems:
            raise ExportError(
                f"{self._stems[stem]} and {name} would have one file of annotations: export with --names released"
            )
        self._stems[stem] = str(name)
        return str(name)


def _notes(
    out: AnyPath, reading: _Reading, writing: Writing, short_side: int | None, split: str
) -> Iterator[str]:
    if reading.open_shards:
        yield f"{reading.open_shards} shards of the run are not finished, and not in this export"
    scaled = reading.short_sides[short_side] if short_side else 0
    if scaled:
        yield (
            f"{scaled} images were released at a short side of {short_side} pixels: if their photos are larger, these "
            "masks do not fit them; --with-images writes pictures that do"
        )
    if split == "all" and (holdout := read_holdout(out)) is not None:
        held_out = len(holdout.image_ids & reading.ids)
        if held_out:
            yield f"{held_out} images are held out for testing: --split rest leaves them out"
    for what, count in writing.lost.items():
        if count:
            yield f"not in this format: {what} ({count:,})"
