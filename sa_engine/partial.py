"""The finished images of unfinished shards: what a killed run leaves for its successor.

A finished image is a JSON file, with its picture beside it if pictures are released. It is checked
when it is read, so writing it need not wait for the disk.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sa_engine.records import ImageRecord, RecordError, from_json
from sa_engine.storage import RunPaths, atomic_write, sweep

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
        if jpeg is not None:
            atomic_write(self._picture(image_id), jpeg, durable=False)
        self._write(f"{image_id}.json", {"record": record, "jpeg_sha256": _sha256(jpeg)})

    def fail(self, failure: Failure) -> None:
        """Store an image that ended without a record."""
        self._write(f"{failure.image_id}.error.json", vars(failure))

    def load(self, image_id: int) -> Finished | Failure | None:
        """How an image ended; None if it has not, or if its files are damaged."""
        try:
            failure = self._read(f"{image_id}.error.json")
            if failure is not None:
                return Failure(**failure)
            content = self._read(f"{image_id}.json")
            if content is None:
                return None
            jpeg = None
            if content["jpeg_sha256"] is not None:
                jpeg = self._picture(image_id).read_bytes()
            record = from_json(content["record"])
        except (OSError, ValueError, KeyError, TypeError, RecordError):
            return None
        if _sha256(jpeg) != content["jpeg_sha256"] or record.image_id != image_id:
            return None
        return Finished(record, jpeg)

    def count(self) -> int:
        """Number of images that have ended, unchecked."""
        names = _list(self.folder)
        return sum(name.endswith(".json") and name != _BREADCRUMBS for name in names)

    def remove(self) -> None:
        """Remove the store, after the shard's commit."""
        sweep(self.folder)

    def _picture(self, image_id: int) -> Path:
        return self.folder / f"{image_id}.jpg"

    def _write(self, name: str, content: dict) -> None:
        atomic_write(self.folder / name, json.dumps(content).encode(), durable=False)

    def _read(self, name: str) -> dict | None:
        try:
            return json.loads((self.folder / name).read_bytes())
        except FileNotFoundError:
            return None


def list_begun(paths: RunPaths) -> list[str]:
    """Names of the shards that are begun and not committed."""
    return _list(paths.partial)


class Breadcrumbs:
    """Names on disk the images that a worker has in hand, so that its death can be laid to one.

    Only deaths in the same session count, that is under one living driver: whoever kills the driver
    blames no image.

    Attributes:
        deaths: how often a worker has died with an image in hand, by key.
    """

    def __init__(self, store: PartialShard, session: str) -> None:
        self._path = store.folder / _BREADCRUMBS
        self._session = session
        self.deaths: Counter[str] = Counter()
        try:
            last = json.loads(self._path.read_bytes())
        except (OSError, ValueError):
            return
        if last["session"] == session:
            self.deaths.update(last["deaths"])
            self.deaths.update(last["keys"])

    def hold(self, keys: Iterable[str]) -> None:
        """Say that these images, and no others, are in hand from now on."""
        content = {"session": self._session, "keys": list(keys), "deaths": self.deaths}
        atomic_write(self._path, json.dumps(content).encode(), durable=False)


def _list(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()
