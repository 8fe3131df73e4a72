"""Finished shards: how one is committed, and how they are read back.

A shard is `sa_000000.tar` (SA-1B's files: `sa_<id>.jpg` and `sa_<id>.json` side by side),
`sa_000000.parquet` (the full records, one row per image) and the marker `sa_000000.json`, which is
written last: only with its marker is a shard there. Equal records make equal bytes.
"""

import io
import json
import tarfile
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from sa_engine.partial import Failure, Finished, PartialShard
from sa_engine.plan import Shard, read_plan
from sa_engine.records import (
    ARROW_SCHEMA,
    SCHEMA_VERSION,
    ImageRecord,
    from_sa1b,
    from_table,
    image_name,
    to_sa1b,
    to_table,
)
from sa_engine.storage import RunError, RunPaths, atomic_write, place, sha256_file, sweep

__all__ = [
    "RunError",
    "ShardStats",
    "commit_shard",
    "iter_records",
    "read_image",
    "read_markers",
]

_ROW_GROUP = 64
_Sink = Callable[[Finished], None]


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What a marker says of its shard; ok + skipped + failed = planned.

    Attributes:
        name: of the shard.
        planned, ok, skipped, failed: numbers of images.
        masks: of the ok images.
        seconds: that the session which committed the shard worked on it.
        files: name -> {"sha256": hex, "bytes": size}.
    """

    name: str
    planned: int
    ok: int
    skipped: int
    failed: int
    masks: int
    seconds: float
    files: dict[str, dict[str, Any]]

    def to_json(self) -> str:
        """The marker's content."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **vars(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "ShardStats":
        """The inverse of `to_json`."""
        content = json.loads(text)
        del content["schema_version"]
        return ShardStats(**content)


def commit_shard(
    paths: RunPaths, shard: Shard, formats: Sequence[str], seconds: float
) -> ShardStats:
    """Build a shard's files from its finished images and put them in place, the marker last.

    Every image of the shard must have ended in the shard's `PartialShard`, which is removed.
    Raises RunError if one has not; then nothing of the shard is there.
    """
    store = PartialShard(paths, shard.name)
    # A name of its own: a worker that outlives its driver must not meet its successor here.
    folder = paths.scratch / f"{shard.name}.{uuid.uuid4().hex}"
    folder.mkdir(parents=True)
    built = [folder / f"{shard.name}.{suffix}" for suffix in formats]
    ok, masks, failures = _build(store, shard, built)
    skipped = sum(failure.status == "skipped" for failure in failures)
    if ok + len(failures) != len(shard.images):
        raise RunError(
            f"shard {shard.name} has {ok} finished and {len(failures)} failed or skipped of "
            f"{len(shard.images)} planned images: {store.folder} was changed; run again"
        )
    stats = ShardStats(
        name=shard.name,
        planned=len(shard.images),
        ok=ok,
        skipped=skipped,
        failed=len(failures) - skipped,
        masks=masks,
        seconds=round(seconds, 3),
        files={
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in built
        },
    )
    for path in built:
        place(path, paths.out / path.name)
    if failures:
        lines = "".join(json.dumps(vars(failure)) + "\n" for failure in failures)
        atomic_write(paths.errors(shard.name), lines.encode(), scratch=folder)
    atomic_write(paths.marker(shard.name), stats.to_json().encode(), scratch=folder)
    sweep(folder)
    store.remove()
    return stats


def _build(
    store: PartialShard, shard: Shard, files: Sequence[Path]
) -> tuple[int, int, list[Failure]]:
    """Write the finished images into `files`; return their number, their masks, and the others."""
    ok = masks = 0
    failures: list[Failure] = []
    with ExitStack() as stack:
        sinks = [stack.enter_context(_SINKS[path.suffix](path)) for path in files]
        for image in shard.images:
            outcome = store.load(image.image_id)
            if isinstance(outcome, Failure):
                failures.append(outcome)
            elif outcome is not None:
                ok += 1
                masks += len(outcome.record.masks)
                for add in sinks:
                    add(outcome)
    return ok, masks, failures


