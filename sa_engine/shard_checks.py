"""The checks of a committed shard: its marker, its failures, its Parquet file and its tar.

Each is compared with those before it, and all of them with the plan.
"""

import hashlib
import io
import json
import re
import tarfile
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from PIL.JpegImagePlugin import JpegImageFile

from sa_engine.checked_files import BLOCK, HashedFile, ParquetRecords
from sa_engine.checks import Tally, check_record, difference, order_problem
from sa_engine.partial import LEFT_OUT, Failure
from sa_engine.plan import Shard
from sa_engine.reader import read_failures
from sa_engine.records import ImageRecord, from_sa1b, image_name, sa1b_json, to_sa1b
from sa_engine.shards import ShardStats
from sa_engine.storage import RunPaths, sha256_file
from sa_engine.tree_checks import check_audit

_STEPS = ("read", "prepare", "process", "finish")
_MEMBER = re.compile(r"sa_(\d+)\.(jpg|json)")


@dataclass(frozen=True)
class ShardTask:
    """A shard to check, and what all shards of its run have in common.

    Attributes:
        paths: of the run.
        shard: as planned.
        formats: that the run writes, of `config.FORMATS`.
        pictures: whether its tars hold the released images.
    """

    paths: RunPaths
    shard: Shard
    formats: tuple[str, ...]
    pictures: bool


def check_shard(task: ShardTask) -> Tally:
    """Check all files of a committed shard.

    A shard whose marker is gone by now, because a live run retries its failures, is not committed.
    """
    tally = Tally(shards=1)
    name = task.shard.name
    try:
        content = task.paths.marker(name).read_bytes()
    except FileNotFoundError:
        return Tally()
    stats = None
    with tally.reading(f"{name}.json"):
        stats = _check_marker(task, content, tally)
    if stats is None:
        return tally
    left_out = _check_failures(task, stats, tally)
    if stats.audit_sha256 is not None or task.paths.work is not None:
        check_audit(task.paths, task.shard, stats, left_out, tally)
    files = _DataFiles(task, stats, left_out)
    table = None
    if "parquet" in task.formats:
        with tally.reading(f"{name}.parquet"):
            table = files.check_parquet(f"{name}.parquet", tally)
        if table is None:  # the tar is read for its records
            tally.images = tally.masks = 0
    if "tar" in task.formats:
        with tally.reading(f"{name}.tar"):
            files.check_tar(f"{name}.tar", table, tally)
    return tally


def _check_marker(task: ShardTask, content: bytes, tally: Tally) -> ShardStats | None:
    """What a marker says; None if it does not say what the shard's files are."""
    name, planned = task.shard.name, len(task.shard.images)
    file = f"{name}.json"
    stats = ShardStats.from_json(content)
    if stats.to_json().encode() != content:
        tally.add(file, "is not written as this version of sa-engine writes what it says")
    if stats.name != name:
        tally.add(file, f"is the marker of {stats.name}")
    counts = (stats.ok, stats.skipped, stats.failed)
    numbers = (*counts, stats.planned, *stats.counts.values())
    if sum(counts) != stats.planned or not all(type(n) is int and n >= 0 for n in numbers):
        tally.add(file, f"says that {counts} images are ok, skipped, failed of {stats.planned}")
    if stats.planned != planned:
        tally.add(file, f"says that {stats.planned} images were planned, the plan has {planned}")
    expected = {f"{name}.{suffix}": ["bytes", "sha256"] for suffix in task.formats}
    if {key: sorted(entry) for key, entry in stats.files.items()} == expected:
        return stats
    tally.add(file, f"its files are {stats.files}, expected bytes and sha256 of {list(expected)}")
    return None


