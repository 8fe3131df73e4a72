"""`sa-engine report`: numbers against independent computation on real masks, and what a user sees."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from PIL import Image
from pycocotools import mask as coco

from sa_engine import rle
from sa_engine.analysis import report as reports
from sa_engine.analysis.figures import HEAT_CELLS, SIZES, Figures, Tally, concavity
from sa_engine.analysis.report import make_report
from sa_engine.analysis.stages import StageTable, mask_seconds
from sa_engine.cli import main
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.storage import RunPaths


def ingest(data: Path, photos: int, out: Path, number: int) -> Path:
    """The first photos of a data set of `../shared/data`, and one without annotations' masks."""
    content = json.loads((data / "annotations.json").read_bytes())
    content["images"] = sorted(content["images"], key=lambda image: image["file_name"])[:photos]
    kept = {image["id"] for image in content["images"][:-1]}
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] in kept]
    folder = out.parent / f"photos_{out.name}"
    folder.mkdir()
    for image in content["images"]:
        shutil.copy(data / "images" / image["file_name"], folder)
    file = out.parent / f"{out.name}.json"
    file.write_text(json.dumps(content))
    command = ["ingest", f"--images={folder}", f"--annotations={file}", f"--out={out}", "--local"]
    result = CliRunner().invoke(
        main, [*command, f"--round={number}", "--no-images", "--set=shard_size=4"]
    )
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, shared_data: Path) -> list[Path]:
    """Two rounds: natural photos, then everyday photos; the last photo of each has no mask."""
    folder = tmp_path_factory.mktemp("runs")
    names = ("bsds500", "coco")
    return [ingest(shared_data / n / "val", 8, folder / n, i) for i, n in enumerate(names)]


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def hull_concavity(pixels: np.ndarray) -> float:
    """By OpenCV from the decoded mask: the hull of all corners of all pixels."""
    rows, columns = np.nonzero(pixels)
    corners = [np.stack([columns + x, rows + y], axis=1) for x in (0, 1) for y in (0, 1)]
    hull = cv2.convexHull(np.concatenate(corners).astype(np.int32))
    return 1 - len(rows) / cv2.contourArea(hull)


def test_figures_are_those_of_the_decoded_masks(runs: list[Path]) -> None:
    found = make_report([str(runs[0])]).figures
    records = list(iter_records(runs[0]))
    sizes, hulls, border, whole = [], [], 0, 0
    heat = np.zeros((HEAT_CELLS, HEAT_CELLS), int)
    for record in records:
        for mask in record.masks:
            pixels = coco.decode(dict(mask.segmentation))
            sizes.append(np.sqrt(coco.area(dict(mask.segmentation)) / pixels.size))
            hulls.append(hull_concavity(pixels))
            edges = (pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1])
            border += any(edge.any() for edge in edges)
            whole += pixels.mean() > 0.9
            rows, columns = np.flatnonzero(pixels.any(1)), np.flatnonzero(pixels.any(0))
            x = (columns[0] + columns[-1] + 1) / 2 / record.width
            y = (rows[0] + rows[-1] + 1) / 2 / record.height
            heat[int(y * HEAT_CELLS), int(x * HEAT_CELLS)] += 1
    assert (found.images, found.masks, found.empty) == (8, len(sizes), 1) and len(sizes) > 30
    assert np.array_equal(found.size.counts, np.histogram(sizes, 50, (0, 1))[0])
    assert found.size.mean == pytest.approx(np.mean(sizes))
    assert np.array_equal(found.heat, heat)
    assert (found.border, found.whole) == (border, whole) and border
    for name, (low, high) in SIZES.items():
        part = [h for h, size in zip(hulls, sizes, strict=True) if low <= size < high]
        assert np.array_equal(found.concavity[name].counts, np.histogram(part, 50, (0, 1))[0])
        assert found.concavity[name].mean == pytest.approx(np.mean(part))
    per_image = [len(record.masks) for record in records]
    assert found.summary()["masks_per_image_median"] == np.median(per_image)
    assert found.summary()["masks_per_image_mean"] == np.mean(per_image)


def test_concavity_of_shapes() -> None:
    pixels = np.zeros((7, 9), bool)
    assert concavity(rle.encode(pixels)) == 0
    for rows, columns in ((slice(2, 5), slice(1, 8)), (slice(None), slice(None)), (3, 4)):
        pixels[:] = False
        pixels[rows, columns] = True
        assert concavity(rle.encode(pixels)) == 0
    random = np.random.default_rng(0)
    for _ in range(200):  # runs that go on in the next column among them
        pixels = random.random((random.integers(1, 5), random.integers(1, 7))) < 0.7
        pixels.flat[0] = True
        assert concavity(rle.encode(pixels)) == pytest.approx(hull_concavity(pixels))


