"""The finished images of unfinished shards: what a killed run leaves for its successor.

A finished image is one file: a line of JSON that says how long the parts are, then its row of
Parquet, its SA-1B JSON and its picture, ready to be put together to a shard. It is checked when it
is read, so writing it need not wait for the disk.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

import pyarrow as pa

from sa_engine.records import ImageRecord, sa1b_json, to_table
from sa_engine.storage import RunPaths, atomic_write, list_names, sweep

_FINISHED, _FAILED = ".done", ".failed"
_BREADCRUMBS = "inflight.json"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """An image that ended without a record, and why: a line of `_run/errors/<shard>.jsonl`.

    Attributes:
        key: of the image in the plan.
        image_id: of the image in the plan.
        status: "failed", or "skipped" if a stage left it out on purpose.
        step: "read", "prepare", "process" or "finish".
        error: class of the exception, or "WorkerDied".
        message: what it said, in one line.
        attempts: how often the image was tried.
    """

    key: str
    image_id: int
    status: str
    step: str
    error: str
    message: str
    attempts: int = 1


@dataclass(frozen=True)
class Finished:
    """A finished image in the parts of which shards are made.

    Attributes:
        row: its record, one row of `records.ARROW_SCHEMA`.
        sa1b: its record as SA-1B's JSON.
        jpeg: its picture, if pictures are released.
    """

    row: pa.Table
    sa1b: bytes
    jpeg: bytes | None

    @property
    def image_id(self) -> int:
        """From its row."""
        return self.row.column("image_id")[0].as_py()

    @property
    def masks(self) -> int:
        """Number of its masks."""
        return len(self.row.column("masks").chunk(0).values)


def pack(record: ImageRecord, jpeg: bytes | None) -> bytes:
    """The content of a finished image's file.

    Raises RecordError or ValueError for a record that cannot be written.
    """
    row = to_table([record])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_table(row)
    parts = [sink.getvalue().to_pybytes(), sa1b_json(record), jpeg]
    body = b"".join(part or b"" for part in parts)
    head = {
        "sizes": [None if part is None else len(part) for part in parts],
        "crc32": zlib.crc32(body),
    }
    return json.dumps(head).encode() + b"\n" + body


def unpack(content: bytes) -> Finished:
    """The inverse of `pack`. Raises ValueError if the content is damaged."""
    head, _, body = content.partition(b"\n")
    try:
        described = json.loads(head)
        sizes, crc32 = described["sizes"], described["crc32"]
    except (KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    if zlib.crc32(body) != crc32:
        raise ValueError("the CRC is another")
    row_end, sa1b_end = sizes[0], sizes[0] + sizes[1]
    with pa.ipc.open_stream(body[:row_end]) as reader:
        row = reader.read_all()
    return Finished(row, body[row_end:sa1b_end], None if sizes[2] is None else body[sa1b_end:])


class PartialShard:
    """The store of one shard's finished images."""

    def __init__(self, paths: RunPaths, shard: str) -> None:
        self.folder = paths.partial / shard

    def save(self, image_id: int, content: bytes) -> None:
        """Store a finished image as `pack` makes it."""
        self._write(f"{image_id}{_FINISHED}", content)

    def fail(self, failure: Failure) -> None:
        """Store an image that ended without a record."""
        self._write(f"{failure.image_id}{_FAILED}", json.dumps(vars(failure)).encode())

    def load(self, image_id: int) -> Finished | Failure | None:
        """How an image ended; None if it has not, or if its file is damaged."""
        try:
            content = self._read(f"{image_id}{_FINISHED}")
            if content is None:
                failure = self._read(f"{image_id}{_FAILED}")
                return None if failure is None else Failure(**json.loads(failure))
            finished = unpack(content)
        except (ValueError, TypeError):
            return None
        return finished if finished.image_id == image_id else None

    def ended(self) -> set[int]:
        """Ids of the images that have ended, unchecked."""
        names = (name.partition(".") for name in list_names(self.folder))
        return {int(stem) for stem, dot, suffix in names if dot + suffix in (_FINISHED, _FAILED)}

    def remove(self) -> None:
        """Remove the store, after the shard's commit."""
        sweep(self.folder)

    def _write(self, name: str, content: bytes) -> None:
        atomic_write(self.folder / name, content, durable=False)

    def _read(self, name: str) -> bytes | None:
        try:
            return (self.folder / name).read_bytes()
        except FileNotFoundError:
            return None


def list_begun(paths: RunPaths) -> list[str]:
    """Names of the shards that are begun and not committed."""
    return list_names(paths.partial)


class Breadcrumbs:
    """Names on disk the images that a worker has in hand, so that its death can be laid to one.

    Only deaths in the same session count, that is under one living driver: whoever kills the driver
    blames no image.

    Attributes:
        deaths: how often a worker has died with an image in hand, by key.
        suspects: keys that a process of an earlier session had in hand when it ended: it may have
            been killed, or one of them may have crashed it.
    """

    def __init__(self, store: PartialShard, session: str) -> None:
        self._path = store.folder / _BREADCRUMBS
        self._session = session
        self.deaths: Counter[str] = Counter()
        self.suspects: list[str] = []
        try:
            last = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return
        if last["session"] == session:
            self.deaths.update(last["deaths"])
            self.deaths.update(last["keys"])
        else:
            self.suspects = last["keys"]

    def hold(self, keys: Iterable[str]) -> None:
        """Say that these images, and no others, are in hand from now on."""
        content = {"session": self._session, "keys": list(keys), "deaths": self.deaths}
        atomic_write(self._path, json.dumps(content).encode(), durable=False)
