"""Runs of the small stage: started, looked at, and planned only."""

import json
import multiprocessing
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from small_stage import (
    SmallConfig,
)

from sa_engine.resources import Resources
from sa_engine.run_dir import plan_run, start_run
from sa_engine.shards import ShardStats
from sa_engine.storage import AnyPath, RunPaths, list_names, sha256_file

KEYS = ["astronaut.jpg", "chelsea.jpg", "coffee.jpg", "more/rocket.jpg"]
# Children start from a process that has imported everything, so a hundred of them take seconds.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["small_stage"])


def data_files(out: AnyPath) -> dict[str, str]:
    """Sha256 of every tar and Parquet file."""
    names = sorted(name for name in list_names(out) if name.endswith((".tar", ".parquet")))
    return {name: sha256_file(out / name) for name in names}


def errors(out: Path) -> list[dict[str, Any]]:
    files = sorted(RunPaths(out).errors("x").parent.glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def files_of_run(out: Path) -> list[str]:
    """Names of the files beside the shards."""
    return sorted(path.name for path in (out / "_run").rglob("*") if path.is_file())


def markers(out: Path) -> list[ShardStats]:
    return [ShardStats.from_json(path.read_bytes()) for path in sorted(out.glob("sa_*.json"))]


def in_child(target: Any, *inputs: Any) -> int:
    """Call a function in a child process; return its exit code, -9 if it was killed."""
    child = FORKS.Process(target=target, args=inputs)
    child.start()
    child.join()
    assert child.exitcode is not None
    return child.exitcode


def start_driver(images: Path, out: Path, *sets: str) -> subprocess.Popen[str]:
    """Start the small stage's own command line."""
    script = Path(__file__).with_name("small_stage.py")
    return subprocess.Popen(
        [sys.executable, str(script), str(images), str(out), *sets],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for_marker(out: Path, driver: subprocess.Popen[str]) -> None:
    while not list(out.glob("sa_*.json")):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.01)


def plan(config: SmallConfig) -> RunPaths:
    """Start a run up to its plan."""
    paths = RunPaths(Path(config.out))
    start_run(
        paths,
        "small",
        config,
        plan_run(paths, config),
        Resources(1, 1, 0),
        {"model_fingerprint": "a"},
    )
    return paths
