"""Training processes: that several equal one, that they end together, and that none is left behind."""

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import training_work as work

from sa_engine.modeling.sam import DeviceError
from sa_engine.progress import Interrupted, StopSignal
from sa_engine.storage import RunError
from sa_engine.training.parallel import Outcome, WorkerLost, run_workers
from sa_engine.training.ray_train import run_on_ray

DRIVER = """
import sys
from pathlib import Path
import training_work
from sa_engine.errors import SaEngineError
from sa_engine.training.parallel import run_workers

if __name__ == "__main__":
    function, folder, workers = getattr(training_work, sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    try:
        run_workers(function, folder, num_workers=workers, threads=1)
    except SaEngineError as error:
        print(f"Error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
"""


@pytest.fixture(autouse=True)
def no_process_is_left() -> Any:
    yield
    assert multiprocessing.active_children() == []


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_workers(work.summed_gradients, num_workers=1, threads=1)


def check_equal(alone: dict[str, Any], together: dict[str, Any]) -> None:
    """Two workers did what one does, and hold the very same numbers."""
    for one, two in zip(alone["gradients"], together["gradients"], strict=True):
        np.testing.assert_allclose(two, one, rtol=0, atol=1e-6 * np.abs(one).max())
    assert together["counted"] == alone["counted"] == work.SAMPLES
    assert (alone["ranks"], together["ranks"]) == (0, 1)
    assert together["equal"] and together["threads"] == 1
    assert alone["main"] and together["main"], "the main worker's result is given"


def test_two_processes_sum_what_one_does(
    alone: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "2")  # which the threads that were asked for replace
    check_equal(alone, run_workers(work.summed_gradients, num_workers=2, threads=1))


def test_an_error_for_the_user_stays_one() -> None:
    """As itself, out of a worker whose peer waits for it in vain."""
    with pytest.raises(work.OwnError) as caught:
        run_workers(work.fail, "own", num_workers=2, threads=1)
    assert str(caught.value) == "photos/a.jpg is not there: put it back"
    assert caught.value.exit_code == 5 and caught.value.place == "a.jpg"


@pytest.mark.slow
def test_a_mistake_in_the_code_shows_the_workers_traceback() -> None:
    with pytest.raises(ZeroDivisionError, match="a mistake") as caught:
        run_workers(work.fail, "mistake", num_workers=2, threads=1)
    assert "in worker 1 of 2" in str(caught.value.__cause__)
    assert "training_work.py" in str(caught.value.__cause__)


@pytest.mark.slow
def test_a_killed_worker_is_named_not_its_peers_broken_connection() -> None:
    with pytest.raises(WorkerLost, match="worker 1 of 2 was killed by SIGKILL"):
        run_workers(work.fail, "killed", num_workers=2, threads=1)


def test_errors_survive_being_pickled() -> None:
    again = pickle.loads(pickle.dumps(Interrupted("stopped", signal.SIGTERM)))
    assert type(again) is Interrupted
    assert (str(again), again.exit_code) == ("stopped", 143)


def test_what_cannot_be_pickled_is_told_as_text() -> None:
    class Local(Exception):
        pass

    def fail() -> None:
        raise Local("here")

    told = Outcome.unpack(Outcome.of(fail).pack())
    with pytest.raises(RuntimeError, match="Local: here") as caught:
        told.get("worker 1")
    assert "in fail" in str(caught.value.__cause__)
    with pytest.raises(RuntimeError, match="pickle"):
        Outcome.unpack(Outcome(value=lambda: 0).pack()).get("worker 0")


def start(function: str, folder: Path, workers: int) -> subprocess.Popen[str]:
    """A driver of its own in its own session, whose workers are at work."""
    script = folder / "driver.py"
    script.write_text(DRIVER)
    driver = subprocess.Popen(
        [sys.executable, str(script), function, str(folder), str(workers)],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not all((folder / f"pid{rank}").exists() for rank in range(workers)):
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    return driver


def stop_when_at_work(sign: Path) -> None:
    """Send this process a SIGTERM as soon as there is a file."""

    def stop() -> None:
        while not sign.exists():
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=stop, daemon=True).start()


def left_after_a_while(pids: list[int]) -> list[int]:
    """Of some processes, those that are still there 20 s from now; at once if there is none."""
    deadline = time.monotonic() + 20
    while (left := list(filter(psutil.pid_exists, pids))) and time.monotonic() < deadline:
        time.sleep(0.02)
    return left


def descendants(driver: subprocess.Popen[str]) -> list[int]:
    return [child.pid for child in psutil.Process(driver.pid).children(recursive=True)]


