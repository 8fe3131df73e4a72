"""Which photo an annotation file means: tools change names on their way."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from pathlib import PurePosixPath
from urllib.parse import parse_qs, unquote, urlsplit

from sa_engine.formats.model import AnnotatedImage, FormatError

# Label Studio puts eight hex digits before the name of an upload.
_UPLOAD = re.compile(r"^[0-9a-f]{8}-(?=.)")
# The id of a photo that was handed out: sa_12.jpg, sa_000012__harbour.jpg.
_ID = re.compile(r"sa_([0-9]+)(?=__|\.|$)")
_SHOWN = 10
_Rule = Callable[[str], str]
_Tables = list[tuple[_Rule, dict[str, list[str]]]]


def match_images(
    images: Iterable[AnnotatedImage],
    keys: Iterable[str],
    allow_unmatched: bool,
    hash_photos: Callable[[Sequence[str]], Iterable[str | None]] | None = None,
) -> dict[str, AnnotatedImage]:
    """The annotated image of each photo.

    An image is sought by its whole name, then by the id in its file's name, then by its name without folders, then
    without the prefix that Label Studio gives to uploads, then by its bytes if its tool has stored them, then by its
    name without its suffix. The first of these by which a photo is found decides; of several the one whose path ends
    as the image's does for longest.

    Args:
        images: as annotation files name them.
        keys: of the photos.
        allow_unmatched: leave out images and photos that have no counterpart.
        hash_photos: the sha256 (hex) of photos, None for one that cannot be read. Asked once, of the photos that no
            image is found to be by its name, if bytes have to decide; None: bytes decide nothing.

    Raises:
        FormatError: several photos or none, photos without annotations, or two files for one photo; with names.
    """
    images, keys = list(images), list(keys)
    tables = _tables(_SURE, keys)
    candidates = [_by_name(image, tables) for image in images]
    sought = [one for one, image in enumerate(images) if image.sha256 and not candidates[one]]
    if sought and hash_photos is not None:
        taken = {key for some in candidates for key in some}
        free = [key for key in keys if key not in taken]
        same: dict[str | None, list[str]] = defaultdict(list)
        for key, sha256 in zip(free, hash_photos(free), strict=True):
            same[sha256].append(key)
        for one in sought:
            candidates[one] = same.get(images[one].sha256, [])
    last = _tables((_stem,), keys)
    found: dict[str, AnnotatedImage] = {}
    unknown: list[AnnotatedImage] = []
    for image, some in zip(images, candidates, strict=True):
        _take(image, some or _by_name(image, last), found, unknown)
    bare = [key for key in keys if key not in found]
    if (unknown or bare) and not allow_unmatched:
        names = [f"{image.name} ({image.source})" for image in unknown]
        raise FormatError(
            f"{len(unknown)} annotated images have no photo{_some(names)}, and {len(bare)} photos have no annotations"
            f"{_some(bare)}: mend the names, or leave them out with --allow-unmatched"
        )
    return found


def _take(
    image: AnnotatedImage,
    candidates: list[str],
    found: dict[str, AnnotatedImage],
    unknown: list[AnnotatedImage],
) -> None:
    """Put an image where it belongs. Raises FormatError if it may be several photos, or one that is taken."""
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


def _by_name(image: AnnotatedImage, tables: _Tables) -> list[str]:
    name = _plain(image.name)
    for simplify, table in tables:
        candidates = table.get(simplify(name), [])
        if candidates:
            return _nearest(name, candidates)
    return []


def _nearest(name: str, keys: list[str]) -> list[str]:
    """Those that share the longest end with `name`, in whole folders, and of these the one that is such an end."""
    if len(keys) == 1:
        return keys
    wanted = PurePosixPath(name).parts[::-1]

    def shared(key: str) -> tuple[int, bool]:
        parts = PurePosixPath(key).parts[::-1]
        same = takewhile(lambda pair: pair[0] == pair[1], zip(parts, wanted, strict=False))
        length = sum(1 for _ in same)
        return length, length == len(parts)

    best = max(map(shared, keys))
    return [key for key in keys if shared(key) == best]


def _tables(rules: Iterable[_Rule], keys: Sequence[str]) -> _Tables:
    """Every rule with the photos by what it makes of their names; "" is nothing to find one by."""
    tables: _Tables = []
    for simplify in rules:
        table: dict[str, list[str]] = defaultdict(list)
        for key in keys:
            table[simplify(key)].append(key)
        table.pop("", None)
        tables.append((simplify, table))
    return tables


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


def _id(name: str) -> str:
    """The number in a file's name, without the zeros before it; "" if it carries none."""
    match = _ID.match(_without_prefix(name))
    return (match[1].lstrip("0") or "0") if match else ""


# By falling certainty; bytes decide before the stem does.
_SURE: tuple[_Rule, ...] = (str, _id, _base, _without_prefix)


def _some(names: list[str]) -> str:
    if not names:
        return ""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f" ({', '.join(names[:_SHOWN])}{more})"
