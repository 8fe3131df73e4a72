"""How far a run is, told from its folder alone: nothing is asked of the run itself."""

from dataclasses import dataclass
from typing import Any

from sa_engine.lock import is_live, read_heartbeat, read_lock, silence
from sa_engine.partial import PartialShard, list_begun
from sa_engine.plan import read_plan, shard_name
from sa_engine.progress import duration
from sa_engine.report import add_counts, per_image
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths, find_run

_BAR = 30  # characters


@dataclass(frozen=True, kw_only=True)
class RunStatus:
    """How far a run is.

    Attributes:
        out: the run's folder.
        name: the folder by which commands find the run.
        stage: its name.
        state: "running", "finished", or "stopped" if it is neither.
        holder: host, pid and seconds since the last sign of life of the process that runs it.
        images, shards: in the plan.
        committed: shards that are done.
        ok, skipped, failed: images of those shards.
        counts: what was found in the ok images, such as {"masks": 120}.
        open_shards: that are begun and not done.
        ended: images of those that have ended, well or not.
        images_per_second: of the process that runs it, since it started; None if not known.
    """

    out: AnyPath
    name: AnyPath
    stage: str
    state: str
    holder: dict[str, Any]
    images: int
    shards: int
    committed: int
    ok: int
    skipped: int
    failed: int
    counts: dict[str, int]
    open_shards: int
    ended: int
    images_per_second: float | None

    @property
    def masks(self) -> int:
        """Number of masks."""
        return self.counts.get("masks", 0)

    @property
    def done(self) -> int:
        """Images that have ended, in all shards."""
        return self.ok + self.skipped + self.failed + self.ended

    @property
    def seconds_left(self) -> float | None:
        """At the present speed; None if that is not known."""
        if not self.images_per_second:
            return None
        return (self.images - self.done) / self.images_per_second

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        derived = {"done": self.done, "seconds_left": self.seconds_left}
        return {**vars(self), "out": str(self.out), "name": str(self.name), **derived}

    def __str__(self) -> str:
        """Give it to a person, with a bar."""
        share = self.done / self.images if self.images else 1.0
        filled = int(share * _BAR)
        bar = "#" * filled + "." * (_BAR - filled)
        begun = f", {self.ended} more in {self.open_shards} open shards" if self.open_shards else ""
        committed = self.ok + self.skipped + self.failed
        see = f"   (see: sa-engine errors {self.name})" if self.failed else ""
        return "\n".join(
            [
                f"{self.out}: {self.state}{self._by()}",
                f"[{bar}] {share:.1%} of {self.images:,} images",
                f"done     {committed:,} images in {self.committed:,} of {self.shards:,} shards{begun}",
                f"of them  {self.ok:,} ok, {self.skipped:,} skipped, {self.failed:,} failed{see}",
                *(f"{kind:8} {n:,}{per_image(n, self.ok)}" for kind, n in self.counts.items()),
                *self._speed(),
            ]
        )

    def _by(self) -> str:
        if not self.holder:
            return f" ({self.stage})"
        where = f"process {self.holder['pid']} on {self.holder['host']}"
        return f" ({self.stage}; {where}, last sign of life {self.holder['silent']:.0f} s ago)"

    def _speed(self) -> list[str]:
        if self.state != "running":
            return []
        if self.seconds_left is None:
            return ["speed    not known yet"]
        left = duration(self.seconds_left)
        return [f"speed    {self.images_per_second:.2f} images/s, about {left} left"]


def read_status(out: AnyPath) -> RunStatus:
    """How far the run in a folder is; writes nothing. Raises RunError if there is none."""
    paths = find_run(out)
    if not paths.info.exists() and is_live(paths):
        holder = _holder(paths)
        raise RunError(
            f"{out} is still being planned, by process {holder['pid']} on {holder['host']}: look "
            "again a little later"
        )
    info, plan = read_run(paths), read_plan(paths.plan)
    # Open shards first: one that is committed in between counts once, as committed.
    begun = {name: PartialShard(paths, name).ended() for name in list_begun(paths)}
    markers = list(read_markers(paths, range(len(plan))).values())
    names = {shard_name(index) for index in range(len(plan))} - {s.name for s in markers}
    still_open = [ended for name, ended in begun.items() if name in names]
    live = is_live(paths)
    state = "running" if live else "finished" if len(markers) == len(plan) else "stopped"
    return RunStatus(
        out=paths.out,
        name=paths.name,
        stage=info.stage,
        state=state,
        holder={**_holder(paths), "silent": silence(paths, probe=False)} if live else {},
        images=plan.images,
        shards=len(plan),
        committed=len(markers),
        ok=sum(stats.ok for stats in markers),
        skipped=sum(stats.skipped for stats in markers),
        failed=sum(stats.failed for stats in markers),
        counts=add_counts(markers),
        open_shards=len(still_open),
        ended=sum(len(ended) for ended in still_open),
        images_per_second=_speed(paths) if live else None,
    )


def _holder(paths: RunPaths) -> dict[str, Any]:
    lock = read_lock(paths)
    return {name: lock.get(name, "?") for name in ("host", "pid")}


def _speed(paths: RunPaths) -> float | None:
    """Images per second as the heartbeat tells it."""
    beat = read_heartbeat(paths)
    seconds = beat.get("updated", 0) - beat.get("since", beat.get("updated", 0))
    images = beat.get("images", 0) - beat.get("images_at_start", 0)
    return images / seconds if seconds > 0 and images > 0 else None
