"""Annotation files as tools export them: a file, a folder of them, or a zip or tar, read without unpacking."""

import hashlib
import json
import lzma
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

from sa_engine.formats import coco, cvat, instance_png, isat, label_studio, labelme, sa1b
from sa_engine.formats.model import FormatError, Parsed
from sa_engine.formats.raster import compact

FORMATS: dict[str, ModuleType] = {
    module.NAME: module for module in (coco, sa1b, cvat, label_studio, labelme, isat, instance_png)
}
_SUFFIXES = (".json", ".xml")
# More than any export of a text format; an archive that says so is a bomb.
_LARGEST = 4_000_000_000
# What archives raise that are cut off, changed, or encrypted (RuntimeError).
_DAMAGED = (
    zipfile.BadZipFile,
    tarfile.TarError,
    zlib.error,
    lzma.LZMAError,
    struct.error,
    EOFError,
    OverflowError,
    RuntimeError,
    ValueError,
)


def read_annotations(path: Path, name: str | None = None) -> list[Parsed]:
    """Read all annotation files of a path, in the order of their names.

    Args:
        path: a file, a folder, a zip or a tar.
        name: of the format, a key of `FORMATS`; None: as each file's content says.

    Raises:
        FormatError: nothing there, a file that is damaged, or of no format that is known.
    """
    parsed = [_parse(source, data, name) for source, data in _files(path, _suffixes(name))]
    if not parsed:
        raise FormatError(
            f"{path}: no annotations there: expected files that end with {', '.join(_suffixes(name))}"
        )
    return parsed


def hash_annotations(path: Path, name: str | None = None) -> str:
    """Sha256 (hex) of all annotation files of a path: their names and contents; `name` as in `read_annotations`."""
    digest = hashlib.sha256()
    for source, data in _files(path, _suffixes(name)):
        digest.update(
            f"{source.removeprefix(str(path))}\0{len(data)}\0".encode("utf-8", "surrogateescape")
        )
        digest.update(data)
    return digest.hexdigest()


def _suffixes(name: str | None) -> tuple[str, ...]:
    """How files of a format end. Pictures are read only if their format is named: photos lie beside annotations."""
    return (instance_png.SUFFIX,) if name == instance_png.NAME else _SUFFIXES


def _parse(source: str, data: bytes, name: str | None) -> Parsed:
    suffix = Path(source).suffix.lower()
    content: Any = _LOADERS[suffix](data, source) if suffix in _LOADERS else data
    if name:
        return compact(FORMATS[name].read(content, source))
    known = [one for one in FORMATS.values() if suffix == one.SUFFIX and one.is_this(content)]
    if not known:
        keys = (
            f"keys {', '.join(map(str, list(content)[:8]))}"
            if isinstance(content, dict)
            else type(content).__name__
        )
        raise FormatError(
            f"{source}: of no format that is known ({keys}): expected one of {', '.join(FORMATS)}"
        )
    if known[0] is coco and coco.tool_of(content) == label_studio.TOOL:
        raise FormatError(
            f"{source}: a COCO export of Label Studio, which has lost holes and split masks of several parts: "
            "export its JSON, or take this as it is with --annotation-format coco"
        )
    return compact(known[0].read(content, source))


def _load_json(data: bytes, source: str) -> Any:
    try:
        return json.loads(data)
    except UnicodeDecodeError as error:
        raise FormatError(
            f"{source}: not UTF-8 text: {error.reason} at byte {error.start}"
        ) from None
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{source}: not JSON: {error}") from None


def _load_xml(data: bytes, source: str) -> Any:
    """The root element. Entities, which XML bombs are made of, are refused."""
    from xml.etree.ElementTree import ParseError

    from defusedxml import DefusedXmlException
    from defusedxml.ElementTree import fromstring

    try:
        return fromstring(data)
    except DefusedXmlException as error:
        raise FormatError(
            f"{source}: XML with declarations that annotations have no use for: {error}"
        ) from None
    except (ParseError, ValueError, LookupError) as error:
        raise FormatError(f"{source}: not XML: {error}") from None


_LOADERS = {".json": _load_json, ".xml": _load_xml}


def _files(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    """Name and content of every annotation file of a path."""
    try:
        if path.is_dir():
            for file in sorted(path.rglob("*")):
                if file.suffix.lower() in suffixes and file.is_file():
                    yield str(file), file.read_bytes()
        elif zipfile.is_zipfile(path):
            yield from _members_of_zip(path, suffixes)
        elif path.is_file() and path.suffix.lower() not in suffixes and tarfile.is_tarfile(path):
            yield from _members_of_tar(path, suffixes)
        else:
            yield str(path), path.read_bytes()
    except _DAMAGED as error:
        raise FormatError(f"{path}: a damaged archive, or an encrypted one: {error}") from None
    except OSError as error:
        raise FormatError(f"{path}: cannot be read: {error.strerror or error}") from None


def _members_of_zip(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with zipfile.ZipFile(path) as archive:
        for member in sorted(archive.infolist(), key=lambda one: one.filename):
            if member.filename.lower().endswith(suffixes):
                _check_size(f"{path}/{member.filename}", member.file_size)
                yield f"{path}/{member.filename}", archive.read(member)


def _members_of_tar(path: Path, suffixes: tuple[str, ...]) -> Iterator[tuple[str, bytes]]:
    with tarfile.open(path) as archive:
        for member in sorted(archive.getmembers(), key=lambda one: one.name):
            file = archive.extractfile(member) if member.isreg() else None
            if file is not None and member.name.lower().endswith(suffixes):
                _check_size(f"{path}/{member.name}", member.size)
                yield f"{path}/{member.name}", file.read()


def _check_size(name: str, size: int) -> None:
    if size > _LARGEST:
        raise FormatError(f"{name}: {size:,} bytes unpacked: at most {_LARGEST:,} are read")
