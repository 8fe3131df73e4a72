"""A run whose workers are Ray's."""

import signal
from pathlib import Path
from typing import Any

import pytest
from runs import KEYS, data_files, errors, markers, start_driver, wait_for_marker
from small_stage import (
    SmallConfig,
    SmallStage,
    run,
    small_config,
)

from sa_engine import runner
from sa_engine.reader import iter_records
from sa_engine.storage import RunError

# Ray


def on_ray(images: Path, out: Path, **options: Any) -> SmallConfig:
    return small_config(images, out, local=False, **options)


def slowly_on(ray_address: str) -> list[str]:
    """Options of a run whose second shard is still at work when the first is committed."""
    return [f"ray_address={ray_address}", "num_workers=1", "seconds=0.5"]


@pytest.mark.parametrize("workers", [1, 2, 4])
def test_the_same_bytes_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str], workers: int
) -> None:
    cpus = 2 / workers  # four workers share the two CPUs
    report = run(on_ray(photo_folder, tmp_path / "out", num_workers=workers, cpus_per_worker=cpus))
    assert (report.ok, report.processed) == (4, 4)
    assert data_files(tmp_path / "out") == expected


def test_a_poison_image_costs_itself_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    report = run(
        on_ray(photo_folder, out, num_workers=2, kill="chelsea.jpg:process", max_failed=0.25)
    )
    assert (report.ok, report.failed) == (3, 1)
    assert [(row["key"], row["error"]) for row in errors(out)] == [("chelsea.jpg", "WorkerDied")]
    assert [record.source_path for record in iter_records(out)] == [
        key for key in KEYS if key != "chelsea.jpg"
    ]


def test_a_driver_killed_on_ray_is_resumed_at_once(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *slowly_on(ray_address))
    wait_for_marker(out, driver)
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert run(small_config(photo_folder, out)).failed == 0  # while Ray's workers may still live
    assert data_files(out) == expected


def test_a_signal_stops_a_run_on_ray(
    ray_address: str, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *slowly_on(ray_address))
    wait_for_marker(out, driver)
    driver.terminate()
    _, stderr = driver.communicate()
    assert driver.returncode == 143
    assert "1 of 2 shards done; resume with: small_stage.py" in stderr
    assert "Traceback" not in stderr
    assert "\r" not in stderr
    assert run(small_config(photo_folder, out)).ok == 4
    assert data_files(out) == expected


def test_too_few_resources_are_told_with_the_numbers(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    with pytest.raises(RunError, match="8 workers with 1 CPU threads.*Ray has 2 CPUs.*room for 2"):
        run(on_ray(photo_folder, tmp_path / "out", num_workers=8))
    with pytest.raises(RunError, match="1 workers .* 1 GPUs.* each .* 2 CPUs and 0 GPUs"):
        run(on_ray(photo_folder, tmp_path / "out", gpus_per_worker=1.0))
    assert not (tmp_path / "out").exists()


def test_an_error_of_a_worker_is_told_without_a_traceback(
    ray_address: str, photo_folder: Path, tmp_path: Path
) -> None:
    class Unloadable(SmallStage):
        def make_worker(self, config: SmallConfig) -> Any:
            raise RunError("the weights are gone")

    config = on_ray(photo_folder, tmp_path / "out")
    with pytest.raises(RunError, match="^the weights are gone$"):
        runner.run(Unloadable(), config, dict)
    assert markers(tmp_path / "out") == []
