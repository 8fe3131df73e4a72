"""Finished shards: how one is committed. How they are read back is in `reader.py`.

A shard is `sa_000000.tar` (SA-1B's files: `sa_<id>.jpg` and `sa_<id>.json` side by side),
`sa_000000.parquet` (the full records, one row per image) and the marker `sa_000000.json`, which is
written last: only with its marker is a shard there. Equal records make equal bytes.
"""

import hashlib
import json
import re
import tarfile
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from sa_engine.partial import Failure, Finished, PartialShard
from sa_engine.plan import Shard, shard_name
from sa_engine.records import ARROW_SCHEMA, SCHEMA_VERSION, image_name
from sa_engine.storage import (
    AnyPath,
    RunError,
    RunPaths,
    atomic_write,
    list_names,
    place,
    sha256_file,
    sweep,
)

__all__ = ["RunError", "ShardStats", "commit_shard", "committed_shards", "read_markers"]

_ROW_GROUP = 64
# A store answers many small requests at once; one after another they would take minutes.
_READERS = 16
_MARKER = re.compile(r"sa_(\d{6,})\.json")
_Sink = Callable[[Finished], None]


@dataclass(frozen=True, kw_only=True)
class ShardStats:
    """What a marker says of its shard; ok + skipped + failed = planned.

    Attributes:
        name: of the shard.
        planned, ok, skipped, failed: numbers of images.
        counts: what was found in the ok images, such as {"masks": 120}.
        seconds: that the session which committed the shard worked on it.
        files: name -> {"sha256": hex, "bytes": size}.
        errors_sha256: hex, of the run's `errors/<shard>.jsonl`; None if every image is ok and whole.
        audit_sha256: hex, of the run's `audit/<shard>.jsonl`; None if nothing is redacted.
    """

    name: str
    planned: int
    ok: int
    skipped: int
    failed: int
    counts: dict[str, int]
    seconds: float
    files: dict[str, dict[str, Any]]
    errors_sha256: str | None = None
    audit_sha256: str | None = None

    @property
    def masks(self) -> int:
        """Number of masks."""
        return self.counts.get("masks", 0)

    def to_json(self) -> str:
        """The marker's content."""
        return json.dumps({"schema_version": SCHEMA_VERSION, **vars(self)}, indent=1) + "\n"

    @staticmethod
    def from_json(text: str | bytes) -> "ShardStats":
        """The inverse of `to_json`. Raises RunError for a marker of another version."""
        content = json.loads(text)
        version = content.pop("schema_version")
        if version != SCHEMA_VERSION:
            raise RunError(
                f"the marker of {content.get('name')} has schema version {version}: this version "
                f"of sa-engine reads {SCHEMA_VERSION}"
            )
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
    ended, counts, errors, audit = _build(store, shard, built)
    if ended.total() != len(shard.images):
        raise RunError(
            f"shard {shard.name} has {ended['ok']} finished and {ended.total() - ended['ok']} failed or "
            f"skipped of {len(shard.images)} planned images: {store.folder} was changed; run again"
        )
    stats = ShardStats(
        name=shard.name,
        planned=len(shard.images),
        ok=ended["ok"],
        skipped=ended["skipped"],
        failed=ended["failed"],
        counts=dict(counts),
        seconds=round(seconds, 3),
        files={
            path.name: {"sha256": sha256_file(path), "bytes": path.stat().st_size} for path in built
        },
        errors_sha256=hashlib.sha256(errors).hexdigest() if errors else None,
        audit_sha256=hashlib.sha256(audit).hexdigest() if audit else None,
    )
    for path in built:
        place(path, paths.shards / path.name)
    _place_beside(paths.errors(shard.name), errors, folder)
    _place_beside(paths.audit(shard.name), audit, folder, private=True)
    atomic_write(paths.marker(shard.name), stats.to_json().encode(), scratch=folder)
    sweep(folder)
    store.remove()
    return stats


def _place_beside(path: AnyPath, content: bytes, folder: Path, private: bool = False) -> None:
    """Put in place what belongs to a shard and is not part of it."""
    if content:
        atomic_write(path, content, scratch=folder, private=private)
    else:  # that of a shard that was reopened to retry its failures
        path.unlink(missing_ok=True)