def read_markers(paths: RunPaths, shards: Sequence[Shard]) -> dict[str, ShardStats]:
    """The markers of those of `shards` that are committed, by name, in their order."""
    present = {path.name for path in paths.out.glob("sa_*.json")}
    return {
        shard.name: ShardStats.from_json(paths.marker(shard.name).read_bytes())
        for shard in shards
        if f"{shard.name}.json" in present
    }


def iter_records(out: Path) -> Iterator[ImageRecord]:
    """All records of a run's committed shards, in the order of their ids.

    They come from the Parquet files; where a run has none, from the tars, which know no sha256 and
    no field beyond SA-1B's. Raises RunError if `out` holds no run.
    """
    paths = RunPaths(out)
    shards = read_plan(paths.plan)
    markers = read_markers(paths, shards)
    for shard in shards:
        if shard.name not in markers:
            continue
        if f"{shard.name}.parquet" in markers[shard.name].files:
            with pq.ParquetFile(out / f"{shard.name}.parquet") as file:
                for group in range(file.num_row_groups):
                    yield from from_table(file.read_row_group(group))
        else:
            yield from _records_of_tar(out / f"{shard.name}.tar", shard)


def read_image(out: Path, image_id: int) -> bytes:
    """The JPEG file of a released image. Raises RunError if the run has none with this id."""
    for shard in read_plan(RunPaths(out).plan):
        if shard.images[0].image_id <= image_id <= shard.images[-1].image_id:
            path = out / f"{shard.name}.tar"
            if path.exists():
                with tarfile.open(path) as archive:
                    if image_name(image_id) in archive.getnames():
                        return _member(archive, image_name(image_id))
    raise RunError(
        f"{out} has no picture of image {image_id}: it is not planned or not done, it failed "
        "(see _run/errors there), or the run leaves pictures out"
    )


def _records_of_tar(path: Path, shard: Shard) -> Iterator[ImageRecord]:
    keys = {image.image_id: image.key for image in shard.images}
    with tarfile.open(path) as archive:
        for name in archive.getnames():
            if name.endswith(".json"):
                record = from_sa1b(json.loads(_member(archive, name)))
                yield ImageRecord(**{**vars(record), "source_path": keys[record.image_id]})


def _member(archive: tarfile.TarFile, name: str) -> bytes:
    file = archive.extractfile(name)
    assert file is not None, f"{name} is not a file"
    return file.read()


@contextmanager
def _tar_sink(path: Path) -> Iterator[_Sink]:
    """Write SA-1B's files into a plain tar whose headers hold nothing of this run."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as archive:

        def add_file(name: str, data: bytes) -> None:
            header = tarfile.TarInfo(name)  # time, owner and group are 0
            header.size = len(data)
            header.mode = 0o644
            archive.addfile(header, io.BytesIO(data))

        def add(image: Finished) -> None:
            name = image_name(image.record.image_id)
            if image.jpeg is not None:
                add_file(name, image.jpeg)
            masks = json.dumps(to_sa1b(image.record), allow_nan=False)
            add_file(f"{Path(name).stem}.json", masks.encode())

        yield add


@contextmanager
def _parquet_sink(path: Path) -> Iterator[_Sink]:
    """Write full records in row groups of a fixed size, so that memory stays small."""
    with pq.ParquetWriter(path, ARROW_SCHEMA, compression="zstd") as writer:
        records: list[ImageRecord] = []

        def add(image: Finished) -> None:
            records.append(image.record)
            if len(records) == _ROW_GROUP:
                writer.write_table(to_table(records))
                records.clear()

        yield add
        if records:
            writer.write_table(to_table(records))


_SINKS: dict[str, Callable[[Path], AbstractContextManager[_Sink]]] = {
    ".tar": _tar_sink,
    ".parquet": _parquet_sink,
}
