"""The finished images of unfinished shards: what a killed run leaves for its successor.

A finished image is one file: a line of JSON that says what follows, then the parts, ready to be put
together to a shard. It is checked when it is read, so writing it need not wait for the disk.
"""

import json
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pyarrow as pa

from sa_engine.records import ImageRecord, sa1b_json, to_table
from sa_engine.storage import RunPaths, atomic_write, list_names, sweep

_FINISHED, _FAILED = ".done", ".failed"
_BREADCRUMBS = "inflight.json"
_MESSAGE_LENGTH = 500
LEFT_OUT = "left out"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """What is not in the records, and why: a line of `_run/errors/<shard>.jsonl`.

    Attributes:
        key: of the image in the plan.
        image_id: of the image in the plan.
        status: "failed"; "skipped" if a stage left the image out on purpose; or `LEFT_OUT`: the image
            has a record, and this of it is not there.
        step: "read", "prepare", "process" or "finish".
        error: class of the exception, or "WorkerDied"; of what was left out, its kind, such as "empty masks".
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

    @property
    def counted_as(self) -> str:
        """The name under which `Finished.counts` has what was left out."""
        return f"{self.error} {LEFT_OUT}"

    def to_line(self) -> bytes:
        """The line."""
        return json.dumps(vars(self)).encode() + b"\n"


@dataclass(frozen=True, kw_only=True)
class Finished:
    """A finished image.

    Attributes:
        image_id: of the image in the plan.
        counts: what was found in it, such as {"masks": 12}.
        parts: of which its shard is made: "row" (its record, one row of `records.ARROW_SCHEMA` as an
            Arrow stream), "sa1b" (the record as SA-1B's JSON), "jpeg" (its picture), "audit" (a line
            of JSON that says what was redacted), "left_out" (lines, a `Failure` each).
        released: files of the output that are an image's own, by their path there. They are put in
            place when the image ends and are not kept with its parts.
    """

    image_id: int
    counts: Mapping[str, int]
    parts: Mapping[str, bytes]
    released: Mapping[str, bytes] = field(default_factory=dict)

    @property
    def row(self) -> pa.Table:
        """Its record, as a table."""
        with pa.ipc.open_stream(self.parts["row"]) as reader:
            return reader.read_all()


def finished_record(
    record: ImageRecord,
    jpeg: bytes | None,
    audit: Mapping[str, Any] | None = None,
    left_out: Sequence[Failure] = (),
) -> Finished:
    """A finished image that has masks.

    Args:
        record: of the image.
        jpeg: its picture, if the run keeps pictures.
        audit: what was redacted in it, if it was.
        left_out: what was found and is not in the record.

    Raises RecordError or ValueError for a record that cannot be written.
    """
    row = to_table([record])
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, row.schema) as writer:
        writer.write_table(row)
    parts = {
        "row": sink.getvalue().to_pybytes(),
        "sa1b": sa1b_json(record),
        "jpeg": jpeg,
        "audit": None if audit is None else to_line(audit),
        "left_out": b"".join(one.to_line() for one in left_out) or None,
    }
    return Finished(
        image_id=record.image_id,
        counts={
            "masks": len(record.masks),
            **(audit or {}).get("counts", {}),
            **Counter(one.counted_as for one in left_out),
        },
        parts={name: part for name, part in parts.items() if part is not None},
    )


def finished_redaction(
    audit: Mapping[str, Any], released: Mapping[str, bytes] | None = None
) -> Finished:
    """A finished image of which only `audit` is kept, and the file that is released of it."""
    return Finished(
        image_id=audit["image_id"],
        counts=audit["counts"],
        parts={"audit": to_line(audit)},
        released=released or {},
    )


def one_line(message: str) -> str:
    """What a `Failure` says, in one line that is not too long."""
    return " ".join(message.split())[:_MESSAGE_LENGTH]


def to_line(content: Mapping[str, Any]) -> bytes:
    """A line of JSON, as audits are made of."""
    return json.dumps(content, ensure_ascii=False).encode("utf-8", "surrogateescape") + b"\n"


def pack(finished: Finished) -> bytes:
    """The content of a finished image's file."""
    body = b"".join(finished.parts.values())
    head = {
        "image_id": finished.image_id,
        "counts": dict(finished.counts),
        "sizes": {name: len(part) for name, part in finished.parts.items()},
        "crc32": zlib.crc32(body),
    }
    return json.dumps(head).encode() + b"\n" + body


def unpack(content: bytes) -> Finished:
    """The inverse of `pack`. Raises ValueError if the content is damaged."""
    head, _, body = content.partition(b"\n")
    try:
        described = json.loads(head)
        sizes, crc32 = described["sizes"], described["crc32"]
        parts, start = {}, 0
        for name, size in sizes.items():
            parts[name] = body[start : start + size]
            start += size
        finished = Finished(image_id=described["image_id"], counts=described["counts"], parts=parts)
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(str(error)) from None
    if zlib.crc32(body) != crc32:
        raise ValueError("the CRC is another")
    return finished


class PartialShard:
    """The store of one shard's finished images."""

    def __init__(self, paths: RunPaths, shard: str) -> None:
        self.folder = paths.partial / shard

    def save(self, finished: Finished) -> None:
        """Store a finished image."""
        self._write(f"{finished.image_id}{_FINISHED}", pack(finished))

    def fail(self, failure: Failure) -> None:
        """Store an image that ended without a record."""
        self._write(f"{failure.image_id}{_FAILED}", failure.to_line())

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
        # Private, as an audit is.
        atomic_write(self.folder / name, content, durable=False, private=True)

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
