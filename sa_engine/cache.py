"""The folder of fetched model weights: a file enters it by one rename, after it was found right."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sa_engine.errors import SaEngineError


class WeightsError(SaEngineError):
    """There is no such model, or no source could provide its weights."""


def cache_dir() -> Path:
    """`SA_ENGINE_CACHE`, by default `~/.cache/sa-engine`. It need not exist."""
    return Path(os.environ.get("SA_ENGINE_CACHE") or "~/.cache/sa-engine").expanduser()


@contextmanager
def work_folder(name: str) -> Iterator[Path]:
    """An empty folder in the cache, for one process at a time; removes what a killed one left.

    Raises WeightsError if the cache cannot be written.
    """
    from filelock import FileLock

    cache = cache_dir()
    work = cache / f".{name}.part"
    lock = FileLock(cache / f".{name}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise WeightsError(
            f"cache {cache}: cannot be written ({error.strerror}); "
            "set SA_ENGINE_CACHE to a folder that can"
        ) from error
    try:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        lock.release()


def keep(file: Path, target: Path) -> Path:
    """Move a finished file to its final name: wholly there, even after a power cut, or not."""
    file.chmod(0o644)  # a download began as a temporary file, which only its owner may read
    with file.open("rb") as handle:
        os.fsync(handle.fileno())
    os.replace(file, target)
    return target
