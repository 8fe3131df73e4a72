"""`verify` on sound runs, and on files whose hashes show the damage."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
import pytest
from damage import (
    FAILURES,
    FIRST,
    FORMATS,
    LAST,
    SECOND,
    check,
    data_files,
    edit_members,
    edit_record,
    edit_rows,
    finished,
    flip,
    only_file,
    seal,
)

from sa_engine.reader import iter_records
from sa_engine.records import ARROW_SCHEMA
from sa_engine.remote import RemotePath
from sa_engine.storage import RunError, RunPaths, sha256_file
from sa_engine.verify import verify


@pytest.fixture
def out(photo_folder: Path, tmp_path: Path) -> Path:
    return finished(photo_folder, tmp_path / "out")


# Runs that are as they should be


@pytest.mark.parametrize("formats", FORMATS)
@pytest.mark.parametrize("write_images", [True, False])
def test_a_sound_run_has_no_problem(
    photo_folder: Path, tmp_path: Path, formats: str, write_images: bool
) -> None:
    out = finished(photo_folder, tmp_path / "out", formats, write_images=write_images)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    found = check(out)
    assert found.problems == ()
    assert (found.out, found.shards, found.committed, found.images) == (out, 3, 3, 3)
    assert found.masks == sum(len(record.masks) for record in iter_records(out)) > 3
    assert str(found).splitlines() == [
        f"3 of 3 shards are finished; checked 3 images with {found.masks} masks",
        "no problem found",
        f"output: {out}",
    ]
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before


def test_hand_made_shards_are_sound_too(out: Path) -> None:
    """Otherwise what is found below could come from the way in which it was made."""
    for shard in (FIRST, SECOND, LAST):
        edit_rows(out, shard, lambda rows: None)
        edit_members(out, shard, lambda members: None)
    edit_record(out, lambda record: None)
    assert check(out).problems == ()


def test_a_shard_without_any_record_is_sound(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "broken.jpg").write_bytes(b"broken")
    out = finished(tmp_path / "photos", tmp_path / "out")
    found = check(out)
    assert found.problems == ()
    assert (found.committed, found.images, found.masks) == (1, 0, 0)
    with pq.ParquetWriter(out / f"{FIRST}.parquet", ARROW_SCHEMA.with_metadata({})):
        pass  # as many rows, of no schema version
    seal(out, FIRST)
    assert "RecordError: record schema version none" in str(check(out))


def test_an_unfinished_run_is_checked_as_far_as_it_is(photo_folder: Path, tmp_path: Path) -> None:
    out = finished(photo_folder, tmp_path / "out", limit=2)
    found = check(out)
    assert found.problems == ()
    assert (found.shards, found.committed, found.images) == (3, 1, 1)
    assert "shards not finished yet: 2" in str(found)
    (out / f"{FIRST}.json").unlink()
    for path in data_files(out):
        path.unlink()
    found = check(out)
    assert (found.problems, found.committed) == ((), 0)


def test_what_is_no_run_is_refused(out: Path, photo_folder: Path) -> None:
    with pytest.raises(RunError, match="not the output of a run"):
        verify(photo_folder)
    plan, info = RunPaths(out).plan, RunPaths(out).info
    plan.write_bytes(b"PAR1")
    with pytest.raises(RunError, match="cannot read the plan"):
        verify(out)
    plan.unlink()
    with pytest.raises(RunError, match="no run there"):
        verify(out)
    content = json.loads(info.read_bytes())
    del content["config"]["formats"]
    info.write_text(json.dumps(content))
    with pytest.raises(RunError, match="run.json: .* formats"):
        verify(out)


def test_all_processes_find_what_one_finds(out: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (out / f"{FIRST}.tar").unlink()
    flip(out / f"{LAST}.parquet", 100, 0)
    one, several = verify(out, workers=1), verify(out, workers=2, progress=True)
    assert one == several
    assert [problem.file for problem in one.problems] == [f"{FIRST}.tar", f"{LAST}.parquet"]
    lines = str(one).splitlines()
    assert lines[1] == f"{FIRST}.tar: is missing"
    assert lines[2].startswith(f"{LAST}.parquet: sha256 is ")
    assert lines[3] == "problems found: 2"
    assert "3/3" in capfd.readouterr().err


def test_a_run_in_a_bucket_is_checked_there(
    photo_folder: Path, tmp_path: Path, s3: Callable[[str], str]
) -> None:
    uri = s3(tmp_path.name)
    finished(photo_folder, uri)  # type: ignore[arg-type]
    place = RemotePath(uri)
    found = verify(place, workers=2)
    assert (found.problems, found.committed, found.images) == ((), 3, 3)
    data = bytearray((place / f"{SECOND}.tar").read_bytes())
    data[len(data) // 2] ^= 4
    (place / f"{SECOND}.tar").put(bytes(data))
    (place / f"{LAST}.parquet").unlink()
    assert [str(problem).partition(" ")[0] for problem in verify(place, workers=1).problems] == [
        f"{SECOND}.tar:",
        f"{LAST}.parquet:",
    ]


# Damage that the hashes show


@pytest.mark.parametrize("formats", FORMATS)
def test_one_flipped_bit_anywhere_is_found(
    photo_folder: Path, tmp_path: Path, formats: str
) -> None:
    out = finished(photo_folder, tmp_path / "out", formats)
    for path in data_files(out):
        size = path.stat().st_size
        chance = random.Random(path.name)
        places = [0, size // 2, size - 1, *(chance.randrange(size) for _ in range(12))]
        for place in places:
            before = flip(path, place, chance.randrange(8))
            found = check(out)
            assert only_file(found) == path.name, (place, found)
            assert "sha256 is" in str(found.problems[0])
            assert sha256_file(path) in found.problems[0].message
            path.write_bytes(before)
    assert check(out).problems == ()


def test_one_flipped_bit_in_a_marker_is_found(out: Path) -> None:
    """But for the digits of its seconds, which nothing else tells."""
    marker = out / f"{FIRST}.json"
    text = marker.read_text()
    seconds = range(text.index('"seconds"') + 11, text.index('"files"') - 3)
    chance = random.Random(1)
    for place in chance.sample([p for p in range(len(text)) if p not in seconds], 120):
        before = flip(marker, place, chance.randrange(8))
        problems = check(out).problems
        # A digit of a hash, a size or a count lays the blame on the file that it is of, too.
        assert problems, (place, text[place])
        assert all(FIRST in problem.file for problem in problems)
        marker.write_bytes(before)


def test_one_flipped_bit_in_the_failures_is_found(out: Path) -> None:
    errors = out / FAILURES
    chance = random.Random(2)
    for place in chance.sample(range(errors.stat().st_size), 60):
        before = flip(errors, place, chance.randrange(8))
        assert only_file(check(out)) == FAILURES, place
        errors.write_bytes(before)


@pytest.mark.parametrize("suffix", ["tar", "parquet"])
def test_truncated_missing_and_foreign_files_are_found(out: Path, suffix: str) -> None:
    path, other = out / f"{FIRST}.{suffix}", out / f"{LAST}.{suffix}"
    whole = path.read_bytes()
    for data in (whole[:-1], whole[:700], b"", whole + b"\0", other.read_bytes()):
        path.write_bytes(data)
        found = check(out)
        assert only_file(found) == path.name
        assert f"has {len(data)} bytes, its marker says {len(whole)}" in str(found)
    path.unlink()
    assert [str(problem) for problem in check(out).problems] == [f"{path.name}: is missing"]
    path.mkdir()
    assert "cannot be read: IsADirectoryError" in str(check(out))


def test_the_tars_of_two_shards_swapped_are_found(out: Path) -> None:
    """With their hashes and markers they are found by what they hold."""
    first, last = (out / f"{shard}.tar" for shard in (FIRST, LAST))
    shutil.move(first, out / "between")
    shutil.move(last, first)
    shutil.move(out / "between", last)
    assert {problem.file for problem in check(out).problems} == {first.name, last.name}
    for shard in (FIRST, LAST):
        seal(out, shard)
    found = check(out)
    assert {problem.file for problem in found.problems} == {first.name, last.name}
    assert "holds sa_5.jpg where sa_1.jpg is expected (2 in all, 2 expected)" in str(found)


# Processes


def workers_of(process: psutil.Process) -> list[psutil.Process]:
    return [child for child in process.children() if "spawn_main" in " ".join(child.cmdline())]


def block(out: Path) -> None:
    """Let whoever reads the first shard wait for ever."""
    (out / f"{FIRST}.parquet").unlink()
    os.mkfifo(out / f"{FIRST}.parquet")


def wait_until(condition: Callable[[], Any]) -> Any:
    deadline = time.monotonic() + 60
    while not (met := condition()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return met


def test_a_worker_that_is_killed_is_told(out: Path) -> None:
    block(out)
    this = psutil.Process()
    before = workers_of(this)
    with ThreadPoolExecutor(1) as thread:
        found = thread.submit(verify, out, workers=2)
        wait_until(lambda: [w for w in workers_of(this) if w not in before])[0].kill()
        with pytest.raises(RunError, match="2 processes was killed .* enough memory"):
            found.result(60)


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_worker_outlives_its_parent(out: Path, signum: int) -> None:
    block(out)
    code = f"from pathlib import Path; from sa_engine.verify import verify; verify(Path({str(out)!r}), 2)"
    parent = psutil.Popen([sys.executable, "-c", code])
    workers = wait_until(lambda: len(found := workers_of(parent)) == 2 and found)
    time.sleep(1)  # so that they are at work, most likely
    parent.send_signal(signum)
    assert parent.wait(60) == -signum
    try:
        wait_until(lambda: not any(is_alive(worker) for worker in workers))
    finally:
        for worker in filter(is_alive, workers):
            worker.kill()


def test_it_needs_neither_torch_nor_ray_nor_opencv() -> None:
    code = "import sys, sa_engine.verify; print({'torch', 'ray', 'cv2'} & set(sys.modules))"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def is_alive(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False
