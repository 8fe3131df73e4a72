"""Average recall of proposals: COCO's own numbers, what is ranked, paired and left out, and the command."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from scipy import ndimage
from small_stage import mask_record

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.evaluation.interactive import EvaluationError
from sa_engine.evaluation.proposals import (
    ALL,
    NOT_FOUND,
    Proposals,
    first_found,
    image_recall,
    overlaps,
    proposals_of,
)
from sa_engine.evaluation.recall import measure
from sa_engine.evaluation.results import SIZES
from sa_engine.pairing import ImageIndex, PairingError
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord, MaskRecord, image_name, mask_id

LIMITS = (10, 100, 1000)
# A mask of 1,024 pixels is small and medium to COCO, medium to us.
RANGES = [[0, 1e10], [0, 32**2 - 1], [32**2, 96**2 - 1], [96**2, 1e10]]


def image(number: int, masks: list[MaskRecord], **fields: Any) -> ImageRecord:
    height, width = masks[0].segmentation["size"] if masks else (200, 240)
    known = {"source_path": f"{number}.jpg", "sha256": f"{number:064}", **fields}
    return ImageRecord(image_id=number, width=width, height=height, file_name=image_name(number),
                       masks=tuple(masks), **known)  # fmt: skip


def scored(number: int, pixels: np.ndarray, score: float, stability: float) -> MaskRecord:
    record = mask_record(number, pixels)
    return dataclasses.replace(record, predicted_iou=score, stability_score=stability)


def ellipse(x: float, y: float, a: float, b: float) -> np.ndarray:
    rows, columns = np.indices((200, 240))
    return ((columns - x) / a) ** 2 + ((rows - y) / b) ** 2 <= 1


def ours(truth: list[ImageRecord], found: list[ImageRecord], kind: str) -> np.ndarray:
    """Average recall by size and limit: (4, 3), -1 where there is no mask."""
    recalls = [
        image_recall(one, proposals_of(other, kind), kind)
        for one, other in zip(truth, found, strict=True)
    ]
    rows = []
    for size in (ALL, *SIZES):
        count = sum(one.found[size].shape[1] for one in recalls)
        sums = sum(one.sums(size, LIMITS) for one in recalls)
        rows.append(sums / count if count else [-1] * len(LIMITS))
    return np.array(rows)


def cocos(truth: list[ImageRecord], found: list[ImageRecord], kind: str) -> np.ndarray:
    """The same by pycocotools."""
    data = COCO()
    annotations: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for number, (one, other) in enumerate(zip(truth, found, strict=True), 1):
        for mask in one.masks:
            box = coco.toBbox(mask.segmentation).tolist()
            annotations.append({"id": len(annotations) + 1, "image_id": number, "category_id": 1,
                                "segmentation": mask.segmentation, "bbox": box,
                                "area": float(coco.area(mask.segmentation)), "iscrowd": 0})  # fmt: skip
        for mask in other.masks:
            assert mask.predicted_iou is not None and mask.stability_score is not None
            region = {"segmentation": mask.segmentation} if kind == "masks" else {
                "bbox": coco.toBbox(mask.segmentation).tolist()}  # fmt: skip
            score = (mask.predicted_iou + mask.stability_score) / 2
            results.append({"image_id": number, "category_id": 1, "score": score, **region})
    images = [{"id": i, "height": one.height, "width": one.width} for i, one in enumerate(truth, 1)]
    data.dataset = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    data.createIndex()
    evaluation = COCOeval(data, data.loadRes(results), "segm" if kind == "masks" else "bbox")
    evaluation.params.useCats = 0
    evaluation.params.maxDets = list(LIMITS)
    evaluation.params.areaRng = RANGES
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["recall"][:, 0].mean(axis=0)


@pytest.fixture(scope="module")
def crowded() -> tuple[list[ImageRecord], list[ImageRecord]]:
    """Truth with copies and overlaps; proposals around it with equal scores, 1,300 in one image, none in another."""
    rng = np.random.default_rng(5)
    truth, found = [], []
    for number, (count, each) in enumerate(((14, 12), (9, 0), (10, 130), (6, 8)), 1):
        shapes = [(*rng.uniform(30, 170, 2), *rng.uniform(8, 75, 2)) for _ in range(count)]
        shapes += shapes[:2]
        masks = [mask_record(mask_id(number, i), ellipse(*one)) for i, one in enumerate(shapes)]
        near = [
            scored(
                mask_id(number, index * each + again),
                ellipse(*(np.array(one) * rng.normal(1, 0.08, 4))),
                float(rng.integers(5) / 5),
                float(rng.integers(3) / 5),
            )
            for index, one in enumerate(shapes[:count])
            for again in range(each)
        ]
        truth.append(image(number, masks))
        found.append(image(number, near))
    assert max(len(one.masks) for one in found) == 1300
    # A proposal that overlaps both halves by 0.5 finds the last, which leaves the next nothing.
    halves = np.zeros((2, 200, 240), bool)
    halves[0, 40:100, 40:100] = halves[1, 40:100, 100:160] = True
    truth.append(image(5, [mask_record(mask_id(5, i), half) for i, half in enumerate(halves)]))
    whole = scored(mask_id(5, 0), halves.any(axis=0), 0.9, 0.9)
    found.append(image(5, [whole, scored(mask_id(5, 1), halves[1], 0.8, 0.9)]))
    return truth, found


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_recall_is_cocos(crowded: tuple[list[ImageRecord], list[ImageRecord]], kind: str) -> None:
    expected = cocos(*crowded, kind)
    assert (np.diff(expected, axis=1) > 0).any(axis=0).all(), "each limit cuts something off"
    assert np.ptp(expected[:, -1]) > 0.05, "sizes differ"
    assert np.abs(ours(*crowded, kind) - expected).max() < 1e-9


def test_proposals_are_ranked_by_the_mean_of_both_scores() -> None:
    shapes = [ellipse(x, 100, 10, 10) for x in (20, 60, 100, 140)]
    scores = [(0.9, 0.6), (0.7, 0.9), (0.5, 1.0), (0.6, 0.9)]  # means .75, .8, .75, .75
    masks = [scored(i, one, *score) for i, (one, score) in enumerate(zip(shapes, scores))]  # noqa: B905
    proposals = proposals_of(image(1, masks), "masks")
    assert np.allclose(proposals.scores, [0.75, 0.8, 0.75, 0.75])
    best = [masks[index].segmentation for index in (1, 0, 2)]
    assert Proposals(proposals.regions, np.array([0.75, 0.8, 0.75, 0.75])).best(3) == best
    for field in ("predicted_iou", "stability_score"):
        without = dataclasses.replace(masks[1], **{field: None})
        with pytest.raises(EvaluationError, match=r"mask 1 of 1.jpg has no predicted IoU .*auto"):
            proposals_of(image(1, [without]), "masks")


def test_the_best_match_wins_and_is_used_once() -> None:
    # Two proposals, three true masks. IoUs of .5 and .95 and what lies between.
    found = first_found(np.array([[0.5, 0.8, 0.0], [0.95, 0.9, 0.49]]))
    assert found[0].tolist() == [1, 0, NOT_FOUND]
    assert found[5].tolist() == [1, 0, NOT_FOUND]  # .75
    assert found[7].tolist() == [1, NOT_FOUND, NOT_FOUND]  # .85: 0.9 is less than 0.95
    assert found[9].tolist() == [1, NOT_FOUND, NOT_FOUND]  # .95 is enough
    # Of two that are overlapped alike the last is found, as by COCO, though the next then finds none.
    assert first_found(np.array([[0.6, 0.6], [0.0, 0.7]]))[0].tolist() == [NOT_FOUND, 0]
    assert first_found(np.zeros((0, 2))).tolist() == [[NOT_FOUND] * 2] * 10
    assert first_found(np.zeros((3, 0))).shape == (10, 0)


def test_the_thousandth_proposal_counts_and_the_next_does_not() -> None:
    target, elsewhere = ellipse(60, 60, 30, 30), ellipse(190, 150, 20, 20)
    truth = image(1, [mask_record(0, target)])
    for rank, recall in ((999, [0, 0, 1]), (1000, [0, 0, 0]), (99, [0, 1, 1]), (100, [0, 0, 1])):
        scores = np.linspace(1, 0, 1002)
        regions = [rle.encode(elsewhere)] * 1002
        regions[rank] = rle.encode(target)
        found = image_recall(truth, Proposals(regions, scores), "masks")
        assert found.sums(ALL, LIMITS).tolist() == recall
        assert found.proposals == 1002


def test_boxes_of_a_detector() -> None:
    """Boxes are XYXY with the right and lower edges outside, those of masks too."""
    pixels = np.zeros((200, 240), bool)
    pixels[20:60, 10:90] = True
    truth = rle.boxes([rle.encode(pixels)])
    assert truth.tolist() == [[10, 20, 90, 60]]
    boxes = np.array([[0, 0, 5, 5], [10, 20, 90, 40], [10, 20, 90, 50]], float)
    found = overlaps(truth, Proposals(boxes, np.array([0.1, 0.9, 0.8])))
    assert np.allclose(found, [[0.5], [0.75], [0]])
    assert first_found(found)[[0, 1, 5, 6], 0].tolist() == [0, 1, 1, NOT_FOUND]
    assert overlaps(truth, Proposals(np.zeros((0, 4)), np.zeros(0))).shape == (0, 1)
    assert rle.boxes([]).shape == (0, 4)


def test_images_are_paired_by_content_then_by_name() -> None:
    index = ImageIndex(Path("truth"), [image(1, []), image(2, []), image(3, [], sha256=None)])
    unknown = {}.get  # no run has pictures here
    take = lambda record: index.take(record, Path("auto"), "do this", unknown)  # noqa: E731
    renamed = image(7, [], source_path="other/name.jpg", sha256=f"{2:064}")
    assert take(renamed).image_id == 2
    assert take(renamed) is None
    assert take(image(8, [], source_path="3.png")).image_id == 3
    told = "1.png has 99 x 200 pixels in auto, and 240 x 200 in truth: do this"
    with pytest.raises(PairingError, match=told):
        take(dataclasses.replace(image(9, [], source_path="1.png"), width=99))
    copies = [image(1, [], sha256="a"), image(2, [], sha256="a")]
    assert ImageIndex(Path("t"), copies).take(copies[1], Path("a"), "", unknown) is copies[1]
    with pytest.raises(PairingError, match="t has 1 twice"):
        ImageIndex(Path("t"), [image(1, []), image(1, [], source_path="1.png")])


def sa_engine(*arguments: Any) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def auto(images: Path, out: Path, *more: str) -> None:
    result = sa_engine("auto", f"--images={images}", f"--out={out}", "--local", "--threads-per-worker=1",
                       "--no-images", "--set=crop_n_layers=0", *more)  # fmt: skip
    assert result.exit_code == 0, result.output


def ingest(images: Path, out: Path, masks: dict[str, list[np.ndarray]]) -> None:
    """Take masks by the names of photos, which may have none, into a run."""
    described, annotations = [], []
    for number, (name, pixels) in enumerate(masks.items(), 1):
        width, height = Image.open(images / name).size
        described.append({"id": number, "file_name": name, "width": width, "height": height})
        annotations += [{"image_id": number, "segmentation": rle.encode(one)} for one in pixels]
    numbered = [{"id": number, **one} for number, one in enumerate(annotations, 1)]
    file = images.parent / f"{out.name}.json"
    file.write_text(json.dumps({"images": described, "annotations": numbered}))
    result = sa_engine("ingest", f"--images={images}", f"--annotations={file}", f"--out={out}",
                       "--local", "--no-images")  # fmt: skip
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Path:
    """Three photos: `few` and `many` are of two, the masks of `truth` are a model's, moved and smoothed."""
    folder = tmp_path_factory.mktemp("proposals")
    (folder / "some").mkdir()
    for name, photo in zip("abc", photos, strict=False):
        Image.fromarray(photo).reduce(2).save(folder / "some" / f"{name}.png")
    shutil.copytree(folder / "some", folder / "all")
    (folder / "some" / "c.png").unlink()
    auto(folder / "some", folder / "few", "--set=points_per_side=3")
    auto(folder / "some", folder / "many", "--set=points_per_side=6", "--set=pred_iou_thresh=0",
         "--set=stability_score_thresh=0", "--set=box_nms_thresh=0.9")  # fmt: skip
    truth = {"c.png": [np.ones(photos[2][::2, ::2, 0].shape, bool)]}
    for record in iter_records(folder / "many"):
        masks = [rle.decode(mask.segmentation) for mask in record.masks[::3]]
        moved = [np.roll(mask, index % 4, axis=1) for index, mask in enumerate(masks)]
        smooth = [ndimage.binary_opening(mask, iterations=2) for mask in moved]
        truth[str(record.source_path)] = [mask for mask in smooth if mask.any()]
    ingest(folder / "all", folder / "truth", truth)
    return folder