def _check_failures(task: ShardTask, stats: ShardStats, tally: Tally) -> set[int] | None:
    """Ids of the images that failed or were skipped; None if they are not known for sure."""
    file = f"_run/errors/{task.shard.name}.jsonl"
    keys = {image.image_id: image.key for image in task.shard.images}
    before = len(tally.problems)
    ids: list[int] = []
    with tally.reading(file):
        failures = read_failures(task.paths, task.shard.name)
        said = stats.errors_sha256
        if said is not None and sha256_file(task.paths.errors(task.shard.name)) != said:
            tally.add(file, f"its sha256 is not {said}, which its marker says")
        ids = [failure.image_id for failure in failures if failure.status != LEFT_OUT]
        if ids != sorted(set(ids)):
            tally.add(file, f"lists images {ids}, expected each once, in the plan's order")
        for failure in failures:
            if keys.get(failure.image_id) != failure.key:
                planned = keys.get(failure.image_id, "no such image")
                tally.add(
                    file, f"has image {failure.image_id}, {failure.key}; planned is {planned}"
                )
            if not _is_sound(failure):
                tally.add(file, f"does not say properly what happened: {failure}")
        counts = Counter(failure.status for failure in failures)
        if (counts["failed"], counts["skipped"]) != (stats.failed, stats.skipped):
            found = f"{counts['failed']} failed and {counts['skipped']} skipped images"
            tally.add(file, f"has {found}, its marker says {stats.failed} and {stats.skipped}")
        tally.add(file, _left_out_problem(failures, ids, stats))
    return set(ids) if len(tally.problems) == before else None


def _left_out_problem(failures: list[Failure], ended: list[int], stats: ShardStats) -> str | None:
    """What is wrong with the lines on what was left out of images that have a record; None: nothing."""
    left_out = [failure for failure in failures if failure.status == LEFT_OUT]
    both = sorted({failure.image_id for failure in left_out}.intersection(ended))
    if both:
        return f"says of images {both} that they ended without a record, and that something was left out of them"
    listed = [failure.image_id for failure in failures]
    if listed != sorted(listed):
        return f"lists images {listed}, expected the plan's order"
    found = dict(Counter(failure.counted_as for failure in left_out))
    said = {kind: n for kind, n in stats.counts.items() if kind.endswith(LEFT_OUT)}
    return None if found == said else f"has {found}, its marker says {said}"


def _is_sound(failure: Failure) -> bool:
    return (
        failure.status in ("failed", "skipped", LEFT_OUT)
        and failure.step in _STEPS
        and isinstance(failure.error, str)
        and failure.error != ""
        and isinstance(failure.message, str)
        and type(failure.attempts) is int
        and failure.attempts > 0
    )


