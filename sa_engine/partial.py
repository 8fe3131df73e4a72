"""The finished images of unfinished shards: what a killed run leaves for its successor.

A finished image is one file: a line of JSON, then its picture if pictures are released. It is
checked when it is read, so writing it need not wait for the disk.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from sa_engine.records import ImageRecord, RecordError, from_json
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
    """An image's record and, if pictures are released, its JPEG file."""

    record: ImageRecord
    jpeg: bytes | None


class PartialShard:
    """The store of one shard's finished images."""

    def __init__(self, paths: RunPaths, shard: str) -> None:
        self.folder = paths.partial / shard

    def save(self, image_id: int, record: str, jpeg: bytes | None) -> None:
        """Store a finished image: its record as `records.to_json` writes it, and its picture."""
        head = {"record": record, "jpeg_sha256": _sha256(jpeg)}
        self._write(f"{image_id}{_FINISHED}", json.dumps(head).encode() + b"\n" + (jpeg or b""))

    def fail(self, failure: Failure) -> None:
        """Store an image that ended without a record."""
        self._write(f"{failure.image_id}{_FAILED}", json.dumps(vars(failure)).encode())

    def load(self, image_id: int) -> Finished | Failure | None:
        """How an image ended; None if it has not, or if its file is damaged."""
        try:
            failure = self._read(f"{image_id}{_FAILED}")
            if failure is not None:
                return Failure(**json.loads(failure))
            content = self._read(f"{image_id}{_FINISHED}")
            if content is None:
                return None
            head, _, picture = content.partition(b"\n")
            described = json.loads(head)
            record = from_json(described["record"])
            jpeg = None if described["jpeg_sha256"] is None else picture
        except (ValueError, KeyError, TypeError, RecordError):
            return None
        if _sha256(jpeg) != described["jpeg_sha256"] or record.image_id != image_id:
            return None
        return Finished(record, jpeg)

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


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
