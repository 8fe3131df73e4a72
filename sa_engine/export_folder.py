"""An export's folder: it appears whole, with a marker that says what it was made of, and is then in people's hands.

The marker's name is hidden and has no suffix, so that no tool, nor `ingest`, takes it for pictures or annotations.
While the export is written, in a hidden folder beside its place, the same file is the lock that its process holds: the
system takes it from one that is killed, and the next export to this place clears away what that one left.
"""

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from sa_engine import __version__
from sa_engine.errors import SaEngineError

MARKER = ".sa-engine-export"
_SCHEMA_VERSION = 1
_LONG = 60  # characters of a value in a message


class ExportError(SaEngineError):
    """An export that cannot be made."""


def read_marker(dest: Path, made_of: Mapping[str, Any]) -> dict[str, Any] | None:
    """What an export said when it was finished, if `dest` has it already.

    Args:
        dest: the folder.
        made_of: all that decides what an export holds, as plain JSON values.

    Returns:
        What `Building.finish` was given; None: there is nothing, or an empty folder.

    Raises:
        ExportError: something else is there.
    """
    if not dest.exists() or (dest.is_dir() and not any(dest.iterdir())):
        return None
    taken, advice = f"{dest} is there and not empty", "name a new folder"
    try:
        content = json.loads((dest / MARKER).read_bytes())
        if content["schema_version"] != _SCHEMA_VERSION:
            raise ValueError(f"schema_version {content['schema_version']}")
        before, said = dict(content["made_of"]), dict(content["said"])
    except (FileNotFoundError, NotADirectoryError):
        raise ExportError(f"{taken}: {advice}") from None
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ExportError(f"{taken}, and its {MARKER} cannot be read ({error}): {advice}") from None
    for name, value in made_of.items():
        if before.get(name) != value:
            raise ExportError(
                f"{taken}: it is an export whose {name.replace('_', ' ')} was {_brief(before.get(name))}, now "
                f"{_brief(value)}: {advice}"
            )
    return said


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 3]}..."


class Building:
    """Builds an export's folder beside its place, as a context manager that leaves nothing if it is not finished.

    Attributes:
        folder: to write into.
    """

    def __init__(self, dest: Path) -> None:
        self._dest = dest.resolve()
        name = hashlib.sha256(os.fsencode(self._dest.name)).hexdigest()[:16]
        self.folder = self._dest.with_name(f"{MARKER}-{name}.tmp")
        self._lock = -1

    def __enter__(self) -> "Building":
        """Raises ExportError if another process exports to this place, OSError if it cannot be written."""
        self._lock = self._take()
        try:
            self._clear()
        except BaseException:
            os.close(self._lock)
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._is_held(self._lock):  # it is not finished
            with suppress(OSError):
                self._clear()
                (self.folder / MARKER).unlink()
                self.folder.rmdir()
        os.close(self._lock)

    def finish(self, made_of: Mapping[str, Any], said: Mapping[str, Any]) -> None:
        """Write the marker, and move all to its place in one step.

        Args:
            made_of, said: see `read_marker`.
        """
        content = {"schema_version": _SCHEMA_VERSION, "version": __version__}
        data = json.dumps({**content, "made_of": made_of, "said": said}, indent=1).encode() + b"\n"
        os.ftruncate(self._lock, 0)  # a killed export may have written its own
        with open(self._lock, "wb", closefd=False) as file:
            file.write(data)
        self.folder.rename(self._dest)  # an empty folder is replaced

    def _take(self) -> int:
        while True:
            self.folder.mkdir(parents=True, exist_ok=True)
            try:
                lock = os.open(self.folder / MARKER, os.O_RDWR | os.O_CREAT, 0o666)
            except FileNotFoundError:
                continue  # whoever had the folder has just moved or removed it
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_held(lock):
                    return lock
            except BlockingIOError:
                os.close(lock)
                raise ExportError(
                    f"another process exports to {self._dest}: wait until it has ended, or name another folder"
                ) from None
            except BaseException:
                os.close(lock)
                raise
            os.close(lock)

    def _is_held(self, lock: int) -> bool:
        """Whether the lock is of the file that is in the folder now."""
        try:
            return os.path.samestat(os.fstat(lock), os.stat(self.folder / MARKER))
        except FileNotFoundError:
            return False

    def _clear(self) -> None:
        for path in self.folder.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != MARKER:
                path.unlink()
