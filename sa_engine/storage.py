"""Files of a run: where they lie, and how they are written whole or not at all.

A place is a `pathlib.Path` on this machine's file systems or a `RemotePath` behind a URI.
"""

import errno
import hashlib
import json
import os
import shutil
import tempfile
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias
from urllib.parse import unquote, urlsplit

from sa_engine.errors import SaEngineError
from sa_engine.remote import RemotePath, is_uri

AnyPath: TypeAlias = Path | RemotePath

_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL
_BLOCK = 1 << 24  # bytes; from a store, every block is a request
# What a full or broken disk answers; a run ends with it in one sentence.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)


class RunError(SaEngineError):
    """A run that cannot start or go on: its folders, its plan, or another run are in the way."""


class OutputError(RunError):
    """The output's disk or store failed in the middle of the work; the same command resumes it."""

    exit_code = 1


@dataclass(frozen=True)
class RunPaths:
    """The files of a run.

    A run of shards owns its output folder. The finished shards lie at the top: `sa_000000.tar`,
    `.parquet`, and `.json`, the commit marker. Everything else lies in `_run`. A run whose output is
    a tree of images alone keeps its markers and everything else in a folder of its own, `work`.
    """

    out: AnyPath
    work: AnyPath | None = None

    @property
    def run(self) -> AnyPath:
        return self.out / "_run" if self.work is None else self.work

    @property
    def shards(self) -> AnyPath:
        return self.out if self.work is None else self.work / "shards"

    @property
    def info(self) -> AnyPath:
        return self.run / "run.json"

    @property
    def plan(self) -> AnyPath:
        return self.run / "plan.parquet"

    @property
    def lock(self) -> AnyPath:
        return self.run / "lock"

    @property
    def heartbeat(self) -> AnyPath:
        return self.run / "heartbeat.json"

    @property
    def scratch(self) -> Path:
        """Where files are built: on the output's own file system, or this machine's if it is remote."""
        if isinstance(self.run, Path):
            return self.run / "tmp"
        name = hashlib.sha256(str(self.run).encode()).hexdigest()[:16]
        return Path(tempfile.gettempdir()) / f"sa-engine-{name}"

    @property
    def partial(self) -> AnyPath:
        return self.run / "partial"

    def errors(self, shard: str) -> AnyPath:
        return self.run / "errors" / f"{shard}.jsonl"

    @property
    def name(self) -> AnyPath:
        """The folder by which `find_run` finds it."""
        return self.out if self.work in (None, work_beside(self.out)) else self.work

    def audit(self, shard: str) -> AnyPath:
        return self.run / "audit" / f"{shard}.jsonl"

    def marker(self, shard: str) -> AnyPath:
        return self.shards / f"{shard}.json"


def location(text: str) -> AnyPath:
    """The place that a user means: a URI such as `s3://bucket/folder`, or a path on this machine.

    A local path comes back absolute, its links resolved, so that it can be compared. Raises
    `remote.LocationError` for a URI that pyarrow does not understand.
    """
    if not is_uri(text):
        return Path(text).expanduser().resolve()
    parts = urlsplit(text)
    return Path(unquote(parts.path)).resolve() if parts.scheme == "file" else RemotePath(text)


def work_beside(out: AnyPath) -> AnyPath:
    """Where a run whose output is a tree of images keeps its own files by default: `OUT.run`."""
    return out.parent / f"{out.name}.run"


def find_run(named: AnyPath) -> RunPaths:
    """The run that a user means by its output folder, or by the folder it keeps its own files in."""
    if RunPaths(named).info.exists():
        return RunPaths(named)
    if (work_beside(named) / "run.json").exists():
        return RunPaths(named, work_beside(named))
    try:
        out = json.loads((named / "run.json").read_bytes())["config"]["out"]
    except (OSError, ValueError, KeyError, TypeError):
        return RunPaths(named)
    beside = named.parent / named.name.removesuffix(".run")
    # A run that was moved has its output beside it, and a store is reached as `named` is.
    return RunPaths(beside if work_beside(beside) == named else location(out), named)


def is_disk_error(error: OSError) -> bool:
    """Whether an error is the disk's, rather than that of one file's name or place."""
    return error.errno in _DISK_ERRORS


def atomic_write(
    path: AnyPath,
    data: bytes,
    *,
    scratch: Path | None = None,
    durable: bool = True,
    private: bool = False,
) -> None:
    """Write a file so that `path` holds all of `data` or what it held before.

    Args:
        path: the file; its folder is made if it is missing.
        data: the content.
        scratch: folder for the temporary file, on the same file system; default: beside `path`.
        durable: wait until the disk has it, so that it survives a power cut.
        private: only its owner may read it; a store has its own rules for that.
    """
    if isinstance(path, RemotePath):
        path.put(data)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = scratch or path.parent
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".{uuid.uuid4().hex}.tmp"  # short: some names are as long as can be
    try:
        with open(os.open(temporary, _NEW_FILE, 0o600 if private else 0o666), "wb") as file:
            file.write(data)
        place(temporary, path, durable=durable)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_results(folder: AnyPath, files: Mapping[str, bytes]) -> list[AnyPath]:
    """Write files by their names into a folder, each whole or not at all; the folder is made if it is missing.

    Raises RunError if one cannot be written.
    """
    try:
        for name, content in files.items():
            atomic_write(folder / name, content)
    except OSError as error:
        raise RunError(
            f"cannot write to {folder}: {error.strerror or error}; name a folder that can be written"
        ) from None
    return [folder / name for name in files]


def place(temporary: Path, path: AnyPath, *, durable: bool = True) -> None:
    """Move a finished temporary file to its name in one step, replacing what is there."""
    if isinstance(path, RemotePath):
        path.put(temporary)
        temporary.unlink()
        return
    if durable:
        _sync(temporary)
    os.replace(temporary, path)
    if durable:
        _sync(path.parent)


def sha256_file(path: AnyPath) -> str:
    """Sha256 (hex) of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def list_names(folder: AnyPath) -> list[str]:
    """Names of the files and folders in a folder; none if it is not there."""
    if isinstance(folder, RemotePath):
        return [path.name for path in folder.iterdir()]
    try:
        return os.listdir(folder)
    except FileNotFoundError:
        return []


def modified(path: AnyPath) -> float:
    """When a file was last written, by its file system's clock. Raises FileNotFoundError."""
    return path.modified() if isinstance(path, RemotePath) else path.stat().st_mtime


def sweep(folder: AnyPath) -> None:
    """Remove a folder of leftovers with all that is in it; a missing one is fine."""
    if isinstance(folder, RemotePath):
        folder.remove_tree()
    else:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def told_if_output_fails(paths: RunPaths) -> Iterator[None]:
    """Turn what a full disk or a silent store raises into an OutputError that names the output."""
    try:
        yield
    except OSError as error:
        if not is_disk_error(error) and isinstance(paths.out, Path):
            raise
        detail = error.strerror or " ".join(str(error).split())
        raise OutputError(
            f"cannot read or write the output {paths.out}: {detail}; what is finished is kept: "
            "mend that, then run the same command again"
        ) from None


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