class _DataFiles:
    """The checks of a shard's data files.

    Args:
        task: what to check.
        stats: the shard's marker.
        left_out: ids of the images that failed or were skipped; None: not known.
    """

    def __init__(self, task: ShardTask, stats: ShardStats, left_out: set[int] | None) -> None:
        self._task = task
        self._stats = stats
        self._left_out = left_out
        self._keys = {image.image_id: image.key for image in task.shard.images}

    def check_parquet(self, file: str, tally: Tally) -> ParquetRecords | None:
        """Check the Parquet file; return what the tar is compared with, None if it is damaged."""
        data = (self._task.paths.shards / file).read_bytes()
        changed = self._changed(file, len(data), hashlib.sha256(data).hexdigest())
        if changed:  # it explains all that is wrong inside, here and in the tar
            tally.add(file, changed)
            return None
        table = ParquetRecords(data)
        problem = table.schema_problem()
        if problem:
            tally.add(file, problem)
            return None
        found = []
        for group in range(table.groups):
            for record in table.read(group):
                found.append(record.image_id)
                with tally.reading(file, f"image {record.image_id}"):
                    self._check_record(file, record, tally)
                    key = self._keys.get(record.image_id)
                    if key not in (None, record.source_path):
                        path = f"source_path is {record.source_path!r}, the plan's {key!r}"
                        tally.add(file, f"image {record.image_id}: its {path}")
                    table.remember(record, group)
        self._check_found(file, found, tally)
        return table

    def check_tar(self, file: str, table: ParquetRecords | None, tally: Tally) -> None:
        """Check the tar against the Parquet records or, if there are none, by itself."""
        inside = Tally()
        with (self._task.paths.shards / file).open("rb") as handle:
            hashed = HashedFile(handle)
            buffered = io.BufferedReader(hashed, BLOCK)
            with inside.reading(file), tarfile.open(fileobj=buffered, mode="r|") as archive:
                self._check_members(file, archive, table, inside)
            hashed.read_rest()
        changed = self._changed(file, hashed.bytes, hashed.sha256.hexdigest())
        if changed:
            tally.add(file, changed)
        else:
            tally.merge(inside)

    def _check_members(
        self, file: str, archive: tarfile.TarFile, table: ParquetRecords | None, tally: Tally
    ) -> None:
        names: list[str] = []
        found: list[int] = []
        pictures: dict[int, tuple[int, int]] = {}
        for member in archive:
            names.append(member.name)
            match = _MEMBER.fullmatch(member.name)
            if match is None:
                continue
            image_id = int(match[1])
            with tally.reading(file, member.name):
                data = _read(archive, member)
                if match[2] == "jpg":
                    # Reads the header alone; unlike Image.open, it refuses no number of pixels.
                    pictures[image_id] = JpegImageFile(io.BytesIO(data)).size
                    continue
                found.append(image_id)
                size = self._check_json(file, image_id, data, table, tally)
                picture = pictures.get(image_id)
                if size and picture and picture != size:
                    said = f"its record says {size[0]} x {size[1]}"
                    tally.add(
                        file, f"{image_name(image_id)} is {picture[0]} x {picture[1]}, {said}"
                    )
        if table is None:
            self._check_found(file, found, tally)
        ids = self._expected_ids(found if table is None else table.known)
        suffixes = ("jpg", "json") if self._task.pictures else ("json",)
        tally.add(
            file, order_problem(names, [f"sa_{i}.{suffix}" for i in ids for suffix in suffixes])
        )

    def _check_json(
        self, file: str, image_id: int, data: bytes, table: ParquetRecords | None, tally: Tally
    ) -> tuple[int, int] | None:
        """Check an image's JSON; return the width and height that its record says."""
        if table is None:
            record = from_sa1b(json.loads(data))
            self._check_record(file, record, tally)
            if record.image_id != image_id:
                tally.add(file, f"sa_{image_id}.json is of image {record.image_id}")
        elif image_id not in table.known:
            return None  # too much here, or too little there: the names tell
        elif hashlib.sha256(data).digest() == table.known[image_id].sa1b_sha256:
            return table.known[image_id].size
        else:
            record = table.find(image_id)
        if data != sa1b_json(record):
            other = difference(json.loads(data), to_sa1b(record))
            tally.add(file, f"sa_{image_id}.json: {other or 'is not written as sa-engine does'}")
        return record.width, record.height

    def _check_record(self, file: str, record: ImageRecord, tally: Tally) -> None:
        tally.images += 1
        tally.masks += len(record.masks)
        for message in check_record(record):
            tally.add(file, f"image {record.image_id}: {message}")

    def _check_found(self, file: str, ids: list[int], tally: Tally) -> None:
        """Compare the images of a file's records with the plan and the marker."""
        found, expected = ([f"image {i}" for i in some] for some in (ids, self._expected_ids(ids)))
        tally.add(file, order_problem(found, expected))
        counts, said = (tally.images, tally.masks), (self._stats.ok, self._stats.masks)
        if counts != said:
            has = f"has {counts[0]} images with {counts[1]} masks"
            tally.add(file, f"{has}, its marker says {said[0]} with {said[1]}")

    def _expected_ids(self, found: Collection[int]) -> list[int]:
        """Planned images that did not fail; of those found, if it is not known which failed."""
        if self._left_out is None:
            return [image_id for image_id in self._keys if image_id in found]
        return [image_id for image_id in self._keys if image_id not in self._left_out]

    def _changed(self, file: str, size: int, sha256: str) -> str | None:
        """Say how a file differs from what its marker says."""
        said = self._stats.files[file]
        if size != said["bytes"]:
            return f"has {size} bytes, its marker says {said['bytes']}"
        if sha256 != said["sha256"]:
            return f"sha256 is {sha256}, its marker says {said['sha256']}"
        return None


def _read(archive: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    """All bytes of the member at which a stream is. Raises ValueError if it is no file."""
    file = archive.extractfile(member) if member.isreg() else None
    if file is None:
        raise ValueError("it is not a file")
    return file.read()
