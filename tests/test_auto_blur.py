"""`auto --blur`: shards in which no face and no plate has ever been."""

import hashlib
import io
import json
import stat
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image

from sa_engine.cli import main
from sa_engine.config import BlurConfig
from sa_engine.privacy.redactor import load_redactor
from sa_engine.privacy.selftest import known_face, known_plate
from sa_engine.reader import iter_records

QUICK = ("--set=points_per_side=8", "--set=crop_n_layers=0", "--threads-per-worker=2")


def auto(images: Path, out: Path, *more: str, where: str = "--local") -> Result:
    arguments = ["auto", f"--images={images}", f"--out={out}", where, *QUICK, "--blur", *more]
    return CliRunner().invoke(main, arguments)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A face that is larger than the released size, and a plate."""
    folder = tmp_path_factory.mktemp("images")
    Image.fromarray(known_face()[0]).save(folder / "face.png")
    Image.fromarray(known_plate()[0]).save(folder / "plate.jpg", quality=95)
    return folder


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory, images: Path) -> Path:
    folder = tmp_path_factory.mktemp("out") / "shards"
    result = auto(images, folder, "--set=short_side=400", "--set=shard_size=2")
    assert result.exit_code == 0, result.output
    assert "1 faces, 0.5 per image\n1 plates, 0.5 per image\n" in result.output
    return folder


def released(out: Path) -> dict[str, bytes]:
    with tarfile.open(out / "sa_000000.tar") as tar:
        return {
            member.name: tar.extractfile(member).read()
            for member in tar
            if member.name.endswith("jpg")
        }


def test_released_images_have_neither_face_nor_plate(out: Path, images: Path) -> None:
    redactor = load_redactor(BlurConfig(images="-", out="-"), 2, "cpu")
    for name, photo in (("sa_1.jpg", "face.png"), ("sa_2.jpg", "plate.jpg")):
        original = Image.open(images / photo).convert("RGB")
        image = Image.open(io.BytesIO(released(out)[name]))
        assert redactor.find(np.array(original)), "so that the next line means something"
        assert min(image.size) == 400
        difference = np.abs(np.array(original.resize(image.size)).astype(int) - np.array(image))
        assert difference.max() > 100
        line = audit(out)[name]
        for region in redactor.find(np.array(image)):
            x, y = original.width / image.width, original.height / image.height
            (box,) = [known["box"] for known in line["regions"]]
            found = np.array(region.detected) * [x, y, x, y]
            # What is found in the redacted picture is the redaction.
            assert (found[:2] >= np.array(box[:2]) - 4).all()
            assert (found[2:] <= np.array(box[2:]) + 4).all()


def audit(out: Path) -> dict[str, dict]:
    path = out / "_run" / "audit" / "sa_000000.jsonl"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return {f"sa_{line['image_id']}.jpg": line for line in lines}


def test_the_audit_knows_the_photo_and_what_was_released(out: Path, images: Path) -> None:
    for name, line in audit(out).items():
        assert line["sha256_in"] == hashlib.sha256((images / line["key"]).read_bytes()).hexdigest()
        assert line["sha256_out"] == hashlib.sha256(released(out)[name]).hexdigest()
        assert [region["kind"] for region in line["regions"]] == [line["key"].split(".")[0]]
        # Boxes are pixels of the photo, whatever is released.
        assert (line["width"], line["height"]) == Image.open(images / line["key"]).size


def test_masks_of_a_redaction_are_flagged_and_others_are_not(out: Path) -> None:
    masks = [mask for record in iter_records(out) for mask in record.masks]
    flags = [mask.redacted for mask in masks]
    assert set(flags) == {True, False}
    lines = audit(out)
    for record in iter_records(out):
        line = lines[record.file_name]
        x0, y0, x1, y1 = np.array(line["regions"][0]["box"]) * (record.width / line["width"])
        for mask in record.masks:
            left, top, width, height = mask.bbox
            apart = left >= x1 or left + width < x0 or top >= y1 or top + height < y0
            if apart:
                assert not mask.redacted
            if mask.redacted:
                assert left >= x0 - 3 and left + width <= x1 + 3


def test_the_run_verifies_and_resumes_as_others_do(out: Path, images: Path) -> None:
    verified = CliRunner().invoke(main, ["verify", str(out)])
    assert verified.exit_code == 0, verified.output
    again = auto(images, out, "--set=short_side=400", "--set=shard_size=2")
    assert "nothing was left to do" in again.output
    other = auto(images, out, "--set=short_side=400", "--set=face_threshold=0.5")
    assert other.exit_code == 2
    assert "face_threshold was 0.35 and is now 0.5" in other.stderr


def test_a_region_of_ones_own_is_redacted_too(images: Path, tmp_path: Path) -> None:
    """And a photo whose region is not in it fails, with its reason."""
    boxes = tmp_path / "boxes.json"
    boxes.write_text(
        json.dumps({"plate.jpg": [[10, 10, 60, 60]], "face.png": [[900, 900, 950, 950]]})
    )
    result = auto(images, tmp_path / "out", f"--boxes={boxes}", "--set=shard_size=2")
    assert result.exit_code == 3
    (line,) = audit(tmp_path / "out").values()
    assert line["counts"] == {"faces": 0, "plates": 1, "manual": 1}
    listed = CliRunner().invoke(main, ["errors", "--list", str(tmp_path / "out")]).output
    assert "face.png" in listed and "lies outside of this photo" in listed
