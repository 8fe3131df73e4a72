"""`sa-engine audit`: what became of each mask, and how much the two versions agree."""

import json
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner, Result
from ingesting import annotations, ingest
from lost_masks import masks
from PIL import Image
from test_format_coco import uncompressed

from sa_engine import rle
from sa_engine.agreement import compare
from sa_engine.cli import main
from sa_engine.images import decode_image
from sa_engine.pairing import pair_masks
from sa_engine.reader import iter_records
from sa_engine.records import MaskRecord


@pytest.fixture
def run(images: Path) -> Path:
    assert ingest(images, annotations()).exit_code == 0
    return images.parent / "out"


def audit(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["audit", *map(str, arguments)])


def mask_record(number: int, pixels: np.ndarray, original_id: str | None = None) -> MaskRecord:
    return MaskRecord(
        id=number,
        segmentation=rle.encode(pixels),
        area=int(pixels.sum()),
        bbox=[0.0, 0.0, 1.0, 1.0],
        predicted_iou=None,
        stability_score=None,
        point_coords=None,
        crop_box=None,
        original_id=original_id,
    )


def corrected(run: Path, change: object) -> Path:
    """The sample, corrected by `change(annotations)`, as a run."""
    handed_out = run.parent / "sample"
    result = audit(run, "--sample=1", f"--out={handed_out}", "--format=coco-rle")
    assert result.exit_code == 0 and "1 images with 5 masks" in result.output, result.output
    file = handed_out / "annotations.json"
    content = json.loads(file.read_text())
    assert [image["file_name"] for image in content["images"]] in (["sa_1.jpg"], ["sa_2.jpg"])
    assert callable(change)
    change(content["annotations"])
    file.write_text(json.dumps(content))
    again = audit(run, "--sample=1", f"--out={handed_out}", "--format=coco-rle")
    assert again.exit_code == 0 and "complete, and left as it is" in again.output, again.output
    assert json.loads(file.read_text()) == content, "people work in it"
    out = run.parent / "corrected"
    command = [
        "ingest",
        f"--images={handed_out / 'images'}",
        f"--annotations={file}",
        f"--out={out}",
    ]
    result = CliRunner().invoke(main, [*command, "--local"])
    assert result.exit_code == 0, result.output
    return out


def test_every_mask_has_its_fate(run: Path) -> None:
    edited = masks()["hole"].copy()
    edited[2] = False  # a row of 9 of its 55 pixels
    added = np.zeros_like(edited)
    added[11, 0:2] = True

    def change(entries: list[dict[str, object]]) -> None:
        entries[0]["segmentation"] = uncompressed(edited)
        del entries[2]
        entries.append(
            {"id": 5, "image_id": entries[0]["image_id"], "segmentation": uncompressed(added)}
        )

    out = corrected(run, change)
    dest = run.parent / "audit"
    result = audit(run, out, f"--out={dest}")
    assert result.exit_code == 0, result.output
    assert "3 kept, 1 edited, 1 deleted, 1 added" in result.output
    iou = edited.sum() / masks()["hole"].sum()
    assert f"mean {(3 + iou) / 4:.3f}" in result.output
    assert "above 90%: 75.0%" in result.output and "above 75%: 100.0%" in result.output
    content = json.loads((dest / "audit.json").read_text())
    assert content["share_above"] == {"0.9": 0.75, "0.75": 1.0}
    assert [one["iou"] for one in content["each"] if one["fate"] == "edited"] == [
        pytest.approx(iou)
    ]
    assert decode_image((dest / "worst.jpg").read_bytes()).max() > 0
    assert json.loads(audit(run, out, "--json").stdout) == content


def test_an_id_pairs_masks_that_hardly_overlap() -> None:
    one, other = np.zeros((20, 20), bool), np.zeros((20, 20), bool)
    one[:10], other[9:] = True, True
    fates = [pair.fate for pair in pair_masks([mask_record(7, one)], [mask_record(1, other, "7")])]
    assert fates == ["edited"]
    fates = [pair.fate for pair in pair_masks([mask_record(7, one)], [mask_record(1, other)])]
    assert fates == ["deleted", "added"]


def test_without_ids_the_sum_of_ious_decides() -> None:
    """A greedy choice would give the first mask the second's partner."""
    strips = [np.zeros((1, 100), bool) for _ in range(4)]
    for strip, (low, high) in zip(strips, ((0, 80), (15, 95), (10, 90), (0, 60)), strict=True):
        strip[0, low:high] = True
    first, second, near, short = strips
    pairs = pair_masks(
        [mask_record(1, first), mask_record(2, second)],
        [mask_record(11, near), mask_record(12, short)],
    )
    assert [(pair.before.id, pair.after.id) for pair in pairs if pair.before and pair.after] == [
        (1, 12),
        (2, 11),
    ]
    assert pair_masks([], []) == []


def test_real_masks_agree_with_themselves(run: Path) -> None:
    found = compare(run, run)
    assert found.images == 2 and set(found.fates) == {"kept"}
    assert (found.ious == 1).all() and len(found.ious) == 5


def test_what_cannot_be_compared_is_told(run: Path, tmp_path: Path) -> None:
    assert audit(run).exit_code == 2
    assert audit(run, run, "--sample=3").exit_code == 2
    result = audit(run, "--sample=3", f"--out={tmp_path / 'x'}")
    assert result.exit_code == 2 and "has 1 finished images with masks" in result.stderr
    result = audit(run, tmp_path / "nothing")
    assert result.exit_code == 2 and result.stderr.startswith("Error: ")
    other = tmp_path / "others"
    (other / "photos").mkdir(parents=True)
    photo = Image.open(tmp_path / "photos" / "bild ä.png")
    photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(other / "photos" / "c.png")
    names = [{"id": 0, "file_name": "c.png", "width": 17, "height": 12}]
    assert ingest(other / "photos", annotations(images=names)).exit_code == 0
    result = audit(run, other / "out")
    assert result.exit_code == 2 and "no image of" in result.stderr
    assert {record.source_path for record in iter_records(other / "out")} == {"c.png"}
