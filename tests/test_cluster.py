"""A cluster of two Ray nodes on this machine: jobs, growth, lost workers and lost nodes."""

import os
import shlex
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from runs import data_files, errors, markers, start_driver, wait_for_marker
from small_stage import run, small_config

from sa_engine.storage import RunPaths

NODE = {"num_cpus": 1, "object_store_memory": 100 * 2**20}


def own_agent() -> dict[str, int]:
    """A port for a node's agent, which takes jobs: all nodes of a machine have the same by default."""
    with socket.socket() as free:
        free.bind(("", 0))
        return {"dashboard_agent_listen_port": free.getsockname()[1]}


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head node with one CPU and a job server."""
    from ray.cluster_utils import Cluster

    head = {**NODE, **own_agent(), "include_dashboard": True, "dashboard_port": 0}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    yield cluster
    cluster.shutdown()


@pytest.fixture
def expected(photo_folder: Path, tmp_path: Path) -> dict[str, str]:
    run(small_config(photo_folder, tmp_path / "expected", shard_size=1))
    return data_files(tmp_path / "expected")


def on(cluster: Any, *more: str) -> list[str]:
    """Options of a slow run on the cluster, of four shards."""
    return [f"ray_address={cluster.address}", "shard_size=1", "seconds=0.5", *more]


def test_a_job_is_stopped_and_resumed(
    cluster: Any, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """As `ray job submit` and `ray job stop` do it; the job finds its cluster by itself."""
    from ray.job_submission import JobStatus, JobSubmissionClient

    out = tmp_path / "out"
    client = JobSubmissionClient(f"http://{cluster.head_node.webui_url}")
    script = Path(__file__).with_name("small_stage.py")
    words = [sys.executable, str(script), str(photo_folder), str(out), "shard_size=1"]

    def submit(*more: str) -> str:
        env = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
        while True:
            try:
                return client.submit_job(entrypoint=shlex.join([*words, *more]), runtime_env=env)
            except RuntimeError as error:  # the head's agent starts a little after the head
                assert "No available agent" in str(error)
                time.sleep(0.5)

    def wait(job: str) -> JobStatus:
        while not client.get_job_status(job).is_terminal():
            time.sleep(0.1)
        return client.get_job_status(job)

    job = submit("seconds=1")
    while not list(out.glob("sa_*.json")):
        assert not client.get_job_status(job).is_terminal(), client.get_job_logs(job)
        time.sleep(0.05)
    client.stop_job(job)
    assert wait(job) == JobStatus.STOPPED
    assert 1 <= len(markers(out)) < 4
    job = submit()
    assert wait(job) == JobStatus.SUCCEEDED, client.get_job_logs(job)
    assert '"ok": 4' in client.get_job_logs(job)
    assert data_files(out) == expected


def test_what_does_not_fit_is_told_at_once_or_waited_for(
    cluster: Any, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Two workers on one CPU; then a second node comes."""
    out = tmp_path / "out"
    two = on(cluster, "num_workers=2")
    driver = start_driver(photo_folder, out, *two)
    _, stderr = driver.communicate()
    assert driver.returncode == 2
    assert "2 workers with 1 CPU threads" in stderr
    assert "Ray has 1 CPUs and 0 GPUs" in stderr and "room for 1" in stderr
    assert "--wait-for-resources" in stderr
    assert not out.exists()
    driver = start_driver(photo_folder, out, *two, "wait_for_resources=120")
    while not RunPaths(out).lock.exists():
        time.sleep(0.05)
    time.sleep(3)
    assert driver.poll() is None and not RunPaths(out).info.exists(), "it waits"
    node = cluster.add_node(**NODE, **own_agent())
    _, stderr = driver.communicate()
    cluster.remove_node(node)
    assert driver.returncode == 0, stderr
    assert data_files(out) == expected


def test_a_node_that_is_lost_costs_nothing(
    cluster: Any, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    """Its worker's shard is redone on the other; what the run says stays readable."""
    node = cluster.add_node(**NODE, **own_agent())
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *on(cluster, "num_workers=2", "seconds=2"))
    while len(list(RunPaths(out).partial.glob("*/inflight.json"))) < 2:
        assert driver.poll() is None, driver.communicate()
        time.sleep(0.02)
    cluster.remove_node(node, allow_graceful=False)
    stdout, stderr = driver.communicate()
    assert driver.returncode == 0, stderr
    assert '"ok": 4' in stdout
    assert errors(out) == []
    assert data_files(out) == expected


def test_a_worker_that_is_killed_costs_nothing(
    cluster: Any, photo_folder: Path, tmp_path: Path, expected: dict[str, str]
) -> None:
    out = tmp_path / "out"
    driver = start_driver(photo_folder, out, *on(cluster))
    wait_for_marker(out, driver)
    for pid in workers_of(cluster):
        os.kill(pid, signal.SIGKILL)
    _, stderr = driver.communicate()
    assert driver.returncode == 0, stderr
    assert "Traceback" not in stderr and "\r" not in stderr
    assert errors(out) == []
    assert data_files(out) == expected


def workers_of(cluster: Any) -> list[int]:
    """Ray's worker processes that run our actors, below this cluster's raylets."""
    raylets = [
        psutil.Process(info.process.pid)
        for node in cluster.list_all_nodes()
        for info in node.all_processes["raylet"]
    ]
    children = [child for raylet in raylets for child in raylet.children(recursive=True)]
    found = [child.pid for child in children if "MapBatches" in " ".join(child.cmdline())]
    assert found
    return found


def test_a_cluster_that_is_not_there_is_named(photo_folder: Path, tmp_path: Path) -> None:
    driver = start_driver(photo_folder, tmp_path / "out", "ray_address=127.0.0.1:9")
    _, stderr = driver.communicate(timeout=60)
    assert driver.returncode == 2
    assert stderr.startswith("Error: cannot reach Ray at 127.0.0.1:9: Connection refused")
    assert not (tmp_path / "out").exists()
