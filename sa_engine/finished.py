"""A run's finished images: any of them by its id, without reading the others; and what identifies them all."""

import hashlib
import json
import re
import tarfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sa_engine.errors import SaEngineError
from sa_engine.images import decode_image
from sa_engine.pictures import released_photo
from sa_engine.plan import read_plan, shard_name
from sa_engine.reader import open_parquet, open_tar
from sa_engine.records import ImageRecord, from_sa1b, from_table
from sa_engine.run_dir import read_run
from sa_engine.storage import AnyPath, RunError, RunPaths

DIGEST_COLUMNS = (
    "image_id",
    "width",
    "height",
    "sha256",
    "masks.list.element.id",
    "masks.list.element.segmentation.counts",
)
_MEMBER = re.compile(r"sa_(\d+)(\.jpg|\.json)")
# Row groups: 64 images with all their masks each.
_GROUPS_KEPT = 8


class FinishedRun:
    """The finished images of a run of shards, by id; for many threads at once, and to be pickled.

    Of every shard that was asked for it remembers where its images lie, 40 bytes each.

    Args:
        out: the run's folder.

    Raises:
        RunError: no run there, or not one of shards.
    """

    def __init__(self, out: AnyPath) -> None:
        paths = RunPaths(out)
        self.out = out
        self.config: dict[str, Any] = read_run(paths).config
        if "formats" not in self.config:
            raise RunError(f"{out} has no masks: it is no run of shards")
        self.has_pictures = bool(self.config["write_images"] and "tar" in self.config["formats"])
        self._plan = read_plan(paths.plan)
        self._rows: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._members: dict[int, dict[str, np.ndarray]] = {}
        self._plan_lock = threading.Lock()
        self._group = lru_cache(_GROUPS_KEPT)(self._read_group)

    def __reduce__(self) -> tuple[Any, ...]:
        return FinishedRun, (self.out,)

    def record(self, image_id: int) -> ImageRecord:
        """The record of an image, with its masks.

        Where a run has no Parquet it comes from the tar, which knows no sha256 and no field beyond SA-1B's.

        Raises:
            RunError: the run has no such finished image, or its shard cannot be read.
        """
        with self._told(image_id) as shard:
            if "parquet" in self.config["formats"]:
                return from_table(self._row(shard, image_id))[0]
            content = json.loads(self._read_member(shard, image_id, ".json"))
            with self._plan_lock:
                images = self._plan[shard].images
            (key,) = (image.key for image in images if image.image_id == image_id)
            return replace(from_sa1b(content), source_path=key)

    def picture(self, record: ImageRecord) -> np.ndarray:
        """The released image of a record, (H, W, 3) uint8 RGB; made again from its photo if the run has no pictures.

        Raises:
            RunError: it cannot be read, or has another size than the record says.
        """
        with self._told(record.image_id) as shard:
            if self.has_pictures:
                image = decode_image(self._read_member(shard, record.image_id, ".jpg"))
            else:
                image = released_photo(self.config, record)
            if image.shape[:2] != (record.height, record.width):
                raise ValueError(
                    f"it is {image.shape[1]}x{image.shape[0]} pixels, and its masks are of "
                    f"{record.width}x{record.height}"
                )
            return image

    def content_key(self, record: ImageRecord) -> str:
        """Sha256 (hex) of what the released image is made from: equal keys, equal pixels, in every run.

        It is over the JPEG file, or if the run has no pictures over the photo's hash and the released size.
        Raises RunError as `picture`.
        """
        if picture := self.picture_sha256(record.image_id):
            return picture
        # What came back from annotators has the hash of the photo that they were shown a picture of.
        known = None if self.config.get("prefill") else record.sha256
        photo = known or f"{self.config['images']} {record.source_path}"
        return hashlib.sha256(f"{photo} {record.width} {record.height}".encode()).hexdigest()

    def picture_sha256(self, image_id: int) -> str | None:
        """Sha256 (hex) of a released image's JPEG file; None if the run has none. Raises RunError as `picture`."""
        if not self.has_pictures:
            return None
        with self._told(image_id) as shard:
            return hashlib.sha256(self._read_member(shard, image_id, ".jpg")).hexdigest()

    @contextmanager
    def _told(self, image_id: int) -> Iterator[int]:
        """The shard of an image; turn what a damaged one raises into a RunError that names it."""
        shard = self._plan.shard_of(image_id)
        if shard is None:
            raise RunError(f"{self.out} has no image {image_id}: it is not planned there")
        try:
            yield shard
        except RunError:
            raise
        except (SaEngineError, OSError, ValueError, pa.ArrowException, tarfile.TarError) as error:
            detail = " ".join(str(error).split()) or type(error).__name__
            raise RunError(
                f"cannot read image {image_id} in shard {shard_name(shard)} of {self.out}: {detail}; "
                f"`sa-engine verify {self.out}` says what is damaged"
            ) from None

    def _row(self, shard: int, image_id: int) -> pa.Table:
        """The one row of an image in its shard's Parquet file."""
        if shard not in self._rows:
            with self._parquet(shard) as file:
                groups = (file.metadata.row_group(i) for i in range(file.num_row_groups))
                ends = np.cumsum([group.num_rows for group in groups], dtype=np.int64)
                ids = (
                    file.read(columns=["image_id"], use_threads=False)
                    .column("image_id")
                    .to_pylist()
                )
            self._rows[shard] = np.array(ids, np.int64), ends
        ids, ends = self._rows[shard]
        place = int(np.searchsorted(ids, image_id))
        if place == len(ids) or ids[place] != image_id:
            raise ValueError("it is not finished, or it failed (see _run/errors there)")
        group = int(np.searchsorted(ends, place, side="right"))
        start = int(ends[group - 1]) if group else 0
        return self._group(shard, group).slice(place - start, 1)

    def _read_group(self, shard: int, group: int) -> pa.Table:
        with self._parquet(shard) as file:
            return file.read_row_group(group, use_threads=False)

    @contextmanager
    def _parquet(self, shard: int) -> Iterator[pq.ParquetFile]:
        path = self.out / f"{shard_name(shard)}.parquet"
        with open_parquet(path) as file:
            yield file

    def _read_member(self, shard: int, image_id: int, suffix: str) -> bytes:
        """A file in a shard's tar: `.jpg` or `.json` of an image."""
        path = self.out / f"{shard_name(shard)}.tar"
        if shard not in self._members:
            self._members[shard] = _find_members(path)
        where = self._members[shard][suffix]
        place = int(np.searchsorted(where[:, 0], image_id))
        if place == len(where) or where[place, 0] != image_id:
            raise ValueError(f"{path} has no sa_{image_id}{suffix}")
        _, offset, size = where[place].tolist()
        with path.open("rb") as file:
            file.seek(offset)
            content = file.read(size)
        if len(content) != size:
            raise OSError(f"{path} ends within the image")
        return content