@pytest.mark.parametrize("to", ["driver", pytest.param("all", marks=pytest.mark.slow)])
def test_a_signal_ends_all_at_the_same_step(tmp_path: Path, to: str) -> None:
    """SIGTERM to the driver alone, or SIGINT to all of them as Ctrl-C sends it."""
    driver = start("count_until_stopped", tmp_path, 2)
    pids = descendants(driver)
    assert len(pids) >= 2
    if to == "driver":
        driver.terminate()
    else:
        os.killpg(driver.pid, signal.SIGINT)
    _, stderr = driver.communicate(timeout=60)
    step = (tmp_path / "stopped0").read_text()
    assert (tmp_path / "stopped1").read_text() == step
    assert driver.returncode == (143 if to == "driver" else 130)
    assert stderr == f"Error: stopped at step {step}\n"
    assert left_after_a_while(pids) == []


def test_a_signal_to_this_process_is_seen_by_its_loop(tmp_path: Path) -> None:
    stop_when_at_work(tmp_path / "pid0")
    with pytest.raises(Interrupted, match="stopped at step") as caught:
        run_workers(work.count_until_stopped, tmp_path, num_workers=1, threads=1)
    assert caught.value.exit_code == 143


@pytest.mark.slow
def test_a_killed_driver_leaves_no_worker(tmp_path: Path) -> None:
    driver = start("hang", tmp_path, 2)
    pids = descendants(driver)
    assert len(pids) >= 2
    driver.kill()
    driver.communicate()
    assert left_after_a_while(pids) == []


@pytest.mark.slow
def test_a_second_signal_ends_what_does_not_end(tmp_path: Path) -> None:
    driver = start("hang", tmp_path, 2)
    pids = descendants(driver)
    driver.terminate()
    time.sleep(1)
    assert driver.poll() is None and all(map(psutil.pid_exists, pids))
    driver.terminate()
    _, stderr = driver.communicate(timeout=60)
    assert "StopSignal" in stderr
    assert left_after_a_while(pids) == []


def test_a_second_signal_ends_this_process_too() -> None:
    def twice(group: Any) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGTERM)
        pytest.fail("goes on")

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(StopSignal):
        run_workers(twice, num_workers=1, threads=1)
    assert signal.getsignal(signal.SIGTERM) is before


def test_gpus_that_are_not_there_are_told() -> None:
    with pytest.raises(DeviceError, match="device cuda is not available here"):
        run_workers(work.hang, num_workers=2, threads=1, device="cuda")


def test_ray_tells_of_gpus_that_are_not_there_at_once(ray_address: str) -> None:
    began = time.monotonic()
    with pytest.raises(RunError) as caught:
        run_on_ray(work.hang, num_workers=2, threads=1, device="cuda", gpus_per_worker=1)
    assert "2 workers with 1 CPU threads, 1 GPUs each do not fit" in str(caught.value)
    assert "2 CPUs and 0 GPUs" in str(caught.value)
    assert time.monotonic() - began < 5


@pytest.mark.slow
def test_ray_sums_what_one_process_does(alone: dict[str, Any], ray_address: str) -> None:
    check_equal(alone, run_on_ray(work.summed_gradients, num_workers=2, threads=1))


@pytest.mark.slow
def test_ray_gives_an_error_for_the_user_back(ray_address: str) -> None:
    with pytest.raises(work.OwnError, match="photos/a.jpg is not there"):
        run_on_ray(work.fail, "own", num_workers=2, threads=1)


@pytest.mark.slow
def test_ray_starts_lost_workers_anew(tmp_path: Path, ray_address: str) -> None:
    assert run_on_ray(work.die_once, tmp_path, num_workers=2, threads=1) == 6
    (tmp_path / "state").unlink()
    (tmp_path / "killed").unlink()
    with pytest.raises(WorkerLost, match=r"Ray lost worker .*max_failures = 0"):
        run_on_ray(work.die_once, tmp_path, num_workers=2, threads=1, max_failures=0)


@pytest.mark.slow
def test_a_signal_ends_all_on_ray_at_the_same_step(tmp_path: Path, ray_address: str) -> None:
    stop_when_at_work(tmp_path / "pid1")
    with pytest.raises(Interrupted, match="stopped at step") as caught:
        run_on_ray(work.count_until_stopped, tmp_path, num_workers=2, threads=1)
    assert caught.value.exit_code == 143
    assert (tmp_path / "stopped0").read_text() == (tmp_path / "stopped1").read_text()
