"""Finished shards, read back: records, pictures, failures; or taken apart to be retried."""

import hashlib
import io
import json
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sa_engine.errors import SaEngineError
from sa_engine.partial import (
    LEFT_OUT,
    Failure,
    PartialShard,
    finished_record,
    finished_redaction,
)
from sa_engine.plan import Shard, read_plan, shard_name
from sa_engine.records import (
    ImageRecord,
    check_version,
    from_sa1b,
    from_table,
    image_name,
    to_table,
)
from sa_engine.shards import ShardStats, read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths, sha256_file

_BUFFER = 1 << 22  # bytes


def read_failures(paths: RunPaths, name: str) -> list[Failure]:
    """The images of a committed shard that failed or were skipped, and what was left out of others."""
    try:
        return _failures(paths.errors(name).read_bytes())
    except FileNotFoundError:
        return []


def _failures(content: bytes) -> list[Failure]:
    return [Failure(**json.loads(line)) for line in content.splitlines()]


def reopen_shard(paths: RunPaths, shard: Shard) -> dict[int, int]:
    """Make a committed shard unfinished again, so that its failed images can be retried.

    Its finished and skipped images go back into its `PartialShard`, with what was left out of them,
    then its marker is removed. A kill in between leaves it committed.

    Returns:
        How often each failed image has been tried, by id.

    Raises:
        RunError: a file of the shard is not what its marker says.
    """
    stats = ShardStats.from_json(paths.marker(shard.name).read_bytes())
    for name, file in stats.files.items():
        if sha256_file(paths.shards / name) != file["sha256"]:
            raise RunError(f"{paths.shards / name} was changed: its sha256 is not its marker's")
    audit = read_audit(paths, shard.name, stats)
    failures = _failures(_read_beside(paths.errors(shard.name), stats.errors_sha256))
    store = PartialShard(paths, shard.name)
    store.remove()
    left_out: dict[int, list[Failure]] = defaultdict(list)
    for failure in failures:
        if failure.status == "skipped":
            store.fail(failure)
        elif failure.status == LEFT_OUT:
            left_out[failure.image_id].append(failure)
    if stats.files:
        for record, jpeg in iter_contents(paths.out, shard, stats):
            number = record.image_id
            store.save(finished_record(record, jpeg, audit.get(number), left_out[number]))
    else:
        for line in audit.values():
            store.save(finished_redaction(line))
    paths.marker(shard.name).unlink()
    return {f.image_id: f.attempts for f in failures if f.status == "failed"}


def read_audit(paths: RunPaths, name: str, stats: ShardStats) -> dict[int, dict[str, Any]]:
    """What was redacted in a committed shard's images, by image id; empty if its run redacts nothing.

    Raises RunError if the file is not what the marker says.
    """
    content = _read_beside(paths.audit(name), stats.audit_sha256)
    lines = (json.loads(line) for line in content.splitlines())
    return {line["image_id"]: line for line in lines}


def _read_beside(path: AnyPath, sha256: str | None) -> bytes:
    """A file that belongs to a shard; nothing if its marker knows none."""
    if sha256 is None:
        return b""
    content = path.read_bytes() if path.exists() else b""
    if hashlib.sha256(content).hexdigest() != sha256:
        raise RunError(f"{path} was changed or is missing: its sha256 is not its marker's")
    return content


def iter_records(out: AnyPath) -> Iterator[ImageRecord]:
    """All records of a run's committed shards, in the order of their ids.

    They come from the Parquet files; where a run has none, from the tars, which know no sha256 and
    no field beyond SA-1B's. Raises RunError if `out` holds no run, or a damaged shard.
    """
    paths = RunPaths(out)
    plan = read_plan(paths.plan)
    for index, stats in read_markers(paths, range(len(plan))).items():
        yield from shard_records(out, plan[index], stats)


def iter_tables(out: AnyPath, columns: Sequence[str]) -> Iterator[tuple[int, pa.Table]]:
    """Some columns of the records of a run's committed shards, many images at a time.

    Args:
        out: the run's folder.
        columns: of `ARROW_SCHEMA`; a field of the masks as "masks.list.element.area".

    Yields:
        The shard's index, and rows in the order of their ids: 64 at most of what sa-engine wrote. Where a run has no
        Parquet, with all columns, and null for what its tars do not know.

    Raises:
        RunError: `out` holds no run, or a damaged shard.
        RecordError: records of another schema version.
    """
    paths = RunPaths(out)
    plan = read_plan(paths.plan)
    for index, stats in read_markers(paths, range(len(plan))).items():
        name = f"{shard_name(index)}.parquet"
        if name not in stats.files:
            yield index, to_table(list(_records_of_tar(out, plan[index])))
            continue
        with _parquet(out, name) as file:
            for group in range(file.num_row_groups):
                table = file.read_row_group(group, columns=list(columns), use_threads=False)
                check_version(table)
                yield index, table


