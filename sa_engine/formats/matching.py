"""Which photo an annotation file means: tools change names on their way."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from sa_engine.formats.model import AnnotatedImage, FormatError

# Label Studio puts eight hex digits before the name of an upload.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
_SHOWN = 10


def match_images(
    images: Iterable[AnnotatedImage], keys: Iterable[str], allow_unmatched: bool
) -> dict[str, AnnotatedImage]:
    """The annotated image of each photo.

    An image is sought by its whole name, then by its name without folders, then without the prefix that Label Studio
    gives to uploads, then without its suffix. The first of these by which exactly one photo is found decides.

    Args:
        images: as annotation files name them.
        keys: of the photos.
        allow_unmatched: leave out images and photos that have no counterpart.

    Raises:
        FormatError: several photos or none, photos without annotations, or two files for one photo; with names.
    """
    keys = list(keys)
    found: dict[str, AnnotatedImage] = {}
    unknown: list[AnnotatedImage] = []
    tables = [_table(simplify, keys) for simplify in _SIMPLER]
    for image in images:
        candidates = _candidates(_plain(image.name), tables)
        if len(candidates) > 1:
            raise FormatError(
                f"{image.source}: {image.name} may be {candidates[0]} or {candidates[1]}: name images with their "
                "folders, or give --images a folder without doubles"
            )
        if not candidates:
            unknown.append(image)
        elif candidates[0] in found:
            other = found[candidates[0]]
            raise FormatError(
                f"{candidates[0]} has annotations twice: as {other.name} in {other.source}, and as {image.name} in "
                f"{image.source}"
            )
        else:
            found[candidates[0]] = image
    bare = [key for key in keys if key not in found]
    if (unknown or bare) and not allow_unmatched:
        names = [f"{image.name} ({image.source})" for image in unknown]
        raise FormatError(
            f"{len(unknown)} annotated images have no photo{_some(names)}, and {len(bare)} photos have no annotations"
            f"{_some(bare)}: mend the names, or leave them out with --allow-unmatched"
        )
    return found


def _candidates(name: str, tables: list[dict[str, list[str]]]) -> list[str]:
    for simplify, table in zip(_SIMPLER, tables, strict=True):
        candidates = table.get(simplify(name), [])
        if candidates:
            return candidates
    return []


def _table(simplify: Callable[[str], str], keys: Iterable[str]) -> dict[str, list[str]]:
    table: dict[str, list[str]] = defaultdict(list)
    for key in keys:
        table[simplify(key)].append(key)
    return table


def _plain(name: str) -> str:
    """A name without what is no path: a URL's host, Label Studio's `/data/local-files/?d=`, backslashes."""
    if "://" in name or "?d=" in name:
        parts = urlsplit(name)
        name = parse_qs(parts.query).get("d", [unquote(parts.path)])[0]
    return name.replace("\\", "/").removeprefix("./").lstrip("/")


def _base(name: str) -> str:
    return PurePosixPath(name).name


def _without_prefix(name: str) -> str:
    return _UPLOAD.sub("", _base(name))


def _stem(name: str) -> str:
    return PurePosixPath(_without_prefix(name)).stem


_SIMPLER: tuple[Callable[[str], str], ...] = (str, _base, _without_prefix, _stem)


def _some(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})"
