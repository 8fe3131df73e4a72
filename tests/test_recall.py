"""`blur-eval`: the share of labelled boxes that is found and covered, by size."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from sa_engine.cli import main
from sa_engine.config import BlurConfig
from sa_engine.privacy.recall import Recall, TruthError, measure
from sa_engine.privacy.redactor import Redactor, load_redactor
from sa_engine.privacy.selftest import known_face

FACE = [180, 62, 90, 118]  # XYWH in the self-test's photo


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    return load_redactor(BlurConfig(images="-", out="-"), 2, "cpu")


@pytest.fixture
def truth(tmp_path: Path) -> Callable[..., Path]:
    """Writes labels beside the known face, at full and at a quarter of its size."""

    def write(boxes: dict[str, list[list[float]]], name: str = "face", **extra: Any) -> Path:
        images = tmp_path / "images"
        images.mkdir(exist_ok=True)
        photo = Image.fromarray(known_face()[0])
        photo.save(images / "large.png")
        photo.reduce(4).save(images / "small.png")
        ids = {file: number for number, file in enumerate(("large.png", "small.png"), 1)}
        labels = [
            {"id": 1, "image_id": ids[file], "bbox": box, "category_id": 1, **extra}
            for file, some in boxes.items()
            for box in some
        ]
        content = {
            "images": [{"id": number, "file_name": file} for file, number in ids.items()],
            "annotations": labels,
            "categories": [{"id": 1, "name": name}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(content))
        return tmp_path / "truth.json"

    return write


def test_boxes_count_in_the_band_of_their_height(
    redactor: Redactor, truth: Callable[..., Path]
) -> None:
    small = [side / 4 for side in FACE]
    elsewhere = [400.0, 300.0, 40.0, 40.0]
    found = measure(redactor, truth({"large.png": [FACE, elsewhere], "small.png": [small]}))
    assert found.kind == "face"
    assert found.images == 2
    assert [(b.low, b.boxes, b.found, b.covered) for b in found.bands] == [
        (24, 1, 1, 1),
        (32, 1, 0, 0),
        (64, 1, 1, 1),
    ]
    total = found.total
    assert (total.boxes, total.found, total.covered) == (3, 2, 2)
    assert 0.03 < found.redacted < 0.2
    assert [one["bbox"] for one in found.missed] == [elsewhere]
    assert "missed: large.png at [400.0, 300.0, 40.0, 40.0], 0.0% covered" in str(found)
    assert "66.7%" in str(found)


def test_a_box_is_found_by_a_detector_of_its_kind_and_covered_by_any(
    redactor: Redactor, truth: Callable[..., Path]
) -> None:
    found = measure(redactor, truth({"large.png": [FACE]}, "licence plate"))
    assert found.kind == "plate"
    assert (found.total.found, found.total.covered) == (0, 1)


def test_labels_to_be_ignored_are_left_out(redactor: Redactor, truth: Callable[..., Path]) -> None:
    for flag in ("iscrowd", "ignore"):
        assert measure(redactor, truth({"large.png": [FACE]}, **{flag: 1})).bands == ()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("{", "not COCO"),
        ("[]", "not COCO"),
        ('{"images": []}', "annotations"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [1, 2, 3, 4]}]}', "KeyError: 3"),
        ('{"images": [], "annotations": [{"image_id": 3, "bbox": [1, 2]}]}', "not COCO"),
        ('{"images": [], "annotations": []}', "give --kind"),
    ],
)
def test_bad_labels_are_told(redactor: Redactor, tmp_path: Path, content: str, reason: str) -> None:
    file = tmp_path / "truth.json"
    file.write_text(content)
    with pytest.raises(TruthError, match=reason):
        measure(redactor, file)
    with pytest.raises(TruthError, match="cannot be read"):
        measure(redactor, tmp_path / "none.json")


def test_a_photo_that_is_not_there_is_told(
    redactor: Redactor, truth: Callable[..., Path], tmp_path: Path
) -> None:
    file = truth({"large.png": [FACE]})
    (tmp_path / "images" / "small.png").write_bytes(b"no picture")
    with pytest.raises(TruthError, match=r"small\.png: not an image"):
        measure(redactor, file)
    (tmp_path / "images" / "small.png").unlink()
    with pytest.raises(TruthError, match=r"small\.png cannot be read.*--images"):
        measure(redactor, file)


def test_the_command_prints_the_table_or_json(truth: Callable[..., Path], tmp_path: Path) -> None:
    command = ["blur-eval", "--truth", str(truth({"large.png": [FACE]}))]
    table = CliRunner().invoke(main, command)
    assert table.exit_code == 0
    assert table.output.splitlines()[0].split() == [
        "faces",
        "high",
        "boxes",
        "IoU",
        "0.5",
        "covered",
    ]
    assert "64-127 px       1     100.0%     100.0%" in table.output
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).output)
    assert told["total"] == {"low": 0, "high": None, "boxes": 1, "found": 1, "covered": 1}
    # A threshold that finds nothing is refused by the self-test, before any figure.
    refused = CliRunner().invoke(main, [*command, "--set", "face_threshold=1"])
    assert refused.exit_code == 2
    assert "does not find the face of its self-test" in refused.output


def test_nothing_labelled_has_no_shares() -> None:
    empty = Recall(kind="face", images=0, bands=(), redacted=0.0, missed=())
    assert str(empty).splitlines()[1].split() == ["all", "0"]


def test_the_shared_group_photos_are_covered(redactor: Redactor, shared_data: Path) -> None:
    found = measure(redactor, shared_data / "faces/group_photos/annotations.json", kind="face")
    assert found.total.boxes == 43
    assert found.total.covered >= 42
    assert np.isclose(sum(band.boxes for band in found.bands), 43)