def mask(**fields: object) -> MaskRecord:
    base = MaskRecord(
        id=1,
        segmentation=rle.encode(np.eye(4, dtype=bool)),
        area=4,
        bbox=[0.0, 0.0, 3.0, 3.0],
        predicted_iou=None,
        stability_score=None,
        point_coords=None,
        crop_box=None,
        source="assisted",
    )
    return replace(base, **fields)  # type: ignore[arg-type]


def image(*masks: MaskRecord) -> ImageRecord:
    return ImageRecord(
        image_id=1, width=4, height=4, file_name="", source_path="", sha256="", masks=masks
    )


def test_times_are_of_the_mask_shared_or_unknown() -> None:
    masks = [
        mask(time_s=40.0, time_scope="mask", annotator="ann"),
        mask(time_s=40.0, time_scope="mask", annotator="ann"),
        mask(time_s=60.0, time_scope="image", annotator="ann"),
        mask(time_s=60.0, time_scope="image", annotator="ann"),
        mask(time_s=60.0, time_scope="image", annotator="bob"),
        mask(annotator="bob"),
        mask(time_s=5.0),
    ]
    assert mask_seconds(masks) == [40, 40, 30, 30, 60, None, None]
    table = StageTable()
    table.add("run", image(*masks), ("assisted", None))
    table.add("run", image(), ("assisted", None))
    row = table.rows()[0]
    assert (row["images"], row["masks"], row["masks_timed"]) == (2, 7, 5)
    assert (row["seconds_per_mask_median"], row["seconds_per_mask_mean"]) == (40, 40)
    assert row["share_above_30_s"] == 3 / 5  # 30 s is not above
    ann, bob = table.annotators()
    assert (ann["masks"], ann["seconds_per_mask_mean"]) == (4, 35)
    assert (bob["masks"], bob["masks_timed"], bob["seconds_per_mask_median"]) == (2, 1, 60)


def test_seconds_of_a_prefilled_image_are_those_of_its_drawn_masks() -> None:
    """Of three masks that were shown one was deleted and two were kept; one was added, all in 30 s."""
    spent = {"time_s": 30.0, "time_scope": "image", "source": "semi-automatic", "round": 1}
    kept = mask(edit_status="kept", annotator="ann", **spent)
    added = mask(edit_status="added", annotator="ann", **spent)
    assert mask_seconds([kept, kept, added]) == [None, None, 30]
    edited = replace(kept, edit_status="edited")
    assert mask_seconds([kept, edited, added]) == [None, 15, 15]
    stage = ("semi-automatic", 1)
    table = StageTable()
    table.add("run", image(kept, kept, added), stage, deleted=1)
    (row,), (ann,) = table.rows(), table.annotators()
    assert (row["masks_per_image_prefilled"], row["masks_per_image_added"]) == (3, 1)
    assert (row["share_kept"], row["share_deleted"]) == (2 / 3, 1 / 3)
    assert row["seconds_per_added_mask_mean"] == row["seconds_per_mask_mean"] == 30
    assert row["masks_timed"] == 1 and (ann["share_kept"], ann["share_deleted"]) == (2 / 3, 1 / 3)
    # All of an image's masks deleted, and one deleted by one of two annotators.
    table.add("run", image(), stage, deleted=2)
    table.add("run", image(kept, replace(added, annotator="bob")), stage, deleted=1)
    (row,), (ann, bob) = table.rows(), table.annotators()
    assert (row["images"], row["masks_per_image_prefilled"]) == (3, (2 + 1 + 2 + 1 + 1) / 3)
    assert (row["share_kept"], row["share_deleted"]) == (3 / 7, 4 / 7)
    assert (ann["share_kept"], bob["share_deleted"]) == (3 / 4, None)


def test_unknown_times_stay_blank(runs: list[Path]) -> None:
    row = make_report([str(runs[0])]).to_dict()["stages"][0]
    assert row["masks_timed"] == 0
    times = ("seconds_per_mask_median", "seconds_per_mask_mean", "share_above_30_s")
    assert [row[name] for name in times] == [None] * 3


def test_duplicates_and_scores_are_counted() -> None:
    found = Figures("x")
    found.add(image(mask(predicted_iou=0.9), mask(), mask(bbox=[0.0, 0.0, 1.0, 1.0])))
    assert found.duplicates == 2
    assert (found.predicted_iou.number, found.predicted_iou.mean) == (1, 0.9)
    assert found.stability.number == 0 and found.stability.mean is None


