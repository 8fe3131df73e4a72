"""What annotators are handed: the tools' own code finds every mask in it, on pictures that nothing turns."""

import json
import os
import subprocess
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from ingesting import annotations
from PIL import Image
from pycocotools import mask as coco
from test_prefill import CUP, SPOON, prefill, write
from test_returns import COFFEE_IN_CUP, LOOSE, hand_out, take_back

from sa_engine.reader import iter_records
from sa_engine.records import MaskRecord

HERE = Path(__file__).parent
TOOLS = Path(os.environ.get("SA_ENGINE_TOOLS", HERE.parent / ".venv-tools" / "bin" / "python"))
needs_tools = pytest.mark.skipif(
    not TOOLS.exists(), reason="`make test-tools` sets up the annotation tools, which are not here"
)
FORMATS = ("cvat", "label-studio", "labelme")


@pytest.fixture(scope="module")
def drawn_by_the_model(tmp_path_factory: pytest.TempPathFactory, photo_files: list[Path]) -> Path:
    """A prefilled run of a photo with three masks, and of one that its EXIF turns, with one mask."""
    folder = tmp_path_factory.mktemp("model")
    (folder / "photos").mkdir()
    coffee = Image.open(photo_files[1]).convert("RGB")
    coffee.save(folder / "photos" / "coffee.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    exif[0x010F] = "a camera"
    turned = coffee.resize((450, 300)).rotate(90, expand=True)
    turned.save(folder / "photos" / "turned.jpg", quality=95, exif=exif)
    boxes = write(folder / "boxes.json", {"coffee.png": [[*CUP, 0.9], [*SPOON, 0.8], [*COFFEE_IN_CUP, 0.7]],
                                          "turned.jpg": [[side * 0.75 for side in CUP]]})  # fmt: skip
    result = prefill(folder / "photos", boxes, folder / "run", *LOOSE)
    assert result.exit_code == 0, result.output
    records = list(iter_records(folder / "run"))
    assert [len(record.masks) for record in records] == [3, 1]
    assert all(mask.prefill_id == mask.id for record in records for mask in record.masks)
    return folder / "run"


@pytest.fixture
def easily_lost(images: Path, tmp_path: Path) -> Path:
    """A semi-automatic run with masks of a hole, two parts, one pixel, at the border and of the whole image."""
    assert prefill(images, write(tmp_path / "boxes.json", {}), tmp_path / "run").exit_code == 0
    write(images / "export.json", annotations())
    result = take_back(tmp_path / "run", images, "export.json", tmp_path / "masks")
    assert result.exit_code == 0, result.output
    return tmp_path / "masks"


@pytest.fixture(params=["drawn_by_the_model", "easily_lost"])
def run(request: pytest.FixtureRequest) -> Path:
    found = request.getfixturevalue(request.param)
    assert isinstance(found, Path)
    return found


def masks(run: Path) -> dict[tuple[str, str], MaskRecord]:
    """By the name of their picture and their id."""
    found = {
        (Path(record.file_name).stem, str(mask.id)): mask
        for record in iter_records(run)
        for mask in record.masks
    }
    assert len(found) in (4, 5) and {mask.source for mask in found.values()} == {"semi-automatic"}
    return found


@needs_tools
@pytest.mark.parametrize("name", FORMATS)
def test_the_tool_reads_every_pixel(run: Path, tmp_path: Path, name: str) -> None:
    dest = hand_out(run, tmp_path / "handout", name)
    command = [str(TOOLS), str(HERE / "read_with_tools.py"), name, str(dest)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    found = {(one["image"], one["id"]): one for one in json.loads(done.stdout)}
    expected = masks(run)
    assert found.keys() == expected.keys()
    for key, mask in expected.items():
        assert found[key]["label"] == "object"
        rle = {"size": found[key]["size"], "counts": found[key]["counts"]}
        assert np.array_equal(coco.decode(rle), coco.decode(mask.segmentation)), key


def test_cvat_decodes_every_pixel(run: Path, tmp_path: Path) -> None:
    """With the code of CVAT's SDK, and the points that its server makes of a mask in XML."""
    sdk = pytest.importorskip("cvat_sdk.masks", reason="cvat-sdk needs Python 3.11")
    dest = hand_out(run, tmp_path / "handout", "cvat")
    expected = masks(run)
    found = 0
    for image in ElementTree.parse(dest / "annotations.xml").getroot().iter("image"):
        for entry in image.iter("mask"):
            left, top, width, height = (
                int(entry.attrib[side]) for side in ("left", "top", "width", "height")
            )
            points = [*map(int, entry.attrib["rle"].split(",")), left, top]
            points += [left + width - 1, top + height - 1]
            size = {f"image_{side}": int(image.attrib[side]) for side in ("width", "height")}
            (attribute,) = entry.findall("attribute")
            assert attribute.get("name") == "sa_mask_id" and entry.get("label") == "object"
            mask = expected[Path(image.attrib["name"]).stem, str(attribute.text)]
            pixels = sdk.decode_mask(points, **size)
            assert np.array_equal(pixels, coco.decode(mask.segmentation))
            assert points == sdk.encode_mask(pixels)
            found += 1
    assert found == len(expected)


def test_cvat_takes_the_labels(drawn_by_the_model: Path, tmp_path: Path) -> None:
    models = pytest.importorskip("cvat_sdk.models", reason="cvat-sdk needs Python 3.11")
    dest = hand_out(drawn_by_the_model, tmp_path / "handout", "cvat")
    (label,) = json.loads((dest / "labels.txt").read_text())
    (attribute,) = label.pop("attributes")
    kind = models.InputTypeEnum(attribute.pop("input_type"))
    request = models.PatchedLabelRequest(
        **label, attributes=[models.AttributeRequest(**attribute, input_type=kind)]
    )
    assert (request.name, request.attributes[0].name) == ("object", "sa_mask_id")


@pytest.mark.parametrize("name", FORMATS)
def test_pictures_are_upright_without_exif_and_carry_their_id(
    drawn_by_the_model: Path, tmp_path: Path, name: str, photos: list[np.ndarray]
) -> None:
    dest = hand_out(drawn_by_the_model, tmp_path / "handout", name)
    records = {record.file_name: record for record in iter_records(drawn_by_the_model)}
    pictures = {path.name: path for path in dest.rglob("*.jpg")}
    assert pictures.keys() == records.keys()
    for file_name, record in records.items():
        assert file_name == f"sa_{record.image_id}.jpg"
        assert b"Exif" not in pictures[file_name].read_bytes()
        with Image.open(pictures[file_name]) as picture:
            assert not picture.getexif()
            assert picture.size == (record.width, record.height)
            upright = Image.fromarray(photos[1]).resize(picture.size)
            assert np.abs(np.asarray(picture, int) - np.asarray(upright, int)).mean() < 10
