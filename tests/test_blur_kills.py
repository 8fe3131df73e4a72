"""The privacy stage killed, without space or permission: at no moment is there anything but whole redacted images."""

import os
import pkgutil
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from blurring import (
    QUICK,
    SCRATCH,
    assert_done,
    assert_told,
    audit_files,
    blur,
    files,
    verify,
    work_of,
)
from PIL import Image
from runs import FORKS
from small_stage import kill_at_replace
from test_cli import assert_refused, sa_engine

from sa_engine.cli import main

# The children of `FORKS` start from a process that has imported this module.
FORKS.set_forkserver_preload(["small_stage", "test_blur_kills"])


# Kills, full disks and other accidents


def in_child(words: list[str], fatal_replace: int = 0) -> None:
    """The command line in a process that may die before it puts a file in place."""
    kill_at_replace(fatal_replace)
    main(words)


def assert_of(expected: Mapping[str, bytes], out: Path) -> int:
    """Every image in a tree is one that was redacted, whole; give their number.

    A file that is being built may be the beginning of one.
    """
    whole = 0
    for folder, _, names in os.walk(out):
        for name in names:
            path = Path(folder) / name
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # renamed since
                continue
            key = path.relative_to(out).as_posix()
            if key.startswith(f"{SCRATCH}/"):
                assert any(image.startswith(content) for image in expected.values()), key
            else:
                assert content == expected[key], key
                whole += 1
    return whole


def end_with_its_children(child: Any) -> None:
    """Kill a process, and what it has started: a suspect image is tried in a process of its own."""
    alone = psutil.Process(child.pid).children() if child.is_alive() else []
    child.kill()
    child.join()
    for process in alone:
        process.kill()
        process.wait()


def test_a_run_killed_at_random_has_released_nothing_else_at_any_moment(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    """Every other kill comes between a file that is built and its rename."""
    images = tmp_path / "photos"
    for number in range(12):
        photo = Image.fromarray(photos[0 if number % 2 else 1 + number % 3]).reduce(4)
        path = images / f"{number % 3}" / f"{number:02}.{('png', 'jpg', 'tif')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((0, 0, photo.width, photo.height - number)).save(path)
    words = ["--set", "shard_size=2"]
    assert_done(blur(images, tmp_path / "expected", *words))
    expected = files(tmp_path / "expected")
    assert len(expected) == 12
    out = tmp_path / "out"
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK, *words]
    generator = random.Random(0)
    kills = 0
    while (before := assert_of(expected, out)) < 6:
        fatal = generator.randint(5, 8) if kills % 2 else 0
        enough = before + 1 + generator.randrange(2)
        child = FORKS.Process(target=in_child, args=(command, fatal))
        child.start()
        try:
            while child.is_alive() and (fatal or assert_of(expected, out) < enough):
                assert_of(expected, out)
                time.sleep(0.005)  # the cores are the child's
            time.sleep(generator.random() / 50)
        finally:
            end_with_its_children(child)
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert assert_of(expected, out) < 12
    assert_done(blur(images, out, *words))
    assert files(out) == expected
    assert not (out / SCRATCH).exists()
    assert audit_files(work_of(out)) == audit_files(tmp_path / "expected.run")
    assert_done(verify(out))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount; a limit of the size of files has a test of its own")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@dataclass(frozen=True)
