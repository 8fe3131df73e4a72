"""The plan of a run: which image is in which shard, decided once before any work."""

import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from sa_engine.images import IMAGE_SUFFIXES
from sa_engine.storage import RunError, atomic_write

_DEFAULT_SHARDS = 32
_LARGEST_DEFAULT_SHARD = 128
_SCHEMA = pa.schema(
    [
        ("shard", pa.int32()),
        ("image_id", pa.int64()),
        ("key", pa.string()),
        ("size", pa.int64()),
        ("mtime_ns", pa.int64()),
    ]
)


@dataclass(frozen=True)
class PlannedImage:
    """One photo as it was when the run was planned.

    Attributes:
        image_id: from 1, in the order of the keys.
        key: path below the images folder, with forward slashes.
        size: bytes of the file; -1 if it could not be looked at.
        mtime_ns: its modification time in nanoseconds; -1 likewise.
    """

    image_id: int
    key: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Shard:
    """The unit of work, of commit and of retry."""

    index: int
    images: tuple[PlannedImage, ...]

    @property
    def name(self) -> str:
        """Stem of the shard's files."""
        return f"sa_{self.index:06d}"


@dataclass(frozen=True)
class FoundImage:
    """A file that looks like an image, before it has an id."""

    key: str
    size: int
    mtime_ns: int


def list_images(root: Path, exclude: Path | None = None) -> tuple[list[FoundImage], dict[str, int]]:
    """Find the images in a folder and its subfolders.

    Links to folders are followed; a folder that is reached twice is listed once. Hidden files and
    folders are left out.

    Args:
        root: the folder.
        exclude: a folder below it to leave out (the run's own output).

    Returns:
        The images sorted by key, and how many other entries were left out, by lower-case suffix or
        reason.

    Raises:
        RunError: no such folder, or no image in it.
    """
    if not root.is_dir():
        found = "is not a folder" if root.exists() else "does not exist"
        raise RunError(f"images folder {root} {found}: --images takes a folder of photos")
    ignored: Counter[str] = Counter()
    images = []
    for path in _walk(root, exclude, ignored):
        key = path.relative_to(root).as_posix()
        reason = _reason_to_ignore(key)
        if reason is None:
            images.append(_found(path, key))
        else:
            ignored[reason] += 1
    if not images:
        others = sum(ignored.values())
        raise RunError(
            f"no image in {root}: {others} other entries; "
            f"images end with {' '.join(sorted(IMAGE_SUFFIXES))}"
        )
    return sorted(images, key=lambda image: image.key), dict(sorted((+ignored).items()))


def make_shards(images: Sequence[FoundImage], shard_size: int) -> tuple[Shard, ...]:
    """Number the images from 1 in their order and cut them into shards of `shard_size`."""
    planned = [
        PlannedImage(image_id, image.key, image.size, image.mtime_ns)
        for image_id, image in enumerate(images, start=1)
    ]
    starts = range(0, len(planned), shard_size)
    return tuple(
        Shard(index, tuple(planned[start : start + shard_size]))
        for index, start in enumerate(starts)
    )


def default_shard_size(images: int) -> int:
    """A 32nd of the images, at most 128: a small job still spreads over many workers."""
    return max(1, min(_LARGEST_DEFAULT_SHARD, -(-images // _DEFAULT_SHARDS)))


def write_plan(path: Path, shards: Sequence[Shard], scratch: Path) -> None:
    """Write `plan.parquet`, one row per image in the order of their ids."""
    rows = [{"shard": shard.index, **vars(image)} for shard in shards for image in shard.images]
    sink = pa.BufferOutputStream()
    pq.write_table(pa.Table.from_pylist(rows, schema=_SCHEMA), sink, compression="zstd")
    atomic_write(path, sink.getvalue().to_pybytes(), scratch=scratch)


def read_plan(path: Path) -> tuple[Shard, ...]:
    """Read what `write_plan` wrote. Raises RunError if the file is missing or damaged."""
    try:
        rows = pq.ParquetFile(path).read().to_pylist()
    except FileNotFoundError:
        raise RunError(f"no run there: {path} does not exist") from None
    except (OSError, pa.ArrowInvalid) as error:
        raise RunError(f"cannot read the plan {path}: {error}; use another --out") from None
    images: dict[int, list[PlannedImage]] = {}
    for row in rows:
        images.setdefault(row.pop("shard"), []).append(PlannedImage(**row))
    return tuple(Shard(index, tuple(members)) for index, members in sorted(images.items()))


def _walk(root: Path, exclude: Path | None, ignored: Counter[str]) -> Iterator[Path]:
    """Yield every file below `root` that is not in a hidden, excluded or already seen folder."""

    def unreadable(error: OSError) -> None:
        ignored["unreadable folder"] += 1

    excluded = exclude.resolve() if exclude is not None else None
    seen: set[tuple[int, int]] = set()
    for folder, subfolders, files in os.walk(root, followlinks=True, onerror=unreadable):
        status = os.stat(folder)
        if (status.st_dev, status.st_ino) in seen or Path(folder).resolve() == excluded:
            subfolders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        ignored["hidden"] += sum(name.startswith(".") for name in subfolders)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        yield from (Path(folder, name) for name in files)


def _reason_to_ignore(key: str) -> str | None:
    """Why a file is not an input, or None if it is."""
    name = key.rpartition("/")[2]
    if name.startswith("."):
        return "hidden"
    try:
        key.encode()
    except UnicodeEncodeError:
        return "name is not UTF-8"
    suffix = Path(name).suffix.lower()
    if suffix not in IMAGE_SUFFIXES:
        return suffix or "no suffix"
    return None


def _found(path: Path, key: str) -> FoundImage:
    try:
        status = path.stat()
    except OSError:  # a broken link: reading it will fail with the reason
        return FoundImage(key, -1, -1)
    return FoundImage(key, status.st_size, status.st_mtime_ns)
