"""A shard's files as its checks read them: hashed on the way, and no more in memory than must be."""

import hashlib
import io
from typing import IO, Any, NamedTuple

import pyarrow as pa
import pyarrow.parquet as pq

from sa_engine.checks import difference
from sa_engine.records import ARROW_SCHEMA, KNOWN_SCHEMAS, ImageRecord, from_table, sa1b_json

# What is asked of a store at once; a local disk does not mind.
BLOCK = 1 << 22


class HashedFile(io.RawIOBase):
    """A file that is hashed and counted while it is read, once and from its start.

    Attributes:
        sha256: of what has been read.
        bytes: that have been read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self.sha256 = hashlib.sha256()
        self.bytes = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        block = self._file.read(len(buffer))
        buffer[: len(block)] = block
        self.sha256.update(block)
        self.bytes += len(block)
        return len(block)

    def read_rest(self) -> None:
        """Read to the end."""
        while self.read(BLOCK):
            pass


class Known(NamedTuple):
    """What is kept of a Parquet record: enough to compare the tar with."""

    sa1b_sha256: bytes
    size: tuple[int, int]  # width, height
    group: int


class ParquetRecords:
    """A Parquet file in memory, whose records are made a row group at a time.

    Attributes:
        groups: number of row groups.
        known: what is remembered of the records, by image id.
    """

    def __init__(self, data: bytes) -> None:
        self._file = pq.ParquetFile(pa.BufferReader(data))
        self.groups: int = self._file.num_row_groups
        self.known: dict[int, Known] = {}

    def schema_problem(self) -> str | None:
        """Say how the columns differ from `ARROW_SCHEMA`. Raises RecordError for another version."""
        schema = self._file.schema_arrow
        if any(schema.equals(known) for known in KNOWN_SCHEMAS):
            from_table(schema.empty_table())
            return None
        found, expected = ({f.name: str(f.type) for f in s} for s in (schema, ARROW_SCHEMA))
        return difference(found, expected, "its schema")

    def read(self, group: int) -> list[ImageRecord]:
        """The records of a row group."""
        return from_table(self._file.read_row_group(group, use_threads=False))

    def remember(self, record: ImageRecord, group: int) -> None:
        """Keep what `known` holds of a record."""
        digest = hashlib.sha256(sa1b_json(record)).digest()
        self.known[record.image_id] = Known(digest, (record.width, record.height), group)

    def find(self, image_id: int) -> ImageRecord:
        """A record that is known, read again."""
        records = self.read(self.known[image_id].group)
        return next(record for record in records if record.image_id == image_id)
