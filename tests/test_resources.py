import os
import re
from pathlib import Path
from typing import Any

import pytest
from small_stage import SmallStage, run, small_config

from sa_engine import resources, runner
from sa_engine.config import AutoConfig
from sa_engine.option_groups import RunConfig
from sa_engine.ray_pool import cluster
from sa_engine.resources import (
    DiskSpace,
    Node,
    Resources,
    check_disk,
    local_resources,
    settle_resources,
    this_machine,
)
from sa_engine.storage import RunError, RunPaths

GB = 10**9


@pytest.mark.parametrize(
    ("nodes", "options", "threads", "settled"),
    [
        ([(2, 0)], {}, None, Resources(1, 2, 0)),
        ([(16, 0)], {}, None, Resources(4, 4, 0)),
        ([(16, 0)], {"num_workers": 3}, None, Resources(3, 5, 0)),
        ([(16, 0)], {}, 8, Resources(2, 8, 0)),
        ([(3, 0)] * 4, {}, None, Resources(4, 3, 0)),
        ([(0, 0), (16, 0), (2, 0)], {}, None, Resources(5, 3, 0)),
        ([(16, 2)], {"gpus_per_worker": 1.0}, None, Resources(2, 8, 1)),
        ([(16, 1)], {"gpus_per_worker": 0.25}, None, Resources(4, 4, 0.25)),
        ([(16, 2)], {}, None, Resources(4, 4, 0)),
    ],
)
def test_workers_and_threads_fill_the_nodes(
    nodes: list[tuple[int, float]],
    options: dict[str, Any],
    threads: int | None,
    settled: Resources,
) -> None:
    config = RunConfig(images="images", out="out", **options)
    assert settle_resources([Node(*node) for node in nodes], config, threads) == settled


@pytest.mark.parametrize(("device", "gpus"), [("auto", 1), ("cuda", 1), ("cpu", 0)])
def test_a_stage_with_a_model_takes_a_gpu_where_there_is_one(device: str, gpus: float) -> None:
    config = AutoConfig(images="images", out="out", device=device)
    assert settle_resources([Node(8, 2)], config, None) == Resources(2, 4, gpus)
    assert settle_resources([Node(8, 0)], config, None) == Resources(2, 4, 0)


@pytest.mark.parametrize(
    ("nodes", "options", "memory", "settled"),
    [
        ([(16, 0, 64)], {}, 10, Resources(4, 4, 0, None, 10 * GB)),
        ([(16, 0, 25)], {}, 10, Resources(2, 8, 0, None, 10 * GB)),
        ([(16, 0, 25), (16, 0, 9)], {}, 10, Resources(2, 8, 0, None, 10 * GB)),
        ([(16, 4, 25)], {"gpus_per_worker": 1.0}, 10, Resources(2, 8, 1, None, 10 * GB)),
        ([(4, 0, 64)], {"num_workers": 8, "cpus_per_worker": 0.5}, 1, Resources(8, 4, 0, 0.5, GB)),
    ],
)
def test_memory_and_shares_of_cpus_count(
    nodes: list[tuple[int, float, int]], options: dict[str, Any], memory: int, settled: Resources
) -> None:
    config = RunConfig(images="images", out="out", **options)
    machines = [Node(cpus, gpus, gb * GB) for cpus, gpus, gb in nodes]
    assert settle_resources(machines, config, None, memory * GB) == settled


def test_too_little_memory_is_told_with_the_numbers() -> None:
    config = RunConfig(images="images", out="out", num_workers=4)
    with pytest.raises(RunError) as caught:
        settle_resources([Node(16, 0, 25 * GB)], config, None, 10 * GB)
    message = str(caught.value)
    assert "4 workers with 1 CPU threads, 0 GPUs, 10.0 GB of memory each do not fit" in message
    assert "16 CPUs and 0 GPUs, 25.0 GB of memory on 1 nodes, room for 2" in message
    assert "memory_per_worker" in message
    with pytest.raises(RunError, match="do not fit: Ray has 0 CPUs .* on 0 nodes, room for 0"):
        settle_resources([], config, None)
    with pytest.raises(
        RunError, match="needs about 100000.0 GB of memory, and [0-9.]+ GB are free"
    ):
        local_resources(RunConfig(images="images", out="out"), None, 10**14)


def test_this_machine_has_what_the_system_says() -> None:
    node = this_machine()
    assert node.cpus == len(os.sched_getaffinity(0))
    total = int(re.search(r"MemTotal: +(\d+)", Path("/proc/meminfo").read_text())[1]) * 1024
    assert 0.02 * total < node.memory <= total


def test_a_run_that_needs_too_much_memory_does_not_start(
    photo_folder: Path, tmp_path: Path
) -> None:
    config = small_config(photo_folder, tmp_path / "out", memory_per_worker=10**6)
    for start in (lambda: run(config), lambda: runner.describe(SmallStage(), config)):
        with pytest.raises(RunError, match="needs about 1000000.0 GB"):
            start()
    assert not (tmp_path / "out").exists()


def test_a_disk_that_is_too_small_is_told_before_the_work(
    photo_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    with (photo_folder / "huge.jpg").open("wb") as file:
        file.truncate(min(20 * free, 15 * 2**40))  # it takes no room on the disk
    config = small_config(photo_folder, tmp_path / "out", max_failed=0.5)
    assert run(config).failed == 1, (
        "a photo is released at 300 kB at least, not at a seventh of this"
    )
    # What a plan of as many bytes in photos of usual sizes would need.
    monkeypatch.setattr(resources, "_LEAST_WRITTEN_CAP", 10**18)
    other = small_config(photo_folder, tmp_path / "other", max_failed=0.5)
    with pytest.raises(RunError, match="too small: at least [0-9.]+ GB to write, [0-9.]+ GB free"):
        run(other)
    assert not (tmp_path / "other").exists()
    masks_only = small_config(photo_folder, tmp_path / "masks", max_failed=0.5, write_images=False)
    assert run(masks_only).failed == 1
    assert run(config).processed == 0, "a finished run needs no room"


def test_only_too_little_room_is_refused(tmp_path: Path) -> None:
    check_disk(RunPaths(tmp_path), DiskSpace(5, 5))
    check_disk(RunPaths(tmp_path), None)
    with pytest.raises(RunError, match="at least 0.06 GB to write, 0.05 GB free"):
        check_disk(RunPaths(tmp_path), DiskSpace(6 * 10**7, 5 * 10**7))


def test_ray_is_told_to_send_no_usage_statistics(
    ray_address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ray._common.usage.usage_lib import usage_stats_enabled

    monkeypatch.delenv("RAY_USAGE_STATS_ENABLED")
    assert usage_stats_enabled()
    with cluster(RunConfig(images="images", out="out")):
        assert not usage_stats_enabled()
