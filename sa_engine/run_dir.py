"""A run's folder: what was decided when it was planned, and whether it may go on."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from sa_engine import __version__
from sa_engine.clearing import check_empty
from sa_engine.listing import list_images, size_and_mtime_ns
from sa_engine.option_groups import RunConfig
from sa_engine.options import identity_values, to_dict
from sa_engine.plan import (
    Plan,
    default_shard_size,
    make_plan,
    new_images,
    read_plan,
    refresh,
    shard_name,
    write_plan,
)
from sa_engine.reader import read_failures
from sa_engine.resources import Resources
from sa_engine.shards import read_markers
from sa_engine.storage import (
    AnyPath,
    RunError,
    RunPaths,
    atomic_write,
    location,
    work_beside,
)
from sa_engine.tree import check_apart

# Options whose default depends on the inputs or the machine: decided once, then kept.
_DECIDED_ONCE = ("shard_size", "threads_per_worker")


@dataclass(frozen=True, kw_only=True)
class RunInfo:
    """The content of `_run/run.json`: all that decides a run's bytes, and how it was started.

    Attributes:
        version: of sa-engine.
        stage: its name.
        config: all options, with defaults that depend on inputs or machine filled in.
        identity: of these, the options that decide the bytes.
        model: what else decides them (the model's fingerprint).
        fingerprint: sha256 of stage, identity and model.
        ignored: entries of the images folder that are not images, by suffix or reason.
    """

    version: str
    stage: str
    config: dict[str, Any]
    identity: dict[str, Any]
    model: dict[str, str]
    fingerprint: str
    ignored: dict[str, int]

    def write(self, paths: RunPaths) -> None:
        """Put it in its place."""
        content = json.dumps(vars(self), indent=1) + "\n"
        atomic_write(paths.info, content.encode(), scratch=paths.scratch)


@dataclass(frozen=True)
class PlannedRun:
    """A run's plan, and its `RunInfo` if the run has been started before.

    Attributes:
        plan: which image is in which shard.
        shard_size: images per shard.
        ignored: entries of the images folder that are not images, by suffix or reason.
        info: None if the run is new; then `content` is what its plan file will hold.
        added: images that this plan has more than the one on disk.
    """

    plan: Plan
    shard_size: int
    ignored: dict[str, int]
    info: RunInfo | None
    content: bytes | None = None
    added: int = 0


def run_paths(config: RunConfig) -> RunPaths:
    """Where a run's files are. Raises RunError if folders lie in one another that may not."""
    out, work = location(config.out), None
    if config.keeps_apart():
        own = config.own_folder()
        work = work_beside(out) if own is None else location(own)
    paths = RunPaths(out, work)
    check_apart(paths, images_folder(config))
    return paths


def planned_keys(config: RunConfig) -> list[str]:
    """Keys of a run's images: of its plan, or if there is none yet, of all that are there. Refuses a round."""
    paths = run_paths(config)
    if paths.info.exists():
        read_run(paths)
        return read_plan(paths.plan).keys()
    return list_images(images_folder(config), exclude=paths.out)[0].column("key").to_pylist()


def images_folder(config: RunConfig) -> AnyPath:
    """Where the images are; a local path absolute and with links resolved, to be compared."""
    return location(config.images)


def read_info(paths: RunPaths) -> RunInfo:
    """What a run was started with. Raises RunError if there is no run."""
    try:
        return RunInfo(**json.loads(paths.info.read_bytes()))
    except (FileNotFoundError, NotADirectoryError):
        raise RunError(
            f"{paths.out} is not the output of a run: there is no {paths.info}"
        ) from None
    except (ValueError, TypeError) as error:
        raise RunError(f"cannot read {paths.info}: {error}; use another --out") from None


def read_run(paths: RunPaths) -> RunInfo:
    """What a run over images was started with. Raises RunError if there is none; a round of training is none."""
    info = read_info(paths)
    if info.stage in ("retrain", "retrain detector"):
        raise RunError(
            f"{paths.out} is a round of `sa-engine {info.stage}`, and this command takes a run of shards: "
            "`sa-engine rounds` shows rounds"
        )
    return info


def open_run(paths: RunPaths, stage: str, config: RunConfig) -> PlannedRun | None:
    """Read the run that `paths.out` holds, or None if it holds none yet.

    Raises RunError if it holds something else, or a run of other options or images.
    """
    if not paths.info.exists():
        check_empty(paths)
        return None
    info = read_run(paths)
    given = {
        key: value
        for key, value in identity_values(config).items()
        if not (key in _DECIDED_ONCE and value is None)
    }
    before = {"stage": info.stage, "images": info.config["images"], **info.identity}
    now = {"stage": stage, "images": str(images_folder(config)), **given}
    if paths.work is not None and paths.work != work_beside(paths.out):
        before["out"], now["out"] = info.config["out"], str(paths.out)
    check_same(paths, before, now)
    plan = read_plan(paths.plan)
    if paths.work is not None and not paths.out.exists():
        _check_not_gone(paths, plan)
    return PlannedRun(plan, info.identity["shard_size"], info.ignored, info)


def plan_run(paths: RunPaths, config: RunConfig) -> PlannedRun:
    """Plan a new run from the images that are there now; writes nothing.

    Raises RunError if there is no image.
    """
    found, ignored = list_images(images_folder(config), exclude=paths.out)
    size = config.shard_size or default_shard_size(found.num_rows)
    content = make_plan(found, size)
    return PlannedRun(Plan(content), size, ignored, None, content)


def extend_plan(paths: RunPaths, config: RunConfig, planned: PlannedRun) -> PlannedRun:
    """The plan with the images that have come since, in shards of their own; writes nothing.

    No image of the old plan changes its id or its shard.
    """
    found, ignored = list_images(images_folder(config), exclude=paths.out)
    new = new_images(found, planned.plan)
    if not new.num_rows:
        return replace(planned, ignored=ignored)
    content = make_plan(new, planned.shard_size, before=planned.plan)
    return PlannedRun(
        Plan(content), planned.shard_size, ignored, planned.info, content, new.num_rows
    )


def start_run(
    paths: RunPaths,
    stage: str,
    config: RunConfig,
    planned: PlannedRun,
    resources: Resources,
    model: Mapping[str, str],
) -> None:
    """Write the plan and then `run.json`, which makes it binding.

    Raises RunError if there is something in the output by now.
    """
    check_empty(paths)
    decided = {"shard_size": planned.shard_size, "threads_per_worker": resources.threads}
    identity = {**identity_values(config), **decided}
    canonical = json.dumps([stage, identity, dict(model)], sort_keys=True)
    info = RunInfo(
        version=__version__,
        stage=stage,
        config={
            **to_dict(config),
            **decided,
            "images": str(images_folder(config)),
            "out": str(paths.out),
            **({} if paths.work is None else {"work": str(paths.work)}),
            "num_workers": resources.workers,
            "gpus_per_worker": resources.gpus,
        },
        identity=identity,
        model=dict(model),
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
        ignored=planned.ignored,
    )
    assert planned.content is not None, "a new run brings its plan"
    write_plan(paths.plan, planned.content, paths.scratch)
    info.write(paths)


def continue_run(paths: RunPaths, planned: PlannedRun) -> None:
    """Write what an extended plan has more than the one on disk."""
    assert planned.info is not None, "a run that goes on has been started"
    if planned.content is not None:
        write_plan(paths.plan, planned.content, paths.scratch)
        replace(planned.info, ignored=planned.ignored).write(paths)


def refresh_failed(
    paths: RunPaths, config: RunConfig, planned: PlannedRun, shards: Iterable[int]
) -> PlannedRun:
    """Plan the failed images of some committed shards as they are now, mended perhaps."""
    images = images_folder(config)
    now = {}
    for index in shards:
        failures = read_failures(paths, shard_name(index))
        failed = {f.image_id for f in failures if f.status == "failed"}
        for image in planned.plan[index].images:
            if image.image_id in failed:
                found = _look_at(images / image.key)
                if found != (image.size, image.mtime_ns):
                    now[image.image_id] = found
    if not now:
        return planned
    content = refresh(planned.plan, now)
    write_plan(paths.plan, content, paths.scratch)
    return replace(planned, plan=Plan(content), content=None)


def check_same(paths: RunPaths, before: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Raise RunError that names every key whose value differs from the run's, and both values."""
    different = [
        f"{key} was {before.get(key)!r} and is now {value!r}"
        for key, value in now.items()
        if before.get(key) != value
    ]
    if different:
        raise RunError(
            f"{paths.out} holds another run: {'; '.join(different)}; "
            "go on with the old value, use another --out, or start over with --overwrite"
        )


def is_other_checkpoint(info: RunInfo, config: RunConfig) -> bool:
    """Whether the model is called otherwise than when the run was started; it may be the same all the same."""
    return info.config.get("checkpoint") != to_dict(config).get("checkpoint")


def _look_at(path: AnyPath) -> tuple[int, int]:
    if not isinstance(path, Path):
        return path.size_and_mtime_ns()
    try:
        return size_and_mtime_ns(path.stat())
    except OSError:
        return -1, -1


def _check_not_gone(paths: RunPaths, plan: Plan) -> None:
    """Raise RunError if images were released into an output that is not there any more."""
    released = sum(stats.ok for stats in read_markers(paths, range(len(plan))).values())
    if released:
        raise RunError(
            f"output {paths.out} is gone, with the {released} images that the run in {paths.work} "
            "has released: put it back, or start over with --overwrite"
        )
