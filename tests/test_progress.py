import fcntl
import io
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

from sa_engine import progress
from sa_engine.partial import Finished, PartialShard
from sa_engine.storage import RunPaths


def read_all(descriptor: int) -> str:
    """All that is written to a terminal until its last user is gone."""
    text = b""
    try:
        while block := os.read(descriptor, 4096):
            text += block
    except OSError:
        pass
    return text.decode()


def test_a_terminal_shows_a_bar_over_all_images(photo_folder: Path, tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    script = Path(__file__).with_name("small_stage.py")
    command = [sys.executable, str(script), str(photo_folder), str(tmp_path / "out"), "local=true"]
    driver = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    shown = read_all(ours)
    os.close(ours)
    assert driver.wait() == 0, shown
    assert "0/4" in shown
    assert "| 4/4 [" in shown.splitlines()[-1].split("\r")[-1]


class Pipe(io.StringIO):
    """A stderr that is no terminal."""

    def wait_for(self, text: str) -> None:
        while text not in self.getvalue():
            time.sleep(0.001)


def finished(image_id: int) -> Finished:
    return Finished(image_id=image_id, counts={"masks": 1}, parts={"sa1b": b"{}"})


def test_elsewhere_lines_count_what_is_on_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_S", 0.01)
    monkeypatch.setattr(sys, "stderr", pipe := Pipe())
    told: list[dict[str, float]] = []
    paths = RunPaths(tmp_path)
    PartialShard(paths, "sa_000001").save(finished(1))
    PartialShard(paths, "sa_000009").save(finished(1))
    unfinished = {"sa_000001": 5, "sa_000002": 5}
    monkeypatch.setattr(progress, "_POLL_S", 0.01)
    with progress.Progress(paths, unfinished, 3, lambda **known: told.append(known)) as shown:
        pipe.wait_for("4 of 13 images, 0.00 images/s\n")
        shown.commit("sa_000002")
        pipe.wait_for("9 of 13 images, ")
        pipe.wait_for(" s left\n")
    assert "\r" not in pipe.getvalue()
    assert (told[0]["images_at_start"], told[-1]["images"], told[-1]["total"]) == (4, 9, 13)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (89, "89 s"), (90, "2 min"), (7200, "2.0 h"), (259_200, "3.0 days")],
)
def test_durations_are_said_as_a_person_would(seconds: float, text: str) -> None:
    assert progress.duration(seconds) == text
