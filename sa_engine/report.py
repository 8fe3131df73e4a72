"""What a run would do, and what it has done."""

import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from sa_engine.errors import TooManyFailures
from sa_engine.partial import LEFT_OUT
from sa_engine.resources import DiskSpace, Resources
from sa_engine.shards import ShardStats
from sa_engine.storage import AnyPath, RunError, RunPaths


@dataclass(frozen=True, kw_only=True)
class PlanSummary:
    """What a run would do.

    Attributes:
        images: where they are.
        out: the run's folder.
        planned: images in the plan.
        added: of these, images that have come since the run was planned.
        chosen: of these, images within `limit`.
        shards: in the plan.
        committed: of these, shards that are done.
        retried: failed images that will be tried again.
        shard_size: images per shard.
        ignored: entries of the images folder that are not images, by suffix or reason.
        resources: of the workers.
        disk: what will be written at least, and what is free; None for a remote output.
    """

    images: AnyPath
    out: AnyPath
    planned: int
    added: int
    chosen: int
    shards: int
    committed: int
    retried: int
    shard_size: int
    ignored: dict[str, int]
    resources: Resources
    disk: DiskSpace | None

    def __str__(self) -> str:
        """Give one line for each thing a person wants to check before the start."""
        limit = f", of which --limit takes {self.chosen}" if self.chosen < self.planned else ""
        added = f", {self.added} of them new" if self.added else ""
        lines = [
            f"{self.planned} images in {self.images}{added}{limit}",
            f"left out: {say_ignored(self.ignored) or 'nothing'}",
            f"{self.shards} shards of up to {self.shard_size} images, {self.committed} done",
            *([f"{self.retried} failed images to try again"] if self.retried else []),
            str(self.resources),
            *([f"disk: {self.disk}"] if self.disk else []),
            f"output: {self.out}",
        ]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True)
class Report:
    """How a run ended; ok + skipped + failed = planned.

    Attributes:
        out: the run's folder.
        planned, ok, skipped, failed: numbers of images within `limit`, of all sessions of the run.
        counts: what was found in the ok images, such as {"masks": 120}.
        remaining: images of the plan beyond `limit`.
        processed: images that this session worked on.
        seconds: wall time of this session.
        ignored: entries of the images folder that are not images, by suffix or reason.
        name: the folder by which commands find the run.
    """

    out: AnyPath
    planned: int
    ok: int
    skipped: int
    failed: int
    counts: dict[str, int]
    remaining: int
    processed: int
    seconds: float
    ignored: dict[str, int] = field(default_factory=dict)
    name: AnyPath | None = None

    @property
    def masks(self) -> int:
        """Number of masks."""
        return self.counts.get("masks", 0)

    @property
    def images_per_second(self) -> float:
        """Throughput of this session; 0 if there was nothing to do."""
        return self.processed / self.seconds if self.processed else 0.0

    def __str__(self) -> str:
        """Give the numbers, the speed and the place of the output, a line each."""
        counts = f"{self.ok} ok, {self.skipped} skipped, {self.failed} failed"
        beyond = f" ({self.remaining} more are beyond --limit)" if self.remaining else ""
        speed = f"{self.processed} images in {self.seconds:.1f} s, {self.images_per_second:.2f}/s"
        return "\n".join(
            [
                f"{self.planned} images: {counts}{beyond}",
                *([f"left out: {say_ignored(self.ignored)}"] if self.ignored else []),
                *(f"{n:,} {kind}{per_image(n, self.ok)}" for kind, n in self.counts.items()),
                speed if self.processed else "nothing was left to do",
                f"output: {self.out}",
                *self._see(),
            ]
        )

    def _see(self) -> list[str]:
        """Where the reasons are of what is not there."""
        command = f"sa-engine errors {shlex.quote(str(self.name or self.out))}"
        if self.failed:
            return [f"reasons of failures: {command}"]
        if any(kind.endswith(LEFT_OUT) for kind in self.counts):
            return [f"what was left out: {command}"]
        return []


def add_counts(stats: Iterable[ShardStats]) -> dict[str, int]:
    """What was found in all images of some shards, by kind."""
    total: Counter[str] = Counter()
    for shard in stats:
        total.update(shard.counts)
    return dict(total)


def say_ignored(ignored: Mapping[str, int]) -> str:
    """What was left out, and how often."""
    return ", ".join(f"{count} {reason}" for reason, count in ignored.items())


def per_image(count: int, images: int) -> str:
    """So many in so many images, on average."""
    return f", {count / images:.1f} per image" if images else ""


def make_report(
    paths: RunPaths,
    stats: Iterable[ShardStats],
    *,
    planned: int,
    remaining: int,
    processed: int,
    seconds: float,
    ignored: dict[str, int],
) -> Report:
    """Add up the markers of a finished run; the other numbers are the report's own.

    Raises RunError if they do not add up to `planned`.
    """
    stats = list(stats)
    report = Report(
        out=paths.out,
        planned=planned,
        ok=sum(shard.ok for shard in stats),
        skipped=sum(shard.skipped for shard in stats),
        failed=sum(shard.failed for shard in stats),
        counts=add_counts(stats),
        remaining=remaining,
        processed=processed,
        seconds=seconds,
        ignored=ignored,
        name=paths.name,
    )
    if report.ok + report.skipped + report.failed != planned:
        raise RunError(f"the markers in {paths.out} count other images than the plan: {report}")
    return report


def check_failures(report: Report, max_failed: float) -> None:
    """Raise TooManyFailures if more than this share of the images failed."""
    if report.failed > max_failed * report.planned:
        raise TooManyFailures(
            f"{report.failed} of {report.planned} images failed, more than max_failed = "
            f"{max_failed:g} allows; {report.ok} images are finished in "
            f"{report.out}; sa-engine errors {shlex.quote(str(report.name or report.out))} says why the others are not"
        )
