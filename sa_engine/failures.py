"""The images that a run could not do and the masks that it left out, by reason."""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from sa_engine.partial import LEFT_OUT, Failure
from sa_engine.plan import read_plan, shard_name
from sa_engine.reader import read_failures
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, find_run

_READERS = 16
_MESSAGE = 70  # characters of a reason in the table


@dataclass(frozen=True, kw_only=True)
class Reason:
    """Images that ended for one reason, or of which something was left out for one.

    Attributes:
        count: of the images.
        lines: of the run's errors: one for each image, or for each mask that was left out.
        status, step, error: as in `Failure`.
        example: the first of them.
    """

    count: int
    lines: int
    status: str
    step: str
    error: str
    example: Failure


def list_failures(out: AnyPath) -> list[Failure]:
    """All failed and skipped images of a run's committed shards and what was left out, in the plan's order.

    Raises RunError if there is no run.
    """
    paths = find_run(out)
    read_run(paths)
    markers = read_markers(paths, range(len(read_plan(paths.plan))))
    names = [shard_name(index) for index, stats in markers.items() if stats.errors_sha256]
    with ThreadPoolExecutor(_READERS) as readers:
        found = readers.map(lambda name: read_failures(paths, name), names)
        return [failure for failures in found for failure in failures]


def by_reason(failures: Iterable[Failure]) -> list[Reason]:
    """Group failures whose messages differ in numbers only, the most frequent first; what was left out by its kind."""
    groups: dict[tuple[str, ...], list[Failure]] = {}
    for failure in failures:
        said = "" if failure.status == LEFT_OUT else failure.message
        kind = re.sub(r"0x[0-9a-f]+|\d+", "#", said)
        groups.setdefault((failure.status, failure.step, failure.error, kind), []).append(failure)
    reasons = [
        Reason(
            count=len({member.key for member in members}),
            lines=len(members),
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
        message = printable(reason.example.message)
        if reason.status == LEFT_OUT:
            message = f"{reason.lines:,} {reason.error}: {message}"
        shown = message if len(message) <= _MESSAGE else f"{message[: _MESSAGE - 3]}..."
        key = printable(reason.example.key)
        rows.append((f"{reason.count:,}", reason.status, reason.step, shown, key))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    return "\n".join(
        "  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]])
        for row in rows
    )


def printable(text: str) -> str:
    """A file name or a message in one line: as it is, or quoted if it has line breaks and the like."""
    return text if text.isprintable() else repr(text)