def _build(
    store: PartialShard, shard: Shard, files: Sequence[Path]
) -> tuple[Counter[str], Counter[str], bytes, bytes]:
    """Write the finished images into `files`.

    Returns how the images ended, what was found in them, what is not in the records, and the audit.
    """
    ended: Counter[str] = Counter()
    counts: Counter[str] = Counter()
    errors: list[bytes] = []
    audit: list[bytes] = []
    with ExitStack() as stack:
        sinks = [stack.enter_context(_SINKS[path.suffix](path)) for path in files]
        for image in shard.images:
            outcome = store.load(image.image_id)
            if isinstance(outcome, Failure):
                ended[outcome.status] += 1
                errors.append(outcome.to_line())
            elif outcome is not None:
                ended["ok"] += 1
                counts.update(outcome.counts)
                errors.append(outcome.parts.get("left_out", b""))
                audit.append(outcome.parts.get("audit", b""))
                for add in sinks:
                    add(outcome)
    return ended, counts, b"".join(errors), b"".join(audit)


def committed_shards(paths: RunPaths) -> set[int]:
    """Indices of the shards whose marker is there: one listing, nothing is read."""
    names = set(list_names(paths.shards))
    indices = (int(match[1]) for match in map(_MARKER.fullmatch, names) if match)
    return {index for index in indices if f"{shard_name(index)}.json" in names}


def read_markers(paths: RunPaths, indices: Iterable[int]) -> dict[int, ShardStats]:
    """The markers of those shards that are committed, by index, in the order of `indices`.

    Raises RunError for one that is damaged, or of another version.
    """
    present = committed_shards(paths)
    chosen = [index for index in indices if index in present]

    def read(index: int) -> ShardStats:
        marker = paths.marker(shard_name(index))
        try:
            return ShardStats.from_json(marker.read_bytes())
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise RunError(
                f"{marker}: damaged ({type(error).__name__}: {error}), expected what says that a shard is complete; "
                "put the file back, or remove it: the run's own command then makes the shard again"
            ) from None

    if isinstance(paths.out, Path):
        return {index: read(index) for index in chosen}
    with ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(chosen, readers.map(read, chosen), strict=True))


@contextmanager
def _tar_sink(path: Path) -> Iterator[_Sink]:
    """Write SA-1B's files into a plain tar whose headers hold nothing of this run."""
    with path.open("wb") as archive:

        def add_file(name: str, data: bytes) -> None:
            header = tarfile.TarInfo(name)  # time, owner and group are 0
            header.size = len(data)
            header.mode = 0o644
            # Not TarFile.addfile, which copies 16 kB at a time.
            archive.write(header.tobuf(tarfile.USTAR_FORMAT))
            archive.write(data)
            archive.write(bytes(-len(data) % tarfile.BLOCKSIZE))

        def add(image: Finished) -> None:
            name = image_name(image.image_id)
            if "jpeg" in image.parts:
                add_file(name, image.parts["jpeg"])
            add_file(f"{Path(name).stem}.json", image.parts["sa1b"])

        yield add
        archive.write(bytes(2 * tarfile.BLOCKSIZE))
        archive.write(bytes(-archive.tell() % tarfile.RECORDSIZE))


@contextmanager
def _parquet_sink(path: Path) -> Iterator[_Sink]:
    """Write full records in row groups of a fixed size, so that memory stays small."""
    # By a file of ours: Arrow takes no path that is not UTF-8.
    with (
        path.open("wb") as file,
        pq.ParquetWriter(file, ARROW_SCHEMA, compression="zstd") as writer,
    ):
        rows: list[pa.Table] = []

        def flush() -> None:
            writer.write_table(pa.concat_tables(rows).combine_chunks())
            rows.clear()

        def add(image: Finished) -> None:
            rows.append(image.row)
            if len(rows) == _ROW_GROUP:
                flush()

        yield add
        if rows:
            flush()


_SINKS: dict[str, Callable[[Path], AbstractContextManager[_Sink]]] = {
    ".tar": _tar_sink,
    ".parquet": _parquet_sink,
}
