"""The plan of a run: which image is in which shard, decided once before any work.

It is a Parquet file with one row per image, sorted by shard, and is read a part at a time: a plan
of ten million images must not fill every worker's memory.
"""

import bisect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from sa_engine.listing import COLUMNS
from sa_engine.storage import AnyPath, RunError, atomic_write

_DEFAULT_SHARDS = 32
_LARGEST_DEFAULT_SHARD = 128
_ROW_GROUP = 1 << 16
_SCHEMA = pa.schema([("shard", pa.int32()), ("image_id", pa.int64()), *COLUMNS])


@dataclass(frozen=True, slots=True)
class PlannedImage:
    """One photo as it was when the run was planned.

    Attributes:
        image_id: from 1, in the order of the keys.
        key: path below the images folder, with forward slashes.
        size: bytes of the file; -1 if it could not be looked at.
        mtime_ns: its modification time in nanoseconds; -1 likewise.
    """

    image_id: int
    key: str
    size: int
    mtime_ns: int


def shard_name(index: int) -> str:
    """Stem of a shard's files."""
    return f"sa_{index:06d}"


@dataclass(frozen=True)
class Shard:
    """The unit of work, of commit and of retry."""

    index: int
    images: tuple[PlannedImage, ...]

    @property
    def name(self) -> str:
        """Stem of the shard's files."""
        return shard_name(self.index)


class Plan:
    """A run's shards, as a sequence; a shard's images are read when it is asked for.

    Args:
        source: the content of `plan.parquet`, or the file.

    Raises:
        RunError: it is not a plan.
    """

    def __init__(self, source: bytes | AnyPath) -> None:
        handle = pa.BufferReader(source) if isinstance(source, bytes) else source.open("rb")
        self._name = "" if isinstance(source, bytes) else f" {source}"
        with self._told_if_damaged():
            # As in `reader.open_parquet`: no thread of Arrow's holds bytes of a Python file.
            ahead = not isinstance(source, Path)
            self._file = pq.ParquetFile(handle, page_checksum_verification=True, pre_buffer=ahead)
            if not self._file.schema_arrow.equals(_SCHEMA):
                raise ValueError("its columns are not a plan's")
            shards = _numbers(self._file.read(columns=["shard"], use_threads=False), "shard")
            groups = self._file.metadata
            rows = [groups.row_group(i).num_rows for i in range(groups.num_row_groups)]
            steps = np.diff(shards, prepend=0, append=shards[-1:])
            # The footer, of all parts of a Parquet file, has no checksum.
            planned = int(self._file.schema_arrow.metadata[b"images"])
            if not len(shards) == sum(rows) == planned:
                raise ValueError(f"it has {len(shards)} of {planned} rows")
            if not np.isin(steps, (0, 1)).all():
                raise ValueError("its shards do not follow each other")
        self._ends = np.cumsum(np.bincount(shards))
        self._group_ends: list[int] = np.cumsum(rows).tolist()
        self._cached: tuple[int, pa.Table | None] = (-1, None)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[Shard]:
        return (self[index] for index in range(len(self)))

    def __getitem__(self, index: int) -> Shard:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) if index else 0
        with self._told_if_damaged():
            columns = self._rows(start, int(self._ends[index])).to_pydict()
            names = ("image_id", "key", "size", "mtime_ns")
            images = zip(*(columns[name] for name in names), strict=True)
            return Shard(index, tuple(PlannedImage(*image) for image in images))

    @property
    def images(self) -> int:
        """Number of images."""
        return int(self._ends[-1]) if len(self) else 0

    def count(self, indices: Iterable[int]) -> int:
        """Number of images in some shards."""
        chosen = np.fromiter(indices, np.int64)
        starts = np.concatenate([[0], self._ends[:-1]])
        return int((self._ends[chosen] - starts[chosen]).sum()) if len(chosen) else 0

    def sizes(self, indices: Iterable[int]) -> np.ndarray:
        """Bytes of the files of some shards' images, -1 where not known: (N,) int64."""
        chosen = np.zeros(len(self), bool)
        chosen[np.fromiter(indices, np.int64)] = True
        with self._told_if_damaged():
            columns = self._file.read(columns=["shard", "size"], use_threads=False)
            return _numbers(columns, "size")[chosen[_numbers(columns, "shard")]]

    def keys(self) -> list[str]:
        """Keys of all images."""
        with self._told_if_damaged():
            return self._file.read(columns=["key"], use_threads=False).column("key").to_pylist()

    def select(self, limit: int | None) -> range:
        """The first shards that together hold at least `limit` images; None: all."""
        if limit is None:
            return range(len(self))
        return range(min(len(self), int(np.searchsorted(self._ends, limit)) + 1))

    def shard_of(self, image_id: int) -> int | None:
        """The shard that an image is in. Ids are the positions in the plan, from 1."""
        found = int(np.searchsorted(self._ends, image_id))
        return found if image_id >= 1 and found < len(self) else None

    def table(self) -> pa.Table:
        """All rows: shard, image_id, key, size, mtime_ns."""
        with self._told_if_damaged():
            return self._file.read(use_threads=False)

    @contextmanager
    def _told_if_damaged(self) -> Iterator[None]:
        """Turn what pyarrow raises for a damaged file, which is nearly anything, into a RunError."""
        try:
            yield
        except Exception as error:
            detail = " ".join(f"{type(error).__name__}: {error}".split())
            raise RunError(
                f"cannot read the plan{self._name}: {detail}; put back the file that was written, "
                "or use another --out"
            ) from None

    def _rows(self, start: int, end: int) -> pa.Table:
        """Rows from start to end; consecutive calls read each row group once."""
        first = bisect.bisect_right(self._group_ends, start)
        last = bisect.bisect_left(self._group_ends, end)
        parts = []
        for group in range(first, last + 1):
            if self._cached[0] != group:
                self._cached = (group, self._file.read_row_group(group, use_threads=False))
            table = self._cached[1]
            assert table is not None
            offset = self._group_ends[group] - table.num_rows
            low = max(start - offset, 0)
            parts.append(table.slice(low, min(end - offset, table.num_rows) - low))
        return pa.concat_tables(parts)


