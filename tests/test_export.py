"""`sa-engine export`: masks leave as they came, or what a format cannot hold is told."""

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from click.testing import CliRunner, Result
from ingesting import NAMES, annotations, ingest
from lost_masks import HEIGHT, WIDTH, masks
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.cli.runs import EXPORT_NAMES
from sa_engine.export import EXPORT_FORMATS
from sa_engine.formats import outline
from sa_engine.reader import iter_records


@pytest.fixture
def run(images: Path) -> Path:
    """A run of two images; the first has the masks that formats are known to lose, the second none."""
    assert ingest(images, annotations()).exit_code == 0
    return images.parent / "out"


def export(run: Path, name: str, *more: str) -> Result:
    dest = run.parent / f"export_{name}"
    return CliRunner().invoke(
        main, ["export", str(run), "--format", name, "--out", str(dest), *more]
    )


def pixels(run: Path) -> dict[str, list[np.ndarray]]:
    return {
        str(record.source_path): [rle.decode(mask.segmentation) for mask in record.masks]
        for record in iter_records(run)
    }


def test_the_command_knows_every_format() -> None:
    assert tuple(EXPORT_FORMATS) == EXPORT_NAMES


@pytest.mark.parametrize("name", [one for one in EXPORT_NAMES if one not in ("png", "yolo-seg")])
def test_what_is_exported_comes_in_again_to_the_pixel(run: Path, name: str) -> None:
    result = export(run, name, "--with-images")
    assert result.exit_code == 0, result.output
    assert "2 images with 5 masks" in result.output
    dest = run.parent / f"export_{name}"
    again = run.parent / "again"
    command = ["ingest", f"--images={dest}", f"--annotations={dest}", f"--out={again}", "--local"]
    result = CliRunner().invoke(main, [*command, "--set=shard_size=8"])
    assert result.exit_code == 0, result.output
    before, after = list(pixels(run).values()), list(pixels(again).values())
    assert sorted(map(len, before)) == sorted(map(len, after)) == [0, 5]
    # Photos may be in another order.
    (before_masks,), (after_masks,) = ([one for one in side if one] for side in (before, after))
    for first, second in zip(before_masks, after_masks, strict=True):
        assert np.array_equal(first, second)