def test_medians_are_numpys() -> None:
    random = np.random.default_rng(1)
    for number in range(1, 30):
        values, tally = random.integers(0, 9, number), Tally()
        for value in values:
            tally.add(int(value))
        assert (tally.median, tally.mean) == (np.median(values), pytest.approx(values.mean()))


def test_runs_add_up_in_order(runs: list[Path]) -> None:
    result = report(*runs, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert found["schema_version"] == reports.SCHEMA_VERSION
    first, second = found["stages"]
    assert [row["round"] for row in (first, second)] == [0, 1]
    assert (first["runs"], second["runs"]) == ([str(runs[0])], [str(runs[1])])
    assert second["masks_cumulative"] == first["masks"] + second["masks"]
    assert found["figures"]["summary"]["masks"] == second["masks_cumulative"]
    assert sum(map(sum, found["figures"]["centres"])) == second["masks_cumulative"]
    assert first["images"] == second["images"] == 8  # the ones without masks too


def test_page_holds_everything_and_loads_nothing(runs: list[Path], tmp_path: Path) -> None:
    result = report(runs[0], "--compare", runs[1], "--out", tmp_path / "page")
    assert result.exit_code == 0, result.output
    assert "concavity mean" in result.stdout and "coco" in result.stdout
    page = (tmp_path / "page" / "report.html").read_text()
    assert "http" not in page and "<script" not in page and "<link" not in page
    assert page.count('src="data:image/png;base64,') == page.count("<img ") == 4
    assert page.index("<table") < page.index("<figure")
    found = json.loads((tmp_path / "page" / "report.json").read_bytes())
    assert [other["name"] for other in found["compared"]] == ["coco"]
    alone = json.loads(report(runs[1], "--json").stdout)
    assert found["compared"][0] == alone["figures"]
    assert len(list((tmp_path / "page").iterdir())) == 2


def test_many_masks_are_drawn_from(runs: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reports, "HULLS", 20)
    found, again = (make_report([str(runs[0])]).figures.to_dict() for _ in range(2))
    assert found == again
    assert 8 < found["summary"]["concavity_masks"] < 34 < found["summary"]["masks"]


def test_what_is_no_run_or_unfinished_is_told(runs: list[Path], tmp_path: Path) -> None:
    for arguments, word in (
        ([tmp_path], "is not the output of a run"),
        ([tmp_path / "none"], "is not the output of a run"),
        ([runs[0], runs[0]], "named twice"),
        ([runs[0], f"{runs[0]}/"], "named twice"),
        ([runs[0], "--compare", runs[0]], "named twice"),
        ([runs[0], "--compare", tmp_path], "is not the output of a run"),
        ([runs[0], "--out", runs[0].parent / "coco.json"], "cannot write to"),
    ):
        result = report(*arguments)
        assert result.exit_code == 2 and result.stderr.startswith("Error: "), result.output
        assert word in result.stderr
    part = tmp_path / "part"
    shutil.copytree(runs[0], part)
    RunPaths(part).marker("sa_000001").unlink()
    result = report(part)
    assert result.exit_code == 0 and "1 of 2 shards are missing" in result.stderr, result.output
    next(part.glob("*.parquet")).write_bytes(b"PAR1")
    result = report(part)
    assert result.exit_code == 2 and "cannot read sa_000" in result.stderr, result.output


def test_a_run_without_masks_has_a_page(photo_folder: Path, tmp_path: Path) -> None:
    names = ("astronaut.jpg", "coffee.jpg", "chelsea.jpg", "more/rocket.jpg")
    images = [{"id": i, "file_name": n, "height": 1, "width": 1} for i, n in enumerate(names)]
    for image_ in images:
        with Image.open(photo_folder / str(image_["file_name"])) as photo:
            image_["width"], image_["height"] = photo.size
    file = tmp_path / "none.json"
    file.write_text(json.dumps({"images": images, "annotations": [], "categories": []}))
    out = tmp_path / "out"
    command = ["ingest", f"--images={photo_folder}", f"--annotations={file}", f"--out={out}"]
    done = CliRunner().invoke(main, [*command, "--local", "--annotation-format=coco"])
    assert done.exit_code == 0, done.output
    result = report(out, "--out", tmp_path / "page")
    assert result.exit_code == 0 and f"{out} has no masks" in result.stderr, result.output
    row = json.loads((tmp_path / "page" / "report.json").read_bytes())["stages"][0]
    assert (row["source"], row["images"], row["masks"]) == ("assisted", 4, 0)
    assert (tmp_path / "page" / "report.html").exists()
