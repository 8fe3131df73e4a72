"""The semi-automatic stage's first half end to end: real weights, real photos, real boxes, through the command line."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco

from sa_engine.boxes import BoxesError, read_boxes
from sa_engine.cli import main
from sa_engine.config import PrefillConfig
from sa_engine.images import decode_image
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor
from sa_engine.prefiller import PrefilledMask, Prefiller
from sa_engine.reader import iter_records

# Of the photo, 600x400: the cup with its saucer, and the spoon.
CUP, SPOON = [77.0, 19.0, 478.0, 394.0], [316.0, 66.0, 426.0, 326.0]


@pytest.fixture(scope="module")
def predictor() -> Predictor:
    return Predictor(load_sam(resolve("vit_t")))


@pytest.fixture(scope="module")
def coffee(photo_files: list[Path]) -> np.ndarray:
    return decode_image(photo_files[1].read_bytes())


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, coffee: np.ndarray) -> Path:
    folder = tmp_path_factory.mktemp("images")
    (folder / "more").mkdir()
    Image.fromarray(coffee).save(folder / "coffee.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    Image.fromarray(np.rot90(coffee)).save(folder / "more" / "turned.jpg", quality=95, exif=exif)
    Image.fromarray(coffee[:100]).save(folder / "empty.png")
    return folder


def write(file: Path, boxes: Any) -> Path:
    file.write_text(json.dumps(boxes))
    return file


def prefill(images: Path, boxes: Path, out: Path, *more: str) -> Result:
    arguments = ["prefill", f"--images={images}", f"--boxes={boxes}", f"--out={out}", "--local",
                 "--threads-per-worker=1", *more]  # fmt: skip
    return CliRunner().invoke(main, arguments)


def fill(
    predictor: Predictor, image: np.ndarray, boxes: Any, scores: Any, **options: Any
) -> list[PrefilledMask]:
    loose = {"pred_iou_thresh": 0.0, "stability_score_thresh": 0.0, **options}
    config = PrefillConfig(images="-", boxes="-", out="-", **loose)
    return Prefiller(predictor, config).prefill(image, np.array(boxes), np.array(scores))


def pixels(mask: PrefilledMask, image: np.ndarray) -> np.ndarray:
    return coco.decode(mask.segmentation(*image.shape[:2])).astype(bool)


def test_a_run_holds_a_mask_for_every_box(images: Path, tmp_path: Path) -> None:
    boxes = write(tmp_path / "boxes.json", {"coffee.png": [[*CUP, 0.9], [*SPOON, 0.6]],
                                            "more/turned.jpg": [CUP]})  # fmt: skip
    out = tmp_path / "out"
    result = prefill(
        images, boxes, out, "--set=pred_iou_thresh=0.7", "--set=stability_score_thresh=0.8"
    )
    assert result.exit_code == 0, result.output
    records = {record.source_path: record for record in iter_records(out)}
    assert {key: len(record.masks) for key, record in records.items()} == {
        "coffee.png": 2, "more/turned.jpg": 1, "empty.png": 0}  # fmt: skip
    masks = [mask for record in records.values() for mask in record.masks]
    assert {mask.source for mask in masks} == {"semi-automatic"}
    assert all(mask.prefill_id == mask.id and mask.point_coords is None for mask in masks)
    assert sorted(mask.box_score or 0 for mask in masks) == [0, 0.6, 0.9]
    # The same cup in the upright photo and in the one that its EXIF turns.
    cups = [
        coco.decode(max(records[key].masks, key=lambda mask: mask.area).segmentation)
        for key in ("coffee.png", "more/turned.jpg")
    ]
    assert cups[0].shape == cups[1].shape == (400, 600)
    assert (cups[0] & cups[1]).sum() / (cups[0] | cups[1]).sum() > 0.97
    again = prefill(
        images, boxes, out, "--set=pred_iou_thresh=0.7", "--set=stability_score_thresh=0.8"
    )
    assert again.exit_code == 0 and "nothing was left to do" in again.output
    verified = CliRunner().invoke(main, ["verify", str(out)])
    assert verified.exit_code == 0, verified.output
    other = write(tmp_path / "boxes.json", {"coffee.png": [CUP]})
    changed = prefill(
        images, other, out, "--set=pred_iou_thresh=0.7", "--set=stability_score_thresh=0.8"
    )
    assert changed.exit_code == 2 and "boxes was 'sha256 " in changed.stderr, changed.output


def test_boxes_follow_the_released_size(images: Path, tmp_path: Path) -> None:
    boxes = write(tmp_path / "boxes.json", {"coffee.png": [CUP]})
    shares = []
    for side in (400, 200):
        out = tmp_path / str(side)
        result = prefill(
            images, boxes, out, f"--set=short_side={side}", "--set=pred_iou_thresh=0.7"
        )
        assert result.exit_code == 0, result.output
        (record,) = [one for one in iter_records(out) if one.masks]
        assert (record.height, record.width) == (side, side * 3 // 2)
        x, y, width, height = record.masks[0].bbox
        assert np.allclose(np.array([x, y, x + width, y + height]) * 400 / side, CUP, atol=20)
        shares.append(record.masks[0].area / side**2)
    assert shares[0] == pytest.approx(shares[1], rel=0.04)


def test_it_is_the_predictors_mask(predictor: Predictor, coffee: np.ndarray) -> None:
    embedding, box = predictor.embed(coffee), np.array([CUP])
    (plain,) = fill(predictor, coffee, [CUP], [0.5], refine=False, min_mask_region_area=0)
    first = predictor.predict(embedding, boxes=box, multimask=False)
    assert np.array_equal(
        pixels(plain, coffee), predictor.upsample(first.logits, embedding)[0, 0] > 0
    )
    assert plain.predicted_iou == pytest.approx(float(first.iou))
    (refined,) = fill(predictor, coffee, [CUP], [0.5], min_mask_region_area=0)
    second = predictor.predict(embedding, boxes=box, masks=first.logits, multimask=False)
    assert np.array_equal(
        pixels(refined, coffee), predictor.upsample(second.logits, embedding)[0, 0] > 0
    )
    assert refined.predicted_iou == pytest.approx(float(second.iou)) != plain.predicted_iou


def test_boxes_of_low_score_or_beyond_the_number_are_no_prompts(
    predictor: Predictor, coffee: np.ndarray
) -> None:
    boxes, scores = [SPOON, CUP, [0.0, 0.0, 80.0, 80.0]], [0.3, 0.7, 0.1]
    found = fill(predictor, coffee, boxes, scores, box_score_thresh=0.3)
    assert sorted(one.box_score for one in found if one.box_score) == [0.3, 0.7]
    assert [one.box_score for one in fill(predictor, coffee, boxes, scores, max_boxes=1)] == [0.7]
    unknown = fill(predictor, coffee, boxes, [np.nan] * 3, box_score_thresh=0.9)
    assert {one.box_score for one in unknown} == {None} and len(unknown) >= 2
    assert fill(predictor, coffee, np.empty((0, 4)), []) == []


def test_doubtful_masks_and_duplicates_are_left_out(
    predictor: Predictor, coffee: np.ndarray
) -> None:
    moved = [side + 2 for side in CUP]
    twice = fill(predictor, coffee, [CUP, moved, SPOON], [0.9, 0.8, 0.7], box_nms_thresh=1.0)
    assert len(twice) == 3
    found = fill(predictor, coffee, [CUP, moved, SPOON], [0.9, 0.8, 0.7])
    assert len(found) == 2
    assert (
        found[0].predicted_iou >= found[1].predicted_iou == min(one.predicted_iou for one in twice)
    )
    limit = found[1].predicted_iou + 1e-4
    sure = fill(predictor, coffee, [CUP, moved, SPOON], [0.9, 0.8, 0.7], pred_iou_thresh=limit)
    assert [one.predicted_iou for one in sure] == [found[0].predicted_iou]
    stable = sorted(one.stability_score for one in twice)
    left = fill(predictor, coffee, [CUP, moved, SPOON], [0.9, 0.8, 0.7], box_nms_thresh=1.0,
                stability_score_thresh=stable[0] + 1e-6)  # fmt: skip
    assert len(left) == 2
    share = pixels(found[0], coffee).mean()
    assert not fill(predictor, coffee, [CUP], [0.9], max_mask_coverage=share / 2)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([], "holds a list"),
        ({"coffee.png": [[1, 2, 3]]}, "coffee.png has"),
        ({"coffee.png": [[5, 2, 3, 4]]}, "coffee.png has"),
        ({"coffee.png": [[1, 2, 3, 4, 1.5]]}, "score from 0 to 1"),
        ({"cofee.png": [[1, 2, 3, 4]]}, "there is no cofee.png among the images"),
    ],
)
def test_wrong_boxes_are_refused(images: Path, tmp_path: Path, content: Any, reason: str) -> None:
    boxes = write(tmp_path / "boxes.json", content)
    result = prefill(images, boxes, tmp_path / "out")
    assert result.exit_code == 2 and reason in result.stderr and str(boxes) in result.stderr
    assert not (tmp_path / "out").exists()


def test_a_box_outside_its_photo_fails_the_photo(images: Path, tmp_path: Path) -> None:
    boxes = write(tmp_path / "boxes.json", {"coffee.png": [CUP, [610, 10, 700, 90]]})
    result = prefill(images, boxes, tmp_path / "out")
    assert result.exit_code == 3 and "1 of 3 images failed" in result.stderr
    told = CliRunner().invoke(main, ["errors", str(tmp_path / "out"), "--list"])
    assert "a box lies outside the photo of 600x400 pixels: [610.0, " in told.output


def test_redaction_takes_no_scores(tmp_path: Path) -> None:
    boxes = write(tmp_path / "boxes.json", {"a.png": [[1, 2, 3, 4, 0.5]]})
    assert read_boxes(boxes, scored=True).of("a.png").tolist() == [[1, 2, 3, 4, 0.5]]
    with pytest.raises(BoxesError, match="left, top, right, bottom]"):
        read_boxes(boxes)


def test_ray_gives_the_same_bytes(images: Path, tmp_path: Path, ray_address: str) -> None:
    boxes = write(tmp_path / "boxes.json", {"coffee.png": [CUP], "more/turned.jpg": [CUP, SPOON]})
    sums = []
    for where in ("--local", "--num-workers=2"):
        out = tmp_path / where
        arguments = ["prefill", f"--images={images}", f"--boxes={boxes}", f"--out={out}", where,
                     "--threads-per-worker=1", "--set=pred_iou_thresh=0.7"]  # fmt: skip
        result = CliRunner().invoke(main, arguments)
        assert result.exit_code == 0, result.output
        files = sorted([*out.glob("*.tar"), *out.glob("*.parquet")])
        sums.append([hashlib.sha256(path.read_bytes()).hexdigest() for path in files])
    assert sums[0] == sums[1] and len(sums[0]) == 6