@pytest.mark.parametrize("name", ["coco", "coco-rle"])
def test_coco_is_read_by_pycocotools(run: Path, name: str) -> None:
    assert export(run, name).exit_code == 0
    api = COCO(str(run.parent / f"export_{name}" / "annotations.json"))
    assert sorted(image["file_name"] for image in api.imgs.values()) == sorted(NAMES)
    for entry, mask in zip(api.loadAnns(api.getAnnIds()), masks().values(), strict=True):
        assert np.array_equal(api.annToMask(entry), mask)
        assert entry["area"] == mask.sum()
        box = coco_mask.toBbox(coco_mask.encode(np.asfortranarray(mask.view(np.uint8))))
        assert entry["bbox"] == box.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "count"),
    [("coco/train", 1105), ("coco/val", 513), ("bsds500/train", 3008), ("bsds500/val", 570),
     ("bbbc038/train", 7083), ("bbbc038/val", 1851), ("ccp/train", 1742)],
)  # fmt: skip
def test_polygons_of_whole_data_sets_are_the_same_masks(
    shared_data: Path, tmp_path: Path, name: str, count: int
) -> None:
    source, out, dest = shared_data / name, tmp_path / "out", tmp_path / "export"
    result = CliRunner().invoke(
        main,
        ["ingest", f"--images={source / 'images'}", f"--annotations={source / 'annotations.json'}",
         f"--out={out}", "--local", "--no-images"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    result = CliRunner().invoke(main, ["export", str(out), "--format=coco", f"--out={dest}"])
    assert result.exit_code == 0, result.output
    api = COCO(str(dest / "annotations.json"))
    compared = 0
    for record in iter_records(out):
        for mask in record.masks:
            drawn = api.annToMask(api.anns[mask.id])
            assert np.array_equal(drawn, rle.decode(mask.segmentation)), mask.id
            compared += 1
    assert compared == count


def test_instance_maps_keep_what_is_in_front_and_tell_the_rest(run: Path) -> None:
    result = export(run, "png")
    assert "masks wholly behind others" not in result.output
    assert (
        "masks partly behind others (2)" in result.output
    )  # the one that covers all, and a corner
    with Image.open(run.parent / "export_png" / "masks" / "bild ä.png") as file:
        ids = np.asarray(file)
    expected = np.zeros((HEIGHT, WIDTH), int)
    for value, mask in sorted(enumerate(masks().values(), 1), key=lambda pair: -pair[1].sum()):
        expected[mask] = value
    assert np.array_equal(ids, expected)


@pytest.mark.parametrize("to_pixels", [np.trunc, np.round])
def test_yolo_fills_the_same_pixels(
    run: Path, to_pixels: Callable[[np.ndarray], np.ndarray]
) -> None:
    result = export(run, "yolo-seg")
    assert "masks whose parts are joined by a line (1)" in result.output
    dest = run.parent / "export_yolo-seg"
    assert (dest / "labels" / "sub" / "leer.txt").read_text() == ""
    lines = (dest / "labels" / "bild ä.txt").read_text().splitlines()
    for line, (name, mask) in zip(lines, masks().items(), strict=True):
        label, *numbers = line.split()
        # As YOLO's tools do: to pixels, some without the fraction, some rounded, then OpenCV's fillPoly.
        corners = np.array(numbers, float).reshape(-1, 2) * (WIDTH, HEIGHT)
        filled = np.zeros((HEIGHT, WIDTH), np.uint8)
        cv2.fillPoly(filled, [to_pixels(corners).astype(np.int32)], 1)
        assert label == "0"
        if name == "two parts":
            assert (filled >= mask).all() and 0 < (filled - mask.astype(np.uint8)).sum() < 10
        else:
            assert np.array_equal(filled, mask), name


def test_outlines_become_the_same_masks() -> None:
    random = np.random.default_rng(0)
    for number in range(300):
        height, width = random.integers(1, 40, 2)
        mask = random.random((height, width)) < random.choice([0.1, 0.5, 0.9, 0.97])
        if number % 3 == 0:
            mask = cv2.blur(random.random((height, width)), (3, 3)) > 0.5
        if not mask.any():
            continue
        edges = [ring.reshape(-1).astype(float).tolist() for ring in outline.edge_rings(mask)]
        drawn = coco_mask.merge(coco_mask.frPyObjects(edges, int(height), int(width)))
        assert np.array_equal(coco_mask.decode(drawn), mask)
        filled = np.zeros((height, width), np.uint8)
        for ring in outline.centre_rings(mask):
            part = np.zeros_like(filled)
            cv2.fillPoly(part, [ring.astype(np.int32)], 1)
            filled |= part
        assert np.array_equal(filled, mask)


def test_a_tolerance_gives_fewer_corners_and_nearly_the_same_mask() -> None:
    rows, columns = np.mgrid[:200, :200]
    disc = (rows - 100) ** 2 + (columns - 100) ** 2 < 80**2
    (exact,), (fewer,) = outline.edge_rings(disc), outline.edge_rings(disc, 1.5)
    assert len(fewer) < len(exact) / 4
    drawn = coco_mask.frPyObjects([fewer.reshape(-1).astype(float).tolist()], 200, 200)
    found = rle.decode({"size": [200, 200], "counts": drawn[0]["counts"].decode()})
    assert (found & disc).sum() / (found | disc).sum() > 0.97


def test_some_images_and_the_names_of_release(run: Path) -> None:
    first = next(record.image_id for record in iter_records(run) if record.masks)
    result = export(run, "coco-rle", f"--id={first}", "--names=released")
    assert "1 images with 5 masks" in result.output
    content = json.loads((run.parent / "export_coco-rle" / "annotations.json").read_text())
    assert [image["file_name"] for image in content["images"]] == [f"sa_{first}.jpg"]


def test_nothing_is_left_where_an_export_fails(run: Path) -> None:
    before = sorted(path.name for path in run.parent.iterdir())
    result = export(run, "coco", "--id=99")
    assert result.exit_code == 2 and "no finished image 99" in result.stderr
    result = export(run, "coco", "--split=rest")
    assert result.exit_code == 2 and "sa-engine split" in result.stderr
    assert sorted(path.name for path in run.parent.iterdir()) == before
    assert export(run, "coco").exit_code == 0
    assert sorted(path.name for path in run.parent.iterdir()) == sorted([*before, "export_coco"])
    file = run.parent / "export_coco" / "annotations.json"
    result = CliRunner().invoke(main, ["export", str(run), "--format=coco", f"--out={file}/x"])
    assert result.exit_code == 2 and "nothing was written" in result.stderr, result.output


def files(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_an_equal_export_is_complete_and_people_may_work_in_it(run: Path) -> None:
    first = export(run, "labelme", "--with-images")
    assert first.exit_code == 0, first.output
    dest = run.parent / "export_labelme"
    for path in dest.rglob("*.json"):
        path.write_text(path.read_text().replace("object", "thing"))
    (dest / ".DS_Store").write_bytes(b"of a Mac")
    worked_on = files(dest)
    again = export(run, "labelme", "--with-images", "--names=original")
    assert again.exit_code == 0, again.output
    assert again.output == first.output.replace(
        "_labelme\n", "_labelme: complete, and left as it is\n"
    )
    assert files(dest) == worked_on
    for more, reason in (
        (["--names=released"], 'names was "original", now "released"'),
        (["--id=1"], "ids was [], now [1]"),
    ):
        result = export(run, "labelme", "--with-images", *more)
        assert result.exit_code == 2, result.output
        assert "is there and not empty: it is an export whose " + reason in result.stderr
    # The run has got other masks in the meantime: here, one fewer image.
    shutil.rmtree(run)
    one = annotations(annotations=annotations()["annotations"][:1])
    assert ingest(run.parent / "photos", one).exit_code == 0
    result = export(run, "labelme", "--with-images")
    assert result.exit_code == 2 and "is an export whose run was" in result.stderr, result.output
    assert files(dest) == worked_on
    for damaged in ("{}", "[", '{"schema_version": 0}'):
        (dest / ".sa-engine-export").write_text(damaged)
        result = export(run, "labelme", "--with-images")
        assert result.exit_code == 2 and "and its .sa-engine-export cannot be" in result.stderr
    (dest / ".sa-engine-export").unlink()
    result = export(run, "labelme", "--with-images")
    assert result.exit_code == 2 and f"{dest} is there and not empty: name a new" in result.stderr


def test_an_export_of_what_has_another_split_now_is_another_one(run: Path) -> None:
    assert CliRunner().invoke(main, ["split", str(run), "--holdout=1"]).exit_code == 0
    assert export(run, "coco-rle", "--split=rest").exit_code == 0
    assert "left as it is" in export(run, "coco-rle", "--split=rest").output
    (run / "holdout.json").unlink()
    assert CliRunner().invoke(main, ["split", str(run), "--holdout=2"]).exit_code == 0
    result = export(run, "coco-rle", "--split=rest")
    assert result.exit_code == 2 and "whose content was" in result.stderr, result.output


SLOW = """
import sys, time
from pathlib import Path
from sa_engine import export
def write(images, writing):
    next(images)
    yield "half.json", b"{"
    yield "half.json", b"["
    time.sleep(600)
export.EXPORT_FORMATS["coco"] = export.Format(write)
export.export(Path(sys.argv[1]), Path(sys.argv[2]), "coco", pictures=True)
"""


def test_what_a_killed_export_leaves_is_removed_by_the_next_one(run: Path) -> None:
    dest, before = run.parent / "export_coco", {path.name for path in run.parent.iterdir()}
    process = subprocess.Popen([sys.executable, "-c", SLOW, str(run), str(dest)])
    try:
        while not list(run.parent.glob(".*/half.json")) and process.poll() is None:
            time.sleep(0.02)
        (left,) = {path.name for path in run.parent.iterdir()} - before
        assert left.startswith(".sa-engine-export-") and left.endswith(".tmp")
        result = export(run, "coco")
        assert result.exit_code == 2, result.output
        assert f"another process exports to {dest}: wait until it has ended" in result.stderr
        assert list(run.parent.glob(".*/images/*")), "what it has written is left alone"
        other = CliRunner().invoke(main, ["export", str(run), "--format=coco", f"--out={dest}2"])
        assert other.exit_code == 0, "another place is free"
    finally:
        process.kill()
        process.wait()
    assert (run.parent / left / "half.json").exists()
    result = export(run, "coco")
    assert result.exit_code == 0, result.output
    now = {path.name for path in run.parent.iterdir()}
    assert now == {*before, "export_coco", "export_coco2"}
    names = {path.name for path in dest.iterdir()}
    assert names == {"annotations.json", ".sa-engine-export"}, "without pictures"
    assert json.loads((dest / "annotations.json").read_bytes())["images"]


def test_held_out_images_are_told_or_left_out(run: Path) -> None:
    assert CliRunner().invoke(main, ["split", str(run), "--holdout=1"]).exit_code == 0
    assert "1 images are held out" in export(run, "coco-rle").output
    assert "1 images with" in export(run, "sa1b", "--split=rest").output


def test_two_photos_of_one_stem_are_told(tmp_path: Path) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for suffix in ("png", "bmp"):
        Image.new("RGB", (WIDTH, HEIGHT)).save(folder / f"a.{suffix}")
    names = [
        {"id": n, "file_name": f"a.{s}", "width": WIDTH, "height": HEIGHT}
        for n, s in enumerate(("png", "bmp"))
    ]
    assert ingest(folder, annotations(images=names, annotations=[])).exit_code == 0
    result = export(tmp_path / "out", "labelme" if "labelme" in EXPORT_FORMATS else "png")
    assert result.exit_code == 2 and "--names released" in result.stderr


@pytest.mark.parametrize("name", [one for one in EXPORT_NAMES if one not in ("png", "yolo-seg")])
def test_a_turned_photo_of_another_script_comes_back_upright(tmp_path: Path, name: str) -> None:
    """Its masks are of the upright picture, which is what the export writes and every tool shows."""
    folder = tmp_path / "photos" / "Ünï"
    folder.mkdir(parents=True)
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (HEIGHT, WIDTH), "olive").save(folder / "写真.jpg", exif=exif)
    names = [{"id": 0, "file_name": "Ünï/写真.jpg", "width": WIDTH, "height": HEIGHT}]
    assert ingest(folder.parent, annotations(images=names)).exit_code == 0
    assert export(tmp_path / "out", name, "--with-images").exit_code == 0
    dest = tmp_path / f"export_{name}"
    photos = dest / "images" if EXPORT_FORMATS[name].pictures else dest
    again = tmp_path / "again"
    command = ["ingest", f"--images={photos}", f"--annotations={dest}", f"--out={again}", "--local"]
    result = CliRunner().invoke(main, command)
    assert result.exit_code == 0, result.output
    (found,) = pixels(again).values()
    for first, second in zip(masks().values(), found, strict=True):
        assert np.array_equal(first, second)