def make_plan(found: pa.Table, shard_size: int, before: "Plan | None" = None) -> bytes:
    """Number images in their order, cut them into shards of `shard_size`; a plan file's content.

    Args:
        found: as from `listing.list_images`.
        shard_size: images per shard; the last may have fewer.
        before: a plan to go on from: its rows stay, new ids and shards follow them.
    """
    position = np.arange(found.num_rows)
    first_id, first_shard = (before.images + 1, len(before)) if before else (1, 0)
    columns = [
        pa.array((position // shard_size + first_shard).astype(np.int32)),
        pa.array(position + first_id),
        *(found.column(name) for name, _ in COLUMNS),
    ]
    table = pa.table(columns, schema=_SCHEMA)
    return _serialize(pa.concat_tables([before.table(), table]) if before else table)


def new_images(found: pa.Table, plan: Plan) -> pa.Table:
    """Those of `found` whose keys are not in a plan."""
    known = pc.is_in(found.column("key"), value_set=plan.table().column("key"))
    return found.filter(pc.invert(known))


def refresh(plan: Plan, images: Mapping[int, tuple[int, int]]) -> bytes:
    """A plan with the size and mtime_ns of some images, by id, as they are now."""
    table = plan.table()
    columns = {name: _numbers(table, name).copy() for name in ("size", "mtime_ns")}
    for image_id, (size, mtime_ns) in images.items():
        columns["size"][image_id - 1] = size
        columns["mtime_ns"][image_id - 1] = mtime_ns
    for name, values in columns.items():
        table = table.set_column(table.schema.get_field_index(name), name, pa.array(values))
    return _serialize(table)


def _numbers(table: pa.Table, name: str) -> np.ndarray:
    """A column without nulls. Not `to_numpy`, which imports pandas: a quarter of a second."""
    return np.from_dlpack(table.column(name).combine_chunks())


def _serialize(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    table = table.replace_schema_metadata({"images": str(table.num_rows)})
    pq.write_table(
        table, sink, compression="zstd", row_group_size=_ROW_GROUP, write_page_checksum=True
    )
    return sink.getvalue().to_pybytes()


def write_plan(path: AnyPath, content: bytes, scratch: Path) -> None:
    """Put a plan in its place."""
    atomic_write(path, content, scratch=scratch)


def read_plan(path: AnyPath) -> Plan:
    """Read what `write_plan` wrote. Raises RunError if the file is missing or damaged."""
    try:
        return Plan(path)
    except FileNotFoundError:
        raise RunError(f"no run there: {path} does not exist") from None


def default_shard_size(images: int) -> int:
    """A 32nd of the images, at most 128: a small job still spreads over many workers."""
    return max(1, min(_LARGEST_DEFAULT_SHARD, -(-images // _DEFAULT_SHARDS)))