@pytest.mark.parametrize("kind", ["masks", "boxes"])
def test_recall_of_a_models_masks_is_cocos(runs: Path, kind: str) -> None:
    report = measure(str(runs / "truth"), [str(runs / "many")], kind=kind)
    truth, found = (list(iter_records(runs / name)) for name in ("truth", "many"))
    expected = cocos(truth[:2], found, kind)
    assert report.masks(ALL) > 20 and 0.1 < expected[0, 0] < expected[0, -1] < 1
    for size, row in zip(report.sizes, expected, strict=True):
        one = report.estimate(report.runs[0], size)
        if one is None:
            assert (row == -1).all()
        else:
            assert np.abs(one.values - row).max() < 1e-9
            assert (one.interval[0] <= one.values).all() and (one.values <= one.interval[1]).all()


def test_the_command_end_to_end(runs: Path, tmp_path: Path) -> None:
    command = ["recall", runs / "truth", runs / "few", runs / "many"]
    out = tmp_path / "new" / "results"
    result = sa_engine(*command, "--out", out)
    assert result.exit_code == 0, result.output
    assert result.stderr == "Note: 1 of 3 images of truth are not in every run, and not counted\n"
    content = json.loads((out / "recall.json").read_text())
    assert (content["images"], content["left_out"]) == (2, [3])
    first, second = content["runs"]
    assert [first["name"], second["name"]] == ["few", "many"]
    assert first["proposals"] < second["proposals"]
    # Enough to bootstrap again.
    for run in (first, second):
        for limit, told in run["average_recall"]["all"].items():
            total = sum(one["sum_recall"]["all"][limit] for one in run["images"])
            assert told["value"] == pytest.approx(total / content["masks"]["all"])
    gain = second["minus_first"]["all"]["1000"]
    values = [run["average_recall"]["all"]["1000"]["value"] for run in (first, second)]
    assert gain["value"] == pytest.approx(values[1] - values[0]) and gain["low"] > 0
    lines = result.stdout.splitlines()
    assert lines[1].split() == ["masks", "images", "masks", "AR@10", "AR@100", "AR@1000"]
    assert lines[2].split()[:3] == ["truth", "2", str(content["masks"]["all"])]
    assert lines[2].split()[5] == f"{values[0]:.3f}"
    assert "many minus few" in lines and max(map(len, lines)) <= 80
    assert Image.open(out / "recall.png").size[0] > 300
    assert sorted(path.name for path in out.iterdir()) == ["recall.json", "recall.png"]
    told = sa_engine(*command, "--json", "--boxes", "--proposals=20")
    boxes = json.loads(told.stdout)
    assert boxes["protocol"]["kind"] == "boxes"
    assert list(boxes["runs"][0]["average_recall"]["all"]) == ["20"]


