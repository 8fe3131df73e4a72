"""Whether a run's finished shards are what their markers, its plan and they themselves say.

Whatever is wrong with a file becomes a `Problem`: no damage stops the checks of the other files.
What is checked of each shard is in `shard_checks.py`.
"""

import os
import re
import signal
import threading
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context, parent_process

from tqdm import tqdm

from sa_engine.checks import Problem, Tally
from sa_engine.lock import is_live
from sa_engine.plan import Plan, Shard, read_plan, shard_name
from sa_engine.resources import cores
from sa_engine.run_dir import read_run
from sa_engine.shard_checks import ShardTask, check_shard
from sa_engine.storage import AnyPath, RunError, RunPaths, find_run, list_names
from sa_engine.tree import strangers

__all__ = ["Problem", "Verification", "verify"]

_SHARD_FILE = re.compile(r"(sa_(\d{6,}))\.(json|tar|parquet)")
# Tasks that wait for each worker: all of a large run's would hold its whole plan in memory.
_AHEAD = 2


@dataclass(frozen=True, kw_only=True)
class Verification:
    """What `verify` has found.

    Attributes:
        out: the run's folder.
        shards: in the plan.
        committed: of these, shards with a marker; the others are not checked.
        images: records that were read and checked.
        masks: of these images; None if the run makes none.
        problems: in the order of the shards, then the plan's and those of files of no shard.
    """

    out: AnyPath
    shards: int
    committed: int
    images: int
    masks: int | None
    problems: tuple[Problem, ...]

    def __str__(self) -> str:
        """Say what was checked, every problem, and what is not done yet, a line each."""
        checked = f"{self.images} images" + f" with {self.masks} masks" * (self.masks is not None)
        missing = self.shards - self.committed
        return "\n".join(
            [
                f"{self.committed} of {self.shards} shards are finished; checked {checked}",
                *map(str, self.problems),
                f"problems found: {len(self.problems)}" if self.problems else "no problem found",
                *([f"shards not finished yet: {missing}; a resume does them"] * bool(missing)),
                f"output: {self.out}",
            ]
        )


def verify(out: AnyPath, workers: int | None = None, progress: bool = False) -> Verification:
    """Check a run's committed shards; changes nothing.

    Every byte of the shards' files is read and compared with the sha256 in the marker. Then records,
    masks and pictures are compared with the plan and with each other, which also finds what was
    wrong when it was hashed. Of the marker, which no hash covers, only `seconds` can change unnoticed.

    Args:
        out: the run's folder, finished or not.
        workers: processes; default: one for each core. A single one is this process.
        progress: show a bar of shards on stderr.

    Returns:
        The same for any number of workers.

    Raises:
        RunError: `out` holds no run, its plan is damaged, or a worker was killed.
    """
    paths = find_run(out)
    formats, pictures = _written(paths)
    # Before the plan: a live run that is extended writes the plan before new shards.
    files = {name for name in list_names(paths.shards) if _SHARD_FILE.fullmatch(name)}
    plan = read_plan(paths.plan)
    committed = _committed(files, len(plan))
    total, beside = Tally(), Tally()
    shards = _planned(paths, plan, committed, beside)
    tasks = (ShardTask(paths, shard, formats, pictures) for shard in shards)
    with tqdm(total=len(committed), unit="shard", disable=not progress, dynamic_ncols=True) as bar:
        for tally in _in_order(tasks, min(workers or cores(), len(committed))):
            total.merge(tally)
            bar.update()
    _check_strays(paths, files, len(plan), formats, beside)
    if paths.work is not None:
        for name in strangers(paths, plan.keys(), live=is_live(paths)):
            beside.add(name, "is none of this run's images")
    total.merge(beside)
    return Verification(
        out=paths.out,
        shards=len(plan),
        committed=total.shards,
        images=total.images,
        masks=total.masks if formats else None,
        problems=tuple(total.problems),
    )


def _written(paths: RunPaths) -> tuple[tuple[str, ...], bool]:
    """The formats of a run's shards, and whether its tars hold pictures."""
    config = read_run(paths).config
    try:
        if paths.work is not None:
            return (), False
        return tuple(config["formats"]), bool(config["write_images"])
    except (KeyError, TypeError):
        raise RunError(
            f"cannot read {paths.info}: there is no config with formats and write_images"
        ) from None


def _committed(files: set[str], shards: int) -> list[int]:
    """Indices of the planned shards that have a marker, in order."""
    matches = (_SHARD_FILE.fullmatch(name) for name in files if name.endswith(".json"))
    indices = {int(match[2]) for match in matches if match}
    return sorted(i for i in indices if i < shards and f"{shard_name(i)}.json" in files)


def _planned(paths: RunPaths, plan: Plan, indices: list[int], tally: Tally) -> Iterator[Shard]:
    """Some shards of the plan; that no image is in two of them makes their masks' ids unique."""
    before = 0
    for index in indices:
        shard = plan[index]
        ids = [before, *(image.image_id for image in shard.images)]
        if ids != sorted(set(ids)):
            message = f"{shard.name} has images {ids[1:]}, expected ascending ids above {before}"
            tally.add("_run/plan.parquet", message)
        before = max(ids)
        yield shard


def _in_order(tasks: Iterator[ShardTask], workers: int) -> Iterator[Tally]:
    """Check shards in this process or in several; what they give, in the order of the tasks."""
    if workers <= 1:
        yield from map(check_shard, tasks)
        return
    pool = ProcessPoolExecutor(
        workers,
        get_context("spawn"),  # pyarrow's threads do not survive a fork
        initializer=_end_with_parent,
    )
    with pool:
        try:
            waiting = deque(pool.submit(check_shard, t) for t in islice(tasks, workers * _AHEAD))
            while waiting:
                tally = waiting.popleft().result()
                waiting.extend(pool.submit(check_shard, task) for task in islice(tasks, 1))
                yield tally
        except BrokenProcessPool:
            raise RunError(
                f"one of {workers} processes was killed while it checked a shard: is there enough "
                "memory? Use fewer workers"
            ) from None
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _end_with_parent() -> None:
    """Let this worker end at once and in silence when its parent is interrupted or killed."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # from a terminal, Ctrl-C reaches both

    def watch() -> None:
        parent = parent_process()
        assert parent is not None, "a worker has a parent"
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _check_strays(
    paths: RunPaths, files: set[str], shards: int, formats: tuple[str, ...], tally: Tally
) -> None:
    """Report files at the top that look like a shard's and are none's.

    A live run puts a shard's files in place before its marker.
    """
    uncommitted = []
    for name in sorted(files):
        match = _SHARD_FILE.fullmatch(name)
        assert match is not None
        stem, number, suffix = match.groups()
        if int(number) >= shards or stem != shard_name(int(number)):
            tally.add(name, f"belongs to none of the plan's {shards} shards")
        elif suffix not in ("json", *formats):
            tally.add(name, f"is of no format of this run, which writes {', '.join(formats)}")
        elif f"{stem}.json" not in files:
            uncommitted.append(name)
    if not uncommitted:
        return
    with tally.reading("_run/lock"):
        if is_live(paths):
            return
    for name in uncommitted:
        tally.add(name, "has no marker: its shard is not finished; a resume will replace it")