def _find_members(path: AnyPath) -> dict[str, np.ndarray]:
    """Where the files of a shard's tar lie, by suffix: (N, 3) int64 of image id, offset and bytes, by id."""
    found: dict[str, list[tuple[int, int, int]]] = {".jpg": [], ".json": []}
    with open_tar(path) as archive:
        for member in archive:
            if match := _MEMBER.fullmatch(member.name):
                found[match[2]].append((int(match[1]), member.offset_data, member.size))
    return {
        suffix: np.array(sorted(rows), np.int64).reshape(-1, 3) for suffix, rows in found.items()
    }


def image_digests(table: pa.Table) -> list[str]:
    """Sha256 (hex) of each image's photo, size and masks, for rows with at least `DIGEST_COLUMNS`."""
    masks = table.column("masks").combine_chunks()
    flat = masks.flatten()
    counts = flat.field("segmentation").field("counts")
    lines = pc.binary_join_element_wise(flat.field("id").cast(pa.string()), counts, " ")
    ends = np.cumsum([0, *pc.list_value_length(masks).to_pylist()], dtype=np.int32)
    texts = pc.binary_join(pa.ListArray.from_arrays(pa.array(ends), lines), "\n").to_pylist()
    columns = (table.column(name).to_pylist() for name in DIGEST_COLUMNS[:4])
    digests = []
    for image_id, width, height, sha256, text in zip(*columns, texts, strict=True):
        parts = [f"{image_id} {width} {height} {sha256}", *([text] if text else [])]
        digests.append(hashlib.sha256("\n".join(parts).encode()).hexdigest())
    return digests