def shard_records(out: AnyPath, shard: Shard, stats: ShardStats) -> Iterator[ImageRecord]:
    """The records of one committed shard, as `iter_records` gives them."""
    name = f"{shard.name}.parquet"
    if name in stats.files:
        with _parquet(out, name) as file:
            for group in range(file.num_row_groups):
                yield from from_table(file.read_row_group(group, use_threads=False))
    else:
        yield from _records_of_tar(out, shard)


@dataclass(frozen=True)
class Source:
    """Where a finished image comes from; the fields are those of its `ImageRecord`."""

    image_id: int
    sha256: str | None
    source_path: str | None


def iter_sources(out: AnyPath) -> Iterator[Source]:
    """Where the images of a run's committed shards come from, without reading their masks.

    Raises RunError if `out` holds no run, or a damaged shard.
    """
    paths = RunPaths(out)
    plan = read_plan(paths.plan)
    for index, stats in read_markers(paths, range(len(plan))).items():
        name = f"{shard_name(index)}.parquet"
        if name not in stats.files:
            for record in _records_of_tar(out, plan[index]):
                yield Source(record.image_id, record.sha256, record.source_path)
            continue
        with _parquet(out, name) as file:
            columns = ["image_id", "sha256", "source_path"]
            for row in file.read(columns=columns, use_threads=False).to_pylist():
                yield Source(**row)


def read_image(out: AnyPath, image_id: int) -> bytes:
    """The JPEG file of a released image. Raises RunError if the run has none with this id."""
    plan = read_plan(RunPaths(out).plan)
    index = plan.shard_of(image_id)
    path = None if index is None else out / f"{shard_name(index)}.tar"
    if path is not None and path.exists():
        with damage_told(out, path.name), open_tar(path) as archive:
            if image_name(image_id) in archive.getnames():
                return read_member(archive, image_name(image_id))
    raise RunError(
        f"{out} has no picture of image {image_id}: it is not planned or not done, it failed "
        "(see _run/errors there), or the run leaves pictures out"
    )


def iter_contents(
    out: AnyPath, shard: Shard, stats: ShardStats, with_pictures: bool = True
) -> Iterator[tuple[ImageRecord, bytes | None]]:
    """A committed shard's records, with their pictures (JPEG files) if it has any and they are wanted."""
    with ExitStack() as stack:
        pictures: set[str] = set()
        if with_pictures and f"{shard.name}.tar" in stats.files:
            stack.enter_context(damage_told(out, f"{shard.name}.tar"))
            archive = stack.enter_context(open_tar(out / f"{shard.name}.tar"))
            pictures = {name for name in archive.getnames() if name.endswith(".jpg")}
        for record in shard_records(out, shard, stats):
            name = image_name(record.image_id)
            yield record, read_member(archive, name) if name in pictures else None


def _records_of_tar(out: AnyPath, shard: Shard) -> Iterator[ImageRecord]:
    keys = {image.image_id: image.key for image in shard.images}
    name = f"{shard.name}.tar"
    with damage_told(out, name), open_tar(out / name) as archive:
        for name in archive.getnames():
            if name.endswith(".json"):
                record = from_sa1b(json.loads(read_member(archive, name)))
                yield replace(record, source_path=keys[record.image_id])


@contextmanager
def _parquet(out: AnyPath, name: str) -> Iterator[pq.ParquetFile]:
    """A shard's Parquet file, to be read from inside. Raises RunError where it is damaged."""
    with damage_told(out, name), open_parquet(out / name) as file:
        yield file


@contextmanager
def open_parquet(path: AnyPath) -> Iterator[pq.ParquetFile]:
    """A Parquet file, to be read with `use_threads=False`.

    A thread of Arrow's that gives back bytes of a Python file while Python ends aborts the process, with exit code 134
    after all is done (apache/arrow#34314). Files of a store are Arrow's own, and read ahead in few requests.
    """
    ahead = not isinstance(path, Path)
    with path.open("rb") as handle, pq.ParquetFile(handle, pre_buffer=ahead) as file:
        yield file


@contextmanager
def damage_told(out: AnyPath, name: str) -> Iterator[None]:
    """Turn what a damaged or missing file of a shard raises into a RunError that names it."""
    try:
        yield
    except SaEngineError:
        raise
    except (OSError, ValueError, LookupError, pa.ArrowException, tarfile.TarError) as error:
        detail = " ".join(str(error).split()) or type(error).__name__
        raise RunError(
            f"cannot read {name} of {out}: {detail}; `sa-engine verify {out}` says what is damaged"
        ) from None


@contextmanager
def open_tar(path: AnyPath) -> Iterator[tarfile.TarFile]:
    """A tar to read, wherever it lies."""
    # From a store, every read is a request: a tar's headers are 512 bytes each.
    with (
        io.BufferedReader(path.open("rb"), _BUFFER) as file,  # type: ignore[type-var]
        tarfile.open(fileobj=file) as archive,
    ):
        yield archive


def read_member(archive: tarfile.TarFile, name: str) -> bytes:
    """All bytes of a file in a tar."""
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()