class Undisturbed:
    """Photos, and what a run that nothing happened to has released of them."""

    images: Path
    released: Mapping[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Undisturbed:
    """Four photos of 30 to 60 kB, one of them in both an upper and a deeper folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    images = folder / "photos"
    (images / "deep").mkdir(parents=True)
    for number, photo in enumerate(photos):
        Image.fromarray(photo).reduce(4 - number % 2).save(images / "deep" / f"{number}.png")
    Image.fromarray(photos[0]).reduce(4).save(images / "0.jpg")
    assert_done(blur(images, folder / "out"))
    return Undisturbed(images, files(folder / "out"))


def test_a_full_disk_is_told_and_holds_whole_images_only(
    undisturbed: Undisturbed, disk: Path, tmp_path: Path
) -> None:
    images, expected = undisturbed.images, undisturbed.released
    out = disk / "out"
    words = ("--work", tmp_path / "work")
    told = blur(images, out, *words)
    assert_told(told, 1, str(out), "No space left", "run the same command")
    assert 0 < assert_of(expected, out) < len(expected)
    assert blur(images, out, *words).exit_code in (1, 2), "in the middle, or for lack of room"
    assert 0 < assert_of(expected, out) < len(expected)
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    assert_done(blur(images, out, *words))
    assert files(out) == expected
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["deep"]
    assert_done(verify(tmp_path / "work"))


def test_a_limit_of_the_size_of_files_is_told(undisturbed: Undisturbed, tmp_path: Path) -> None:
    images, expected = undisturbed.images, undisturbed.released
    out = tmp_path / "out"
    limit = max(map(len, expected.values())) - 1
    code = (
        "import resource, signal\n"
        "from sa_engine.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main()"
    )
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK]
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert "File too large" in ended.stderr
    assert 0 < assert_of(expected, out) < len(expected)
    assert_done(blur(images, out))
    assert files(out) == expected


def test_an_output_that_cannot_be_written_is_told(pair: Path, disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = ("--work", tmp_path / "work")
    for out, more in ((disk, ()), (disk / "out", words), (disk / "out", ())):
        refused = blur(pair, out, *more)
        assert_refused(refused, f"cannot write to the output {out}: ", "Read-only file system")
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_done(blur(pair, disk / "out", *words))
    assert set(files(disk / "out")) == set(files(pair))


def test_an_output_without_permission_is_told(pair: Path, tmp_path: Path) -> None:
    """For root, the permission to ignore permissions is taken away."""
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    command = [sys.executable, "-c", "from sa_engine.cli import main; main()"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to have no permission")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    command += ["blur", "--images", str(pair), "--out", str(out), *QUICK]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"Error: cannot write to the output {out}: Permission denied\n"


def test_an_image_with_a_long_name_is_released(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    name = f"{'x' * 226}.png"
    portrait.save(pair / name)
    assert_done(blur(pair, tmp_path / "out"))
    assert name in files(tmp_path / "out")


def dies(words: list[str], place: str, calls: int) -> None:
    """The command line in a process that dies in place of one call of a function."""
    module, _, name = place.partition(":")
    *outer, name = name.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(outer)}") if outer else sys.modules[module]
    function = getattr(owner, name)
    left = iter(range(calls))

    def or_die(*inputs: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*inputs)

    setattr(owner, name, or_die)
    main(words)


def die_at(place: str, calls: int, images: Path, out: Path, *words: str) -> None:
    """Run in a child that is killed in place of the `calls + 1`-th call of module:function."""
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK, *words]
    child = FORKS.Process(target=dies, args=(command, place, calls))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_an_image_that_fails_at_last_is_not_among_the_released(pair: Path, tmp_path: Path) -> None:
    """It was released, the run was killed before it noted that, and then the photo changed."""
    out = tmp_path / "out"
    die_at("sa_engine.partial:PartialShard.save", 0, pair, out)
    assert set(files(out)) == {"coffee.jpg"}
    (pair / "coffee.jpg").write_bytes(b"a draft")
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert "changed since the plan" in sa_engine("errors", out, "--list").stdout
    assert set(files(out)) == {"people/astronaut.png"}


def test_a_kill_after_the_last_shard_leaves_no_hidden_folder_for_good(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    die_at("sa_engine.tree:sweep", 1, pair, out)
    assert_done(blur(pair, out))
    assert sorted(path.name for path in out.iterdir()) == ["coffee.jpg", "people"]


def test_a_kill_while_a_run_is_removed_leaves_one_that_is_not_finished(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    expected = files(out)
    # Before its images go, and after.
    for place, left in (("clear_tree", expected), ("sweep", {})):
        die_at(f"sa_engine.clearing:{place}", 0, pair, out, "--overwrite")
        assert files(out) == left
        assert_done(blur(pair, out))  # as the command line itself advises, without --overwrite
        assert files(out) == expected


def test_a_kill_at_the_end_of_a_removal_leaves_a_run_to_remove(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    (work_of(out) / "run.json").unlink()  # the plan would have been next
    for path in (out / "coffee.jpg", out / "people" / "astronaut.png"):
        path.unlink()
    (out / "people").rmdir()
    assert_done(blur(pair, out, "--overwrite"))


def test_a_run_whose_output_was_removed_does_not_say_that_all_is_well(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    shutil.rmtree(out)
    assert_told(blur(pair, out), 2, f"{out} is gone, with the 2 images", "--overwrite")


def test_a_run_that_could_release_nothing_says_so_again(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in (pair / "coffee.jpg", pair / "people" / "astronaut.png"):
        path.write_bytes(b"no picture")
    for _ in range(2):
        assert_told(blur(pair, out), 3, "2 of 2 images failed")
        assert not out.exists()


def test_a_run_is_found_by_a_link_to_its_output(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert_done(blur(pair, tmp_path / "out"))
    assert_done(verify(tmp_path / "out"))


def test_the_report_says_what_was_left_out(pair: Path, tmp_path: Path) -> None:
    """A phone's HEIC photos are not in the output, and nobody would know."""
    for name in ("a.heic", "b.heic"):
        (pair / name).touch()
    result = blur(pair, tmp_path / "out")
    assert result.exit_code != 0 or "2 .heic" in result.output


def test_a_link_to_a_folder_does_not_take_its_place(pair: Path, tmp_path: Path) -> None:
    (pair / "all").symlink_to("people")
    assert_done(blur(pair, tmp_path / "out"))
    assert "people/astronaut.png" in files(tmp_path / "out")
