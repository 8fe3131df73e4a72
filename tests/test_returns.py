"""The loop of the semi-automatic stage: prefilled, handed out, worked on by a simulated annotator, and taken back."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco
from test_prefill import CUP, SPOON, prefill, write

from sa_engine.cli import main
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord

COFFEE_IN_CUP = [205.0, 92.0, 372.0, 194.0]
LOOSE = ("--set=pred_iou_thresh=0.5", "--set=stability_score_thresh=0.5")


@pytest.fixture(scope="module")
def prefilled(tmp_path_factory: pytest.TempPathFactory, photo_files: list[Path]) -> Path:
    """A photo with three masks, one with one, and one with none; each name and size once."""
    folder = tmp_path_factory.mktemp("prefilled")
    (folder / "photos").mkdir()
    coffee = Image.open(photo_files[1])
    coffee.save(folder / "photos" / "coffee.png")
    coffee.resize((450, 300)).save(folder / "photos" / "small.png")
    coffee.crop((0, 0, 300, 200)).save(folder / "photos" / "none.png")
    boxes = write(folder / "boxes.json", {"coffee.png": [[*CUP, 0.9], [*SPOON, 0.8], [*COFFEE_IN_CUP, 0.7]],
                                          "small.png": [[side * 0.75 for side in CUP]]})  # fmt: skip
    result = prefill(folder / "photos", boxes, folder / "run", *LOOSE)
    assert result.exit_code == 0, result.output
    assert sorted(len(record.masks) for record in iter_records(folder / "run")) == [0, 1, 3]
    return folder / "run"


def by_photo(out: Path) -> dict[str, ImageRecord]:
    return {str(record.source_path): record for record in iter_records(out)}


def hand_out(prefilled: Path, dest: Path, name: str) -> Path:
    command = [
        "export",
        str(prefilled),
        f"--format={name}",
        "--names=released",
        "--with-images",
        f"--out={dest}",
    ]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    return dest


def take_back(prefilled: Path, handed_out: Path, annotations: str, out: Path, *more: str) -> Result:
    pictures = handed_out / "images"
    pictures = pictures if pictures.exists() else handed_out
    command = ["ingest", f"--images={pictures}", f"--annotations={handed_out / annotations}",
               f"--prefill={prefilled}", f"--out={out}", "--local", *more]  # fmt: skip
    return CliRunner().invoke(main, command)


def fates(out: Path) -> dict[str, list[tuple[str | None, int | None]]]:
    return {
        name: [(mask.edit_status, mask.prefill_id) for mask in record.masks]
        for name, record in by_photo(out).items()
    }


def test_the_loop_comes_out_exactly_as_it_was_done(prefilled: Path, tmp_path: Path) -> None:
    shown = by_photo(prefilled)
    large, small, none = (shown[name] for name in ("coffee.png", "small.png", "none.png"))
    dest = hand_out(prefilled, tmp_path / "handout", "coco-rle")
    content = json.loads((dest / "annotations.json").read_text())
    deleted, edited, kept = (mask.id for mask in large.masks)
    entries = {entry["id"]: entry for entry in content["annotations"]}
    del entries[deleted]
    grown = coco.decode(entries[edited]["segmentation"])
    grown[:, -40:] = 1
    entries[edited]["segmentation"] = encode(grown)
    for number, record in ((9_000_001, large), (9_000_002, none)):
        corner = np.zeros((record.height, record.width), np.uint8)
        corner[:20, :30] = 1
        entries[number] = {"id": number, "image_id": record.image_id, "category_id": 1, "iscrowd": 0,
                           "segmentation": encode(corner)}  # fmt: skip
    content["annotations"] = list(entries.values())
    (dest / "annotations.json").write_text(json.dumps(content))
    result = take_back(prefilled, dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 0 and "1 prefilled masks left out" in result.output, result.output
    assert fates(tmp_path / "returned") == {
        large.file_name: [("edited", edited), ("kept", kept), ("added", None)],
        small.file_name: [("kept", small.masks[0].id)],
        none.file_name: [("added", None)],
    }
    masks = [mask for record in iter_records(tmp_path / "returned") for mask in record.masks]
    assert {mask.source for mask in masks} == {"semi-automatic"}
    before = coco.decode(next(mask.segmentation for mask in large.masks if mask.id == edited))
    iou = float((before & grown).sum() / (before | grown).sum())
    ious = [mask.edit_iou for mask in by_photo(tmp_path / "returned")[large.file_name].masks]
    assert ious == [pytest.approx(iou), 1.0, None] and iou < 1
    assert [mask.box_score for mask in by_photo(tmp_path / "returned")[large.file_name].masks] == [
        large.masks[1].box_score, large.masks[2].box_score, None]  # fmt: skip
    assert {mask.model_fingerprint for mask in masks} == {large.masks[0].model_fingerprint, None}
    told = CliRunner().invoke(main, ["errors", "--list", str(tmp_path / "returned")]).output
    assert f"the annotator deleted mask {deleted}" in told
    # More masks an image than before annotators added to them.
    assert len(masks) == 4 + 2 - 1
    report = CliRunner().invoke(main, ["report", str(tmp_path / "returned"), "--json"])
    (row,) = json.loads(report.output)["stages"]
    assert row["masks_per_image_prefilled"] == 4 / 3 and row["masks_per_image_added"] == 2 / 3
    assert (row["share_kept"], row["share_deleted"]) == (2 / 4, 1 / 4)
    assert row["seconds_per_added_mask_mean"] is None
    table = CliRunner().invoke(main, ["report", str(tmp_path / "returned")])
    assert "prefilled per image" in table.output and "50.0%    25.0%" in table.output
    agreed = CliRunner().invoke(main, ["audit", str(prefilled), str(tmp_path / "returned")]).output
    assert "masks: 2 kept, 1 edited, 1 deleted, 2 added" in agreed


def encode(pixels: np.ndarray) -> dict[str, Any]:
    found = coco.encode(np.asfortranarray(pixels))
    return {"size": found["size"], "counts": found["counts"].decode()}


def without_first_cvat(dest: Path) -> str:
    tree = ElementTree.parse(dest / "annotations.xml")
    (image,) = [one for one in tree.getroot().iter("image") if len(one.findall("mask")) == 3]
    image.remove(image.findall("mask")[0])
    tree.write(dest / "annotations.xml")
    return "annotations.xml"


def without_first_label_studio(dest: Path) -> str:
    """Predictions become annotations when an annotator submits them."""
    tasks = json.loads((dest / "tasks.json").read_text())
    assert not any(task["annotations"] for task in tasks), "nobody has looked at them yet"
    for task in tasks:
        results = [one for each in task.pop("predictions") for one in each["result"]]
        task["annotations"] = [{"result": results[1:] if len(results) == 3 else results}]
        task["file_upload"] = "d7600e5b-tasks.json"  # as it exports tasks that were imported
    (dest / "returned.json").write_text(json.dumps(tasks))
    return "returned.json"


def without_first_labelme(dest: Path) -> str:
    for file in dest.glob("*.json"):
        content = json.loads(file.read_text())
        if len(content["shapes"]) == 3:
            content["shapes"] = content["shapes"][1:]
            file.write_text(json.dumps(content))
    return "."


@pytest.mark.parametrize(
    ("name", "work"),
    [
        ("cvat", without_first_cvat),
        ("label-studio", without_first_label_studio),
        ("labelme", without_first_labelme),
    ],
)
def test_tools_files_come_back(
    prefilled: Path, tmp_path: Path, name: str, work: Callable[[Path], str]
) -> None:
    dest = hand_out(prefilled, tmp_path / "handout", name)
    result = take_back(prefilled, dest, work(dest), tmp_path / "returned")
    assert result.exit_code == 0 and "1 prefilled masks left out" in result.output, result.output
    large, small = (by_photo(prefilled)[photo] for photo in ("coffee.png", "small.png"))
    found = fates(tmp_path / "returned")
    assert sorted(found[large.file_name]) == [("kept", mask.id) for mask in large.masks[1:]]
    assert found[small.file_name] == [("kept", small.masks[0].id)]
    for out in (prefilled, tmp_path / "returned"):  # the image without a mask is of the same stage
        report = CliRunner().invoke(main, ["report", str(out), "--json"])
        (row,) = json.loads(report.output)["stages"]
        assert (row["source"], row["images"]) == ("semi-automatic", 3)


def test_an_image_that_was_not_prefilled_is_told(prefilled: Path, tmp_path: Path) -> None:
    dest = hand_out(prefilled, tmp_path / "handout", "coco-rle")
    content = json.loads((dest / "annotations.json").read_text())
    (image,) = [one for one in content["images"] if one["width"] == 450]
    picture = Image.open(dest / "images" / image["file_name"]).rotate(180)
    (dest / "images" / image["file_name"]).unlink()
    picture.save(dest / "images" / "other.jpg")
    image["file_name"] = "other.jpg"
    (dest / "annotations.json").write_text(json.dumps(content))
    result = take_back(prefilled, dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 3
    told = CliRunner().invoke(main, ["errors", "--list", str(tmp_path / "returned")]).output
    assert "--prefill names the run that was handed out" in told and "other.jpg" in told


def test_a_run_that_is_not_finished_or_none_is_refused(prefilled: Path, tmp_path: Path) -> None:
    dest = hand_out(prefilled, tmp_path / "handout", "coco-rle")
    result = take_back(tmp_path, dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 2 and "is not the output of a run" in result.stderr
    boxes = write(tmp_path / "boxes.json", {"coffee.png": [CUP]})
    part = prefill(prefilled.parent / "photos", boxes, tmp_path / "part", *LOOSE, "--limit=1")
    assert part.exit_code == 0, part.output
    result = take_back(tmp_path / "part", dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 2 and "2 of 3 shards of" in result.stderr, result.output
    assert not (tmp_path / "returned").exists()
    # Another prefill run is another run of ingest.
    assert take_back(prefilled, dest, "annotations.json", tmp_path / "returned").exit_code == 0
    full = prefill(prefilled.parent / "photos", boxes, tmp_path / "full", *LOOSE)
    assert full.exit_code == 0
    result = take_back(tmp_path / "full", dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 2 and "prefill was " in result.stderr


def test_masks_of_auto_may_be_handed_out_too(tmp_path: Path, photo_files: list[Path]) -> None:
    (tmp_path / "photos").mkdir()
    Image.open(photo_files[1]).save(tmp_path / "photos" / "coffee.png")
    command = ["auto", f"--images={tmp_path / 'photos'}", f"--out={tmp_path / 'run'}", "--local",
               "--set=points_per_side=4", "--set=crop_n_layers=0", *LOOSE]  # fmt: skip
    assert CliRunner().invoke(main, command).exit_code == 0
    (record,) = iter_records(tmp_path / "run")
    assert len(record.masks) > 1
    dest = hand_out(tmp_path / "run", tmp_path / "handout", "coco-rle")
    result = take_back(tmp_path / "run", dest, "annotations.json", tmp_path / "returned")
    assert result.exit_code == 0, result.output
    (found,) = fates(tmp_path / "returned").values()
    assert found == [("kept", mask.id) for mask in record.masks]
