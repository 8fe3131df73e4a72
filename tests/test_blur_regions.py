"""Regions that a person names are redacted too."""

import json
from pathlib import Path

import pytest
from blurring import (
    assert_done,
    assert_told,
    audit,
    blur,
    decoded,
    files,
    sha256,
    work_of,
)
from PIL import Image
from test_cli import assert_refused, sa_engine

# Regions that a person names


def with_boxes(tmp_path: Path, content: object) -> tuple[str, Path]:
    """The option, with a file of this content."""
    file = tmp_path / "boxes.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return "--boxes", file


def test_regions_that_a_person_names_are_redacted(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    turned = portrait.crop((0, 0, 128, 100)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pair / "turned.png", exif=exif)
    boxes = {"people/astronaut.png": [[-5, 100, 20.5, 140]], "turned.png": [[90, 80, 120, 100]]}
    out = tmp_path / "out"
    assert_done(blur(pair, out, *with_boxes(tmp_path, boxes), "--redaction", "solid"))
    lines = audit(work_of(out))
    for key, box in (
        ("people/astronaut.png", [0, 100, 21, 128]),
        ("turned.png", [90, 80, 120, 100]),
    ):
        region = lines[key]["regions"][0]
        assert (region["kind"], region["detector"], region["score"]) == ("manual", "manual", None)
        assert region["box"] == box
        assert region["detected"] == [float(side) for side in boxes[key][0]]
        assert lines[key]["counts"]["manual"] == 1
        x0, y0, x1, y1 = box
        assert (decoded(out / key)[y0:y1, x0:x1] == 0).all()
    assert lines["coffee.jpg"]["counts"]["manual"] == 0
    info = json.loads((work_of(out) / "run.json").read_bytes())
    digest = sha256((tmp_path / "boxes.json").read_bytes())
    assert info["identity"]["extra_boxes"] == f"sha256 {digest}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"nobody.jpg": [[0, 0, 9, 9]]}, "there is no nobody.jpg among"),
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ({"coffee.jpg": [0, 0, 9, 9]}, "coffee.jpg has [0, 0, 9, 9]"),
        ({"coffee.jpg": [[0, 0, 9]]}, "coffee.jpg has [[0, 0, 9]]"),
        ({"coffee.jpg": [[9, 0, 0, 9]]}, "coffee.jpg has [[9, 0, 0, 9]]"),
        ({"coffee.jpg": [[0, 0, "9", 9]]}, "coffee.jpg has"),
        ({"coffee.jpg": [[0, 0, float("nan"), 9]]}, "coffee.jpg has"),
        ({"coffee.jpg": [[0, 0, float("inf"), 9]]}, "coffee.jpg has"),
        ({"./coffee.jpg": [[0, 0, 50, 50]]}, "coffee.jpg"),
        ({"people": [[0, 0, 50, 50]]}, "people"),
        ({"ABSOLUTE": [[0, 0, 50, 50]]}, "coffee.jpg"),
        ('{"coffee.jpg": [[0, 0, 9, 9]], "coffee.jpg": [[50, 50, 90, 90]]}', "coffee.jpg"),
        ({"x" * 300: [[0, 0, 9, 9]]}, "there is no xxx"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_of_regions_that_would_redact_nothing_is_refused(
    pair: Path, tmp_path: Path, content: object, message: str
) -> None:
    if content == {"ABSOLUTE": [[0, 0, 50, 50]]}:
        content = {str(pair / "coffee.jpg"): [[0, 0, 50, 50]]}
    option = with_boxes(tmp_path, content)
    assert_refused(blur(pair, tmp_path / "out", *option), f"boxes {option[1]}", message)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "boxes.json"}


def test_a_file_of_regions_that_is_not_there_is_told(pair: Path, tmp_path: Path) -> None:
    result = blur(pair, tmp_path / "out", "--boxes", tmp_path / "none.json")
    assert_refused(result, f"boxes {tmp_path / 'none.json'}: cannot be read: No such file")


@pytest.mark.parametrize(
    "box",
    [
        [150, 0, 170, 9],
        [0, -20, 20, -1],
        [151, 0, 152, 9],
    ],
)
def test_a_region_outside_of_its_photo_costs_that_photo(
    pair: Path, tmp_path: Path, box: list[float]
) -> None:
    assert Image.open(pair / "coffee.jpg").size == (150, 100)
    out = tmp_path / "out"
    result = blur(pair, out, *with_boxes(tmp_path, {"coffee.jpg": [[0, 0, 20, 20], box]}))
    assert_told(result, 3, "1 of 2 images failed")
    assert set(files(out)) == {"people/astronaut.png"}
    told = json.loads(sa_engine("errors", out, "--json").stdout)
    assert told["key"] == "coffee.jpg"


def test_a_resume_with_other_regions_is_refused(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out, "--limit", 1))
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_refused(blur(pair, out, *option), "boxes was None and is now")
    assert set(files(out)) == {"coffee.jpg"}


def test_a_resume_without_its_regions_is_refused(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_done(blur(pair, out, *option, "--limit", 1))
    assert_refused(blur(pair, out), "boxes was")


def test_a_finished_run_refuses_more_regions(pair: Path, tmp_path: Path) -> None:
    """Somebody looks at what was released, finds a face that was missed, and names its region."""
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_refused(blur(pair, out, *option), "boxes was None and is now")
