"""Files in object stores and on remote file systems, through pyarrow: `s3://`, `gs://`, `abfs://`, `hdfs://`.

A `RemotePath` has the part of `pathlib.Path`'s interface that a run needs, so that the same code
serves both; what differs (how a file gets to its name in one step) is in `storage.py`.
"""

import functools
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, TypeVar, cast
from urllib.parse import quote, urlsplit

import tenacity

from sa_engine.errors import SaEngineError

# They put whole objects or none, and have no folders that would have to be made.
_OBJECT_STORES = ("s3", "gcs", "abfs")
_SMALL_FILES_AT_ONCE = {"s3": "allow_delayed_open=true"}
MethodT = TypeVar("MethodT", bound=Callable[..., Any])
# What a store will answer again however often it is asked.
_FINAL = re.compile(
    "ACCESS_DENIED|NO_SUCH|INVALID|SIGNATURE|FORBIDDEN|Unauthenticated", re.IGNORECASE
)


def _may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: what has an errno is not the network."""
    return isinstance(error, OSError) and error.errno is None and not _FINAL.search(str(error))


# A store that does not answer for a minute is no reason to end a run of weeks.
_try_again = tenacity.retry(
    retry=tenacity.retry_if_exception(_may_pass),
    stop=tenacity.stop_after_attempt(4),
    wait=tenacity.wait_random_exponential(multiplier=2, max=30),
    reraise=True,
)


def _patiently(method: MethodT) -> MethodT:
    """Let a method of `RemotePath` try again, and raise StoreError where the store refuses for good."""
    patient = _try_again(method)

    @functools.wraps(method)
    def call(self: "RemotePath", *args: Any, **options: Any) -> Any:
        try:
            return patient(self, *args, **options)
        except OSError as error:
            if error.errno is not None or isinstance(error, StoreError):
                raise
            raise StoreError(f"{self}: {' '.join(str(error).split())}") from None

    return cast(MethodT, call)


class StoreError(SaEngineError, OSError):
    """A store that cannot be reached, or that refuses what was asked of it."""

    exit_code = 1


class LocationError(SaEngineError):
    """A folder named in a way that no file system understands."""


def is_uri(text: str) -> bool:
    """Whether a text names a place by its scheme, like `s3://bucket/folder`."""
    return re.match(r"[a-zA-Z][a-zA-Z0-9+.-]+://", text) is not None


class RemotePath:
    """A file or folder behind a pyarrow file system.

    Its text is the URI without credentials and query, so that it can be shown and recorded.

    Args:
        uri: scheme, bucket or host, path, and where needed a query that pyarrow understands, such
            as `s3://bucket/folder?region=eu-west-1&endpoint_override=https://host`.

    Raises:
        LocationError: pyarrow knows no such file system, or its options are wrong.
    """

    def __init__(self, uri: str) -> None:
        import pyarrow as pa
        from pyarrow import fs

        parts = urlsplit(uri)
        host = parts.netloc.rpartition("@")[2]
        # A small file is one request rather than the three of a multipart upload.
        query = "&".join(filter(None, [parts.query, _SMALL_FILES_AT_ONCE.get(parts.scheme)]))
        encoded = parts._replace(path=quote(parts.path, safe="/%"), query=query).geturl()
        try:
            self._fs, self._path = fs.FileSystem.from_uri(encoded)
        except (pa.ArrowException, OSError, ValueError) as error:
            shown = f"{parts.scheme}://{host}{parts.path}"
            detail = " ".join(str(error).replace(encoded, shown).split())
            raise LocationError(f"{shown}: {detail}") from None
        self._path = self._path.rstrip("/")
        self._uri = uri
        self._base = f"{parts.scheme}://{'' if self._is_store() else host}"

    def __reduce__(self) -> tuple[Any, ...]:
        """Open the file system anew in another process, with that machine's credentials."""
        return _reopen, (self._uri, self._path)

    def __str__(self) -> str:
        return self._base + self._path

    def __repr__(self) -> str:
        return f"RemotePath({str(self)!r})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RemotePath) and str(self) == str(other)

    def __hash__(self) -> int:
        return hash(str(self))

    def __truediv__(self, name: str) -> "RemotePath":
        return self._at(f"{self._path}/{name}")

    @property
    def name(self) -> str:
        return self._path.rpartition("/")[2]

    @property
    def parent(self) -> "RemotePath":
        return self._at(self._path.rpartition("/")[0])

    def exists(self) -> bool:
        """Whether there is a file, or a folder with something in it."""
        return self._info().type.name != "NotFound"

    def is_dir(self) -> bool:
        """Whether there is a folder with something in it."""
        return self._info().type.name == "Directory"

    def modified(self) -> float:
        """When the file was last written, in seconds by the store's own clock."""
        info = self._info()
        if info.type.name != "File":
            raise FileNotFoundError(str(self))
        return info.mtime_ns / 1e9

    def size_and_mtime_ns(self) -> tuple[int, int]:
        """Bytes and modification time of a file; (-1, -1) if there is none."""
        info = self._info()
        return (info.size, info.mtime_ns) if info.type.name == "File" else (-1, -1)

    @_patiently
    def read_bytes(self) -> bytes:
        """All bytes of a file. Raises FileNotFoundError."""
        # Not a stream: that would ask for a quarter of a megabyte at a time.
        with self._fs.open_input_file(self._path) as file:
            return file.read()

    @_patiently
    def open(self, mode: str = "rb") -> IO[bytes]:
        """A file to read from any position."""
        assert mode == "rb", mode
        return self._fs.open_input_file(self._path)

    @_patiently
    def iterdir(self) -> Iterator["RemotePath"]:
        """Files and folders in a folder; none if it is not there."""
        return iter([self._at(entry.path) for entry in self._list(recursive=False)])

    @_patiently
    def find_files(self) -> list[tuple[str, int, int]]:
        """Every file below a folder: path below it, bytes, modification time in nanoseconds."""
        start = len(self._path) + 1
        return [
            (entry.path[start:], entry.size, entry.mtime_ns)
            for entry in self._list(recursive=True)
            if entry.type.name == "File"
        ]

    @_patiently
    def unlink(self, missing_ok: bool = False) -> None:
        """Remove a file."""
        try:
            self._fs.delete_file(self._path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    @_patiently
    def remove_tree(self) -> None:
        """Remove a folder with all that is in it; a missing one is fine."""
        try:
            self._fs.delete_dir(self._path)
        except FileNotFoundError:
            return

    @_patiently
    def put(self, source: Path | bytes) -> None:
        """Make this file hold all of a local file's or of the given bytes, or what it held before."""
        if self._is_store():
            self._write(self._path, source)
            return
        self._fs.create_dir(self._path.rpartition("/")[0], recursive=True)
        temporary = f"{self._path}.tmp"
        self._write(temporary, source)
        self._fs.move(temporary, self._path)

    def _write(self, path: str, source: Path | bytes) -> None:
        stream = self._fs.open_output_stream(path)
        try:
            if isinstance(source, bytes):
                stream.write(source)
            else:
                with source.open("rb") as file:
                    shutil.copyfileobj(file, stream, 1 << 20)
        except BaseException:
            # A stream knows no way back: closing it puts in place what it has got.
            stream.close()
            self._fs.delete_file(path)
            raise
        stream.close()

    @_patiently
    def _info(self) -> Any:
        return self._fs.get_file_info(self._path)

    def _list(self, recursive: bool) -> list[Any]:
        from pyarrow import fs

        selector = fs.FileSelector(self._path, allow_not_found=True, recursive=recursive)
        return self._fs.get_file_info(selector)

    def _at(self, path: str) -> "RemotePath":
        other = object.__new__(RemotePath)
        other._fs, other._path, other._uri, other._base = self._fs, path, self._uri, self._base
        return other

    def _is_store(self) -> bool:
        return self._fs.type_name in _OBJECT_STORES


def _reopen(uri: str, path: str) -> RemotePath:
    return RemotePath(uri)._at(path)
