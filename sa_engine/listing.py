"""Finds the images of a folder or of a bucket, before they are planned."""

import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from sa_engine.images import IMAGE_SUFFIXES
from sa_engine.remote import RemotePath
from sa_engine.storage import AnyPath, RunError

# Of the table of images: path below the folder, bytes, modification time; -1 for what cannot be
# looked at. Large strings, because Arrow sorts no more than 2 GB of others.
COLUMNS = [("key", pa.large_string()), ("size", pa.int64()), ("mtime_ns", pa.int64())]
_BATCH = 100_000
# Suffixes counted one by one; names such as frame.000001 would make one of every file.
_REASONS = 100
_LATEST_NS = 2**63 - 1


def list_images(root: AnyPath, exclude: AnyPath | None = None) -> tuple[pa.Table, dict[str, int]]:
    """Find the images in a folder and its subfolders.

    Links to folders are followed; a folder that is reached twice is listed once. Hidden files and
    folders are left out.

    Args:
        root: the folder.
        exclude: a folder below it to leave out (the run's own output).

    Returns:
        The images sorted by key (columns key, size, mtime_ns), and how many other entries were left
        out, by lower-case suffix or reason.

    Raises:
        RunError: no such folder, or no image in it.
    """
    try:
        return _list_images(root, exclude)
    except OSError as error:
        detail = error.strerror or " ".join(str(error).split())
        raise RunError(f"images folder {root} cannot be listed: {detail}") from None


def _list_images(root: AnyPath, exclude: AnyPath | None) -> tuple[pa.Table, dict[str, int]]:
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise RunError(f"images folder {root} {found}: --images takes a folder of photos")
    ignored: Counter[str] = Counter()
    files = walk(root, exclude, ignored) if isinstance(root, Path) else _find(root, exclude)
    images = _Rows()
    for key, size, mtime_ns in files:
        reason = _reason_to_ignore(key, size)
        if reason is None:
            images.add((key, size, mtime_ns))
        else:
            ignored[reason if reason in ignored or len(ignored) < _REASONS else "other"] += 1
    table = images.table()
    if not table.num_rows:
        found = ", ".join(f"{count} {reason}" for reason, count in ignored.most_common(5))
        raise RunError(
            f"no image in {root}: {found or 'it is empty'}; "
            f"images end with {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return table.sort_by("key"), dict(sorted(ignored.items()))


def size_and_mtime_ns(status: os.stat_result) -> tuple[int, int]:
    """Size in bytes and modification time in ns as a plan holds them: the year 2262 is the last."""
    return status.st_size, min(status.st_mtime_ns, _LATEST_NS)


class _Rows:
    """Collects listed files in Arrow's compact form, a batch at a time."""

    def __init__(self) -> None:
        self._batches: list[pa.RecordBatch] = []
        self._rows: list[tuple[str, int, int]] = []

    def add(self, row: tuple[str, int, int]) -> None:
        self._rows.append(row)
        if len(self._rows) == _BATCH:
            self._pack()

    def table(self) -> pa.Table:
        self._pack()
        return pa.Table.from_batches(self._batches, schema=pa.schema(COLUMNS))

    def _pack(self) -> None:
        columns: Any = list(zip(*self._rows, strict=True)) or [(), (), ()]
        arrays = [pa.array(c, type=t) for c, (_, t) in zip(columns, COLUMNS, strict=True)]
        self._batches.append(pa.RecordBatch.from_arrays(arrays, schema=pa.schema(COLUMNS)))
        self._rows = []


def _find(root: RemotePath, exclude: AnyPath | None) -> Iterator[tuple[str, int, int]]:
    inside = f"{exclude}/".removeprefix(f"{root}/") if exclude is not None else ""
    for key, size, mtime_ns in root.find_files():
        if not (inside and key.startswith(inside)):
            yield key, size, mtime_ns


def walk(
    root: Path, exclude: AnyPath | None, ignored: Counter[str]
) -> Iterator[tuple[str, int, int]]:
    """Every file below a folder, in an order that is always the same: path below it, bytes, modification time in ns.

    Links to folders are followed, last. A folder that was seen, a hidden one and `exclude` are left out; the hidden
    ones and those that cannot be read are counted in `ignored`.
    """
    seen: set[tuple[int, int]] = set()
    pending = [(str(root), "")]
    links: list[tuple[str, str]] = []
    while pending or links:
        # Links last: a folder has its own name rather than that of a link to it.
        folder, prefix = pending.pop() if pending else links.pop()
        try:
            status = os.stat(folder)
            if (status.st_dev, status.st_ino) in seen or Path(folder).resolve() == exclude:
                continue
            seen.add((status.st_dev, status.st_ino))
            with os.scandir(folder) as entries:
                found = sorted(entries, key=lambda entry: entry.name)
        except OSError:
            ignored["unreadable folder"] += 1
            continue
        subfolders: list[tuple[str, str]] = []
        linked: list[tuple[str, str]] = []
        for entry in found:
            key = prefix + entry.name
            if not _is_folder(entry):
                yield key, *_look_at(entry)
            elif entry.name.startswith("."):
                ignored["hidden"] += 1
            else:
                kind = linked if entry.is_symlink() else subfolders
                kind.append((entry.path, f"{key}/"))
        pending += reversed(subfolders)
        links += reversed(linked)


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that leads to itself
        return False


def _look_at(entry: os.DirEntry[str]) -> tuple[int, int]:
    try:
        return size_and_mtime_ns(entry.stat())
    except OSError:  # a broken link: reading it will fail with the reason
        return -1, -1


def _reason_to_ignore(key: str, size: int) -> str | None:
    """Why a file is not an input, or None if it is."""
    parts = key.split("/")
    if any(part.startswith(".") for part in parts):
        return "hidden"
    if "" in parts:  # of a store; as a path it would be another file
        return "name with an empty part"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    suffix = Path(key).suffix.lower()
    if suffix in IMAGE_SUFFIXES:
        return None
    if size == -1:  # such as a link to a folder on a disk that is not mounted
        return "broken link or no permission"
    if not suffix.isprintable():
        return ascii(suffix)
    return suffix or "no suffix"