def test_an_image_without_proposals_is_missed(runs: Path) -> None:
    ingest(runs / "some", runs / "none", {"a.png": [], "b.png": []})
    report = measure(str(runs / "truth"), [str(runs / "none")])
    one = report.estimate(report.runs[0], ALL)
    assert one is not None and one.values.tolist() == [0, 0, 0] and report.masks(ALL) > 20


def test_mistakes_are_told(runs: Path, tmp_path: Path) -> None:
    truth, auto = runs / "truth", runs / "few"
    file = tmp_path / "file"
    file.write_text("in the way")
    other, small = tmp_path / "other", tmp_path / "small"
    for folder, name in ((other, "z.png"), (small, "a.png")):
        folder.mkdir()
        Image.open(runs / "some" / "a.png").reduce(2).save(folder / name)
        ingest(folder, folder.with_name(f"{folder.name}_run"), {name: []})
    for arguments, words in (
        ([truth, tmp_path / "none"], "is not the output of a run"),
        ([tmp_path / "none", auto], "is not the output of a run"),
        ([truth, auto, auto], "a run is named twice"),
        ([truth, truth], "has no predicted IoU"),
        ([truth, tmp_path / "other_run"], "expected finished images of the same photos"),
        ([truth, tmp_path / "small_run"], "make both runs with the same short_side"),
        ([truth, auto, "--split=rest"], "sa-engine split"),
        ([truth, auto, "--proposals=0"], "expected numbers from 1 on"),
        ([truth, auto, "--out", file], "name a folder that can be written"),
        ([truth], "name a run, or a detector with --detector"),
    ):
        result = sa_engine("recall", *arguments)
        assert result.exit_code == 2, result.output
        assert words in result.stderr
        assert "Traceback" not in result.stderr
