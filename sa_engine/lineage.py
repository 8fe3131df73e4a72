"""Which round came from which: all rounds below a folder, as a table."""

from __future__ import annotations

import dataclasses
import os
import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from sa_engine.modeling.zoo import MODELS
from sa_engine.rounds import (
    FRESH,
    INFO,
    MIOU,
    RECALL,
    WEIGHTS,
    RoundError,
    RoundInfo,
    read_round,
)

_TEXTS = ("round", "parent", "model", "measure", "gate")
_NUMBERS = ("images", "masks", "iterations", "minutes", "before", "after", "gain")
_COLUMNS = (*_TEXTS[:3], *_NUMBERS[:4], "measure", *_NUMBERS[4:], "gate")
_MEASURES = {MIOU: "1 point", RECALL: "AR@100"}


@dataclass(frozen=True)
class Round:
    """A round and its place among the others.

    Attributes:
        name: its folder below the one that was asked for.
        info: what it says of itself.
        parent: name of the round here that it started from; None: that is not here.
    """

    name: str
    info: RoundInfo
    parent: str | None

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values: `model.json` and its place."""
        return {"round": self.name, "parent_round": self.parent, **dataclasses.asdict(self.info)}


@dataclass(frozen=True)
class Lineage:
    """The rounds below a folder.

    Attributes:
        rounds: a parent before its children, else by name.
        notes: what is odd about them, a sentence each.
    """

    rounds: tuple[Round, ...]
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {"rounds": [one.to_dict() for one in self.rounds], "notes": list(self.notes)}

    def __str__(self) -> str:
        """Give the table for a person, and below it why a gate refused a round."""
        rows = [_COLUMNS, *(_cells(one) for one in self.rounds)]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        sides = ["<" if column in _TEXTS else ">" for column in _COLUMNS]
        lines = [
            "  ".join(f"{cell:{side}{width}}" for cell, side, width in zip(row, sides, widths, strict=True))
            for row in rows
        ]  # fmt: skip
        refused = [
            f"{one.name} refused: {one.info.gate.reason}"
            for one in self.rounds
            if one.info.gate and not one.info.gate.promoted
        ]
        return "\n".join([*map(str.rstrip, lines), *[""] * bool(refused), *refused])


def lineage(folder: Path) -> Lineage:
    """All rounds in a folder and below it; a `model.json` that is damaged is noted.

    Raises:
        RoundError: there is none.
    """
    found, problems = {}, []
    for path in sorted(_round_folders(folder), key=lambda path: natural(str(path))):
        try:
            found[_name(path, folder)] = read_round(path)
        except RoundError as error:
            problems.append(str(error))
    if not found:
        raise RoundError(
            f"{folder} has no rounds: expected folders in it with {WEIGHTS} and {INFO}, as `sa-engine "
            "retrain --out` writes them" + "".join(f"\n  - {problem}" for problem in problems)
        )
    parents = {name: _parent(name, info, found) for name, info in found.items()}
    rounds = tuple(Round(name, found[name], parents[name]) for name in _parents_first(parents))
    return Lineage(rounds, (*problems, *_oddities(rounds)))


def natural(name: str) -> list[str | int]:
    """A key that sorts numbers in names as numbers: 2 before 10."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", name)]


def _round_folders(folder: Path) -> Iterator[Path]:
    for place, folders, files in os.walk(folder):
        if INFO in files:
            yield Path(place)
        folders[:] = [name for name in folders if name != "_run" and not name.startswith(".")]


def _name(path: Path, folder: Path) -> str:
    return path.relative_to(folder).as_posix() if path != folder else path.resolve().name


def _parent(name: str, info: RoundInfo, found: dict[str, RoundInfo]) -> str | None:
    """The round whose weights a round started from; of several, the one that it was called by."""
    wanted = info.parent.fingerprint
    same = [other for other, one in found.items() if one.fingerprint == wanted and other != name]
    called = [other for other in same if _is_called(other, info.parent.name)]
    if called or info.fingerprint == wanted:  # nothing was learned: its twins are no parents
        return called[0] if called else None
    return same[0] if same else None


def _is_called(name: str, given: str) -> bool:
    """Whether a path that a user gave may mean the round of that name."""
    parts = PurePath(given).parts
    if parts and parts[-1] == WEIGHTS:
        parts = parts[:-1]
    return bool(parts) and PurePath(name).name == parts[-1]


def _parents_first(parents: dict[str, str | None]) -> list[str]:
    """Depth first, so that a round's descendants follow it; children in the order given."""
    children = defaultdict(list)
    for name, parent in parents.items():
        children[parent].append(name)
    ordered: dict[str, None] = {}

    def add(name: str) -> None:
        if name not in ordered:
            ordered[name] = None
            for child in children[name]:
                add(child)

    for name in [*children[None], *parents]:  # the latter: copies that call each other parents
        add(name)
    return list(ordered)


def _oddities(rounds: tuple[Round, ...]) -> Iterator[str]:
    """Rounds with the same weights, and parents that are gone."""
    same = defaultdict(list)
    for one in rounds:
        same[one.info.fingerprint].append(one.name)
    for names in same.values():
        if len(names) > 1:
            yield f"{' and '.join(names)} have the same weights"
    for one in rounds:
        given = one.info.parent
        if one.parent is not None or given.name in (*MODELS, FRESH):
            continue
        if namesake := next((other.name for other in rounds if _is_called(other.name, given.name)), None):  # fmt: skip
            yield (
                f"{one.name} started from {given.name} when that had other weights (fingerprint "
                f"{given.fingerprint[:12]}) than {namesake} has now"
            )
        elif not Path(given.name).expanduser().exists():
            yield f"{one.name} started from {given.name}, which is not here any more"


def _cells(one: Round) -> tuple[str, ...]:
    info, measured = one.info, one.info.validation()
    depth = (
        ""
        if info.decoder_depth == 2 or info.detector
        else f" ({info.decoder_depth} decoder layers)"
    )
    gate = "-" if info.gate is None else "promoted" if info.gate.promoted else "refused"
    gain = ("-", "-", "-")
    if measured is not None:
        before, after = measured
        gain = (f"{before:.3f}", f"{after:.3f}", f"{after - before:+.3f}")
    return (
        one.name,
        one.parent or info.parent.name,
        info.architecture + depth,
        f"{sum(data.images for data in info.data):,}",
        f"{sum(data.masks for data in info.data):,}",
        f"{info.iterations:,}",
        f"{info.seconds / 60:,.1f}",
        _MEASURES[info.measure],
        *gain,
        gate,
    )
