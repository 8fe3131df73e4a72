"""A run's folder: what was decided when it was planned, and whether it may go on."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sa_engine import __version__
from sa_engine.config import RunConfig, identity_values, to_dict
from sa_engine.plan import (
    Shard,
    default_shard_size,
    list_images,
    make_shards,
    read_plan,
    write_plan,
)
from sa_engine.resources import Resources
from sa_engine.storage import RunError, RunPaths, atomic_write

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


@dataclass(frozen=True)
class PlannedRun:
    """A run's plan, and its `RunInfo` if the run has been started before."""

    shards: tuple[Shard, ...]
    shard_size: int
    ignored: dict[str, int]
    info: RunInfo | None

    def select(self, limit: int | None) -> tuple[Shard, ...]:
        """The first shards that together hold at least `limit` images; None: all."""
        chosen: list[Shard] = []
        images = 0
        for shard in self.shards:
            if limit is not None and images >= limit:
                break
            chosen.append(shard)
            images += len(shard.images)
        return tuple(chosen)


def images_folder(config: RunConfig) -> Path:
    """Absolute path of the images, links resolved, so that it can be compared."""
    return Path(config.images).resolve()


def open_run(paths: RunPaths, stage: str, config: RunConfig) -> PlannedRun | None:
    """Read the run that `paths.out` holds, or None if it holds none yet.

    Raises RunError if it holds something else, or a run of other options or images.
    """
    if not paths.info.exists():
        _check_empty(paths)
        return None
    info = RunInfo(**json.loads(paths.info.read_bytes()))
    given = {
        key: value
        for key, value in identity_values(config).items()
        if not (key in _DECIDED_ONCE and value is None)
    }
    check_same(
        paths,
        {"stage": info.stage, "images": info.config["images"], **info.identity},
        {"stage": stage, "images": str(images_folder(config)), **given},
    )
    return PlannedRun(read_plan(paths.plan), info.identity["shard_size"], info.ignored, info)


def plan_run(paths: RunPaths, config: RunConfig) -> PlannedRun:
    """Plan a new run from the images that are there now; writes nothing.

    Raises RunError if there is no image.
    """
    images, ignored = list_images(images_folder(config), exclude=paths.out)
    size = config.shard_size or default_shard_size(len(images))
    return PlannedRun(make_shards(images, size), size, ignored, None)


def start_run(
    paths: RunPaths,
    stage: str,
    config: RunConfig,
    planned: PlannedRun,
    resources: Resources,
    model: Mapping[str, str],
) -> None:
    """Write the plan and then `run.json`, which makes it binding."""
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
            "num_workers": resources.workers,
            "gpus_per_worker": resources.gpus,
        },
        identity=identity,
        model=dict(model),
        fingerprint=hashlib.sha256(canonical.encode()).hexdigest(),
        ignored=planned.ignored,
    )
    write_plan(paths.plan, planned.shards, paths.scratch)
    content = json.dumps(vars(info), indent=1) + "\n"
    atomic_write(paths.info, content.encode(), scratch=paths.scratch)


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
            "go on with the old value, or use another --out"
        )


def _check_empty(paths: RunPaths) -> None:
    if paths.out.exists() and not paths.out.is_dir():
        raise RunError(f"output {paths.out} is a file: --out takes a new or empty folder")
    others: Sequence[str] = []
    if paths.out.is_dir():
        others = sorted(path.name for path in paths.out.iterdir() if path != paths.run)
    if others:
        raise RunError(
            f"output {paths.out} holds {others[0]} ({len(others)} entries in all) but no run: "
            "--out takes a new or empty folder, or that of a run to go on with"
        )
