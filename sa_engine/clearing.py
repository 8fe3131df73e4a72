"""What may lie in a run's folder: whether a run may be planned there, or be removed, and removing it."""

import re
from pathlib import Path

from sa_engine.plan import read_plan
from sa_engine.storage import RunError, RunPaths, list_names, sweep
from sa_engine.tree import clear_tree, strangers

# What a run that is being planned, or was killed then, has already put into its own folder.
_BEFORE_A_RUN = ("lock", "heartbeat.json", "plan.parquet", "shards", "partial", "errors", "audit")
_OURS = re.compile(r"sa_\d{6,}\.(json|tar|parquet)|_run|holdout\.json")


def check_empty(paths: RunPaths) -> None:
    """Raise RunError if there is anything where a run is to be planned."""
    for flag, folder in (("--out", paths.out), ("--work", paths.work)):
        if isinstance(folder, Path) and folder.exists() and not folder.is_dir():
            raise RunError(f"output {folder} is a file: {flag} takes a new or empty folder")
    own = () if paths.work is not None else ("_run",)
    others = sorted(name for name in list_names(paths.out) if name not in own)
    if others:
        raise RunError(
            f"output {paths.out} holds {others[0]} ({len(others)} entries in all) but no run: "
            "--out takes a new or empty folder, or that of a run to go on with"
        )
    others = [] if paths.work is None else sorted(list_names(paths.work))
    others = [name for name in others if name not in _BEFORE_A_RUN]
    if paths.work is not None and paths.scratch.name in others and not list_names(paths.scratch):
        others.remove(paths.scratch.name)
    if others:
        raise RunError(
            f"--work {paths.work} holds {others[0]} but no run: it takes a new or empty folder"
        )


def check_clearable(paths: RunPaths) -> None:
    """Raise RunError if `paths.out` holds anything but a run."""
    if not paths.info.exists():
        check_empty(paths)
        return
    if paths.work is None:
        others = [name for name in list_names(paths.out) if not _OURS.fullmatch(name)]
    else:
        others = strangers(paths, read_plan(paths.plan).keys(), live=True)
    if others:
        raise RunError(
            f"output {paths.out} holds {sorted(others)[0]} beside its run: --overwrite removes "
            "runs only; move it away, or use another --out"
        )


def clear_run(paths: RunPaths) -> None:
    """Remove a run with all it has made, `run.json` and then the plan last: a kill leaves a run to
    remove, or a folder without one."""
    ours = [name for name in list_names(paths.shards) if _OURS.fullmatch(name) and name != "_run"]
    for name in sorted(ours, key=lambda name: (not name.endswith(".json"), name)):
        (paths.shards / name).unlink(missing_ok=True)
    if (
        paths.work is not None and paths.plan.exists()
    ):  # after the markers, which say that it is done
        clear_tree(paths, read_plan(paths.plan).keys())
    for folder in (paths.partial, paths.run / "errors", paths.run / "audit"):
        sweep(folder)
    for file in (paths.info, paths.plan):
        file.unlink(missing_ok=True)
