"""The images that a run could not do, by reason."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sa_engine.partial import Failure
from sa_engine.plan import read_plan, shard_name
from sa_engine.reader import read_failures
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, find_run

_READERS = 16
_MESSAGE = 70  # characters of a reason in the table


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Images that ended for one reason.

    Attributes:
        count: of the images.
        status: "failed" or "skipped".
        step: in which it happened.
        error: class of the exception.
        example: the first of them.
    """

    count: int
    status: str
    step: str
    error: str
    example: Failure


def list_failures(out: AnyPath) -> list[Failure]:
    """All failed and skipped images of a run's committed shards, in the order of the plan.

    Raises RunError if there is no run.
    """
    paths = find_run(out)
    markers = read_markers(paths, range(len(read_plan(paths.plan))))
    names = [shard_name(index) for index, s in markers.items() if s.failed or s.skipped]
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: read_failures(paths, name), names)
        return [failure for failures in found for failure in failures]


def by_reason(failures: Iterable[Failure]) -> list[Reason]:
    """Group failures whose messages differ in numbers only, the most frequent first."""
    groups: dict[tuple[str, ...], list[Failure]] = {}
    for failure in failures:
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", failure.message)
        groups.setdefault((failure.status, failure.step, failure.error, kind), []).append(failure)
    reasons = [
        Reason(
            count=len(members),
            status=members[0].status,
            step=members[0].step,
            error=members[0].error,
            example=members[0],
        )
        for members in groups.values()
    ]
    return sorted(reasons, key=lambda reason: -reason.count)


def table(reasons: Iterable[Reason]) -> str:
    """The reasons as a table for a person."""
    rows = [("images", "status", "step", "reason", "for example")]
    for reason in reasons:
        message = reason.example.message
        shown = message if len(message) <= _MESSAGE else f"{message[: _MESSAGE - 3]}..."
        key = printable(reason.example.key)
        rows.append((f"{reason.count:,}", reason.status, reason.step, shown, key))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def printable(key: str) -> str:
    """A file name in one line: as it is, or quoted if it has line breaks and the like."""
    return key if key.isprintable() else repr(key)
