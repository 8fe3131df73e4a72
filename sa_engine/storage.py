"""Files of a run: where they lie, how they are written whole or not at all, and who may write."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import uuid
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from sa_engine.errors import SaEngineError


class RunError(SaEngineError):
    """A run that cannot start or go on: its folders, its plan, or another run are in the way."""


@dataclass(frozen=True)
class RunPaths:
    """The files of a run under its output folder.

    The finished shards lie at the top: `sa_000000.tar`, `.parquet`, and `.json`, the commit marker.
    Everything else lies in `_run`.
    """

    out: Path

    @property
    def run(self) -> Path:
        return self.out / "_run"

    @property
    def info(self) -> Path:
        return self.run / "run.json"

    @property
    def plan(self) -> Path:
        return self.run / "plan.parquet"

    @property
    def lock(self) -> Path:
        return self.run / "lock"

    @property
    def scratch(self) -> Path:
        return self.run / "tmp"

    @property
    def partial(self) -> Path:
        return self.run / "partial"

    def errors(self, shard: str) -> Path:
        return self.run / "errors" / f"{shard}.jsonl"

    def marker(self, shard: str) -> Path:
        return self.out / f"{shard}.json"


def atomic_write(
    path: Path, data: bytes, *, scratch: Path | None = None, durable: bool = True
) -> None:
    """Write a file so that `path` holds all of `data` or what it held before.

    Args:
        path: the file; its folder is made if it is missing.
        data: the content.
        scratch: folder for the temporary file, on the same file system; default: beside `path`.
        durable: wait until the disk has it, so that it survives a power cut.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{path.name}.{uuid.uuid4().hex}.tmp"
    try:
        temporary.write_bytes(data)
        place(temporary, path, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def place(temporary: Path, path: Path, *, durable: bool = True) -> None:
    """Move a finished temporary file to its name in one step, replacing what is there."""
    if durable:
        _sync(temporary)
    os.replace(temporary, path)
    if durable:
        _sync(path.parent)


def sha256_file(path: Path) -> str:
    """Sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def sweep(folder: Path) -> None:
    """Remove a folder of leftovers with all that is in it; a missing one is fine."""
    shutil.rmtree(folder, ignore_errors=True)


class RunLock:
    """Holds a run's folder for one live process, as a context manager.

    The operating system drops the lock when its holder dies, so a dead run is taken over at once; a
    lock from another host is believed, because a shared file system may not carry it. The file says
    host, pid and session, for messages and for `holds`.
    """

    def __init__(self, paths: RunPaths, session: str) -> None:
        self._paths = paths
        self._session = session
        self._file = -1

    def __enter__(self) -> "RunLock":
        """Take the lock. Raises RunError, naming the holder, if another run has it."""
        while True:
            file = self._open()
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(file)
                raise RunError(self._held("end that run first, or use another --out")) from None
            if os.fstat(file).st_nlink:
                break
            os.close(file)  # its last holder removed it between our open and our lock
        host = read_lock(self._paths).get("host")
        if host not in (None, socket.gethostname()):
            os.close(file)
            raise RunError(self._held(f"if that run is gone, remove {self._paths.lock}"))
        holder = {"host": socket.gethostname(), "pid": os.getpid(), "session": self._session}
        os.ftruncate(file, 0)
        os.pwrite(file, json.dumps(holder).encode(), 0)
        self._file = file
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Release the lock, and remove the run's folders if nothing was written into them."""
        self._paths.lock.unlink(missing_ok=True)
        os.close(self._file)
        for folder in (self._paths.run, self._paths.out):
            try:
                folder.rmdir()
            except OSError:
                return

    def _open(self) -> int:
        try:
            self._paths.run.mkdir(parents=True, exist_ok=True)
            return os.open(self._paths.lock, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise RunError(f"cannot write to the output {self._paths.out}: {error}") from None

    def _held(self, advice: str) -> str:
        holder = read_lock(self._paths)
        return (
            f"{self._paths.out} is in use by another run: process {holder.get('pid', '?')} "
            f"on host {holder.get('host', '?')}; {advice}"
        )


def read_lock(paths: RunPaths) -> dict[str, str | int]:
    """Host, pid and session of the run that holds a folder; empty if none does."""
    try:
        return json.loads(paths.lock.read_bytes())
    except (OSError, ValueError):
        return {}


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
