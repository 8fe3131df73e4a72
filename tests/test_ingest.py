"""`sa-engine ingest` end to end: annotators' masks into shards, to the pixel."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from ingesting import NAMES, annotations, assert_refused, ingest, records
from lost_masks import HEIGHT, WIDTH, masks
from PIL import Image
from pycocotools import mask as coco_mask

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.formats.matching import match_images
from sa_engine.formats.model import AnnotatedImage, FormatError
from sa_engine.reader import iter_records


def test_masks_come_in_to_the_pixel_with_what_is_known_of_them(images: Path) -> None:
    content = annotations(info={"description": "exported from CVAT"})
    content["annotations"][0]["annotator"] = "mia"
    result = ingest(images, content, "--annotator=team", "--round=2")
    assert result.exit_code == 0, result.output
    assert "2 images: 2 ok, 0 skipped, 0 failed\n5 masks" in result.output
    found = records(images)
    assert [len(record.masks) for record in found.values()] == [5, 0]
    for mask, expected in zip(found[NAMES[0]].masks, masks().values(), strict=True):
        assert np.array_equal(rle.decode(mask.segmentation), expected)
        assert mask.area == expected.sum()
        assert (mask.source, mask.tool, mask.round) == ("assisted", "cvat", 2)
        assert (mask.predicted_iou, mask.time_s, mask.time_scope) == (None, None, None)
    assert [mask.annotator for mask in found[NAMES[0]].masks] == ["mia", *["team"] * 4]
    assert [mask.original_id for mask in found[NAMES[0]].masks] == [str(n) for n in range(100, 105)]
    verified = CliRunner().invoke(main, ["verify", str(images.parent / "out")])
    assert verified.exit_code == 0, verified.output


def test_exact_doubles_go_and_overlaps_stay(images: Path) -> None:
    content = annotations()
    content["annotations"].append({**content["annotations"][0], "id": 200})
    result = ingest(images, content)
    assert "5 masks, 2.5 per image\n1 doubles left out" in result.output
    assert len(records(images)[NAMES[0]].masks) == 5


@pytest.mark.parametrize(
    ("crowds", "option", "kept"),
    [
        ([1] * 5, "auto", 5),  # as CVAT writes all that was drawn with a brush
        ([1, 0, 0, 0, 0], "auto", 4),
        ([1, 0, 0, 0, 0], "keep", 5),
        ([1] * 5, "drop", 0),
    ],
)
def test_crowds_are_kept_where_they_are_none(
    images: Path, crowds: list[int], option: str, kept: int
) -> None:
    content = annotations()
    for entry, crowd in zip(content["annotations"], crowds, strict=True):
        entry["iscrowd"] = crowd
    result = ingest(images, content, f"--crowd={option}")
    assert result.exit_code == 0
    assert len(records(images)[NAMES[0]].masks) == kept
    assert ("crowds left out" in result.output) == (kept < 5)


@pytest.mark.parametrize("orientation", [1, 6, 8, 5, 3])
def test_masks_of_the_photo_as_it_is_stored_are_turned_with_it(
    images: Path, orientation: int
) -> None:
    """Tools that do not know EXIF annotate what is stored; its sides say so, if they are swapped."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(images / NAMES[0])
    stored.save(images / NAMES[0], exif=exif)
    result = ingest(images, annotations())
    assert result.exit_code == 0, result.output
    method = {
        6: Image.Transpose.ROTATE_270,
        8: Image.Transpose.ROTATE_90,
        5: Image.Transpose.TRANSPOSE,
    }.get(orientation)
    for mask, drawn in zip(records(images)[NAMES[0]].masks, masks().values(), strict=True):
        expected = drawn
        if method is not None:
            expected = np.array(Image.fromarray(drawn).transpose(method))
        assert np.array_equal(rle.decode(mask.segmentation), expected)
    # The released image is upright, and its masks with it.
    with tarfile.open(next((images.parent / "out").glob("*.tar"))) as tar:
        picture = Image.open(io.BytesIO(tar.extractfile(tar.getnames()[0]).read()))
    assert picture.size == expected.shape[::-1]


def test_masks_of_another_size_cost_their_photo(images: Path) -> None:
    """Without EXIF that turns the photo, swapped sides are those of another image."""
    content = annotations()
    content["images"][0] |= {"height": WIDTH, "width": HEIGHT}
    content["annotations"] = [
        {"id": 1, "image_id": 0, "segmentation": [[1, 1, 5, 1, 5, 5]]},
    ]
    result = ingest(images, content)
    assert result.exit_code == 3
    told = CliRunner().invoke(main, ["errors", "--list", str(images.parent / "out")]).output
    assert "are of an image of 12 x 17 pixels, the photo has 17 x 12 (EXIF orientation 1)" in told
    assert list(records(images)) == [NAMES[1]]


def test_what_is_no_mask_is_counted(images: Path) -> None:
    content = annotations()
    content["annotations"].append({"id": 300, "image_id": 0, "bbox": [1, 2, 3, 4]})
    assert "left out: 1 boxes without a mask" in ingest(images, content, "--dry-run").output
    assert "left out: 1 boxes without a mask" in ingest(images, content).output


@pytest.mark.parametrize("x", [-1.5, WIDTH + 2, 1e12])
def test_a_polygon_beyond_its_image_is_told(images: Path, x: float) -> None:
    content = annotations()
    content["annotations"][0]["segmentation"] = [[1, 1, x, 1, 5, 5]]
    assert ingest(images, content).exit_code == 3
    told = CliRunner().invoke(main, ["errors", "--list", str(images.parent / "out")]).output
    assert f"mask 100: a polygon reaches from x = {min(1, x):g} to {max(5, x):g}, beyond" in told


def test_a_dry_run_reads_the_annotations_and_writes_nothing(images: Path) -> None:
    told = ingest(images, annotations(), "--dry-run")
    assert told.exit_code == 0
    assert "2 images in" in told.output
    assert_refused(ingest(images, {"images": []}, "--dry-run"), images, "no format that is known")
    assert_refused(ingest(images, {}, "--annotation-format=coco"), images, "no COCO annotations")


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("a/photo.jpg", "a/photo.jpg"),
        ("photo.jpg", "a/photo.jpg"),
        ("./a/photo.jpg", "a/photo.jpg"),
        ("C:\\images\\photo.jpg", "a/photo.jpg"),
        ("photo.png", "a/photo.jpg"),  # as our exports name a photo whose released JPEG is meant
        ("b/photo.png", "a/photo.jpg"),
        ("3fa2bc91-photo.jpg", "a/photo.jpg"),
        ("/data/local-files/?d=set/photo.jpg", "a/photo.jpg"),
        ("s3://bucket/set/photo.jpg", "a/photo.jpg"),
        ("https://host/x/photo%2Ejpg", "a/photo.jpg"),
        ("b/same.jpg", "b/same.jpg"),
    ],
)
def test_photos_are_found_by_what_tools_make_of_their_names(name: str, key: str) -> None:
    keys = ["a/photo.jpg", "b/same.jpg", "c/same.jpg"]
    image = AnnotatedImage(name=name, width=None, height=None, annotations=(), source="export")
    assert match_images([image], keys, allow_unmatched=True) == {key: image}


def test_names_that_may_be_two_photos_are_refused() -> None:
    image = AnnotatedImage(name="same.jpg", width=None, height=None, annotations=(), source="x")
    with pytest.raises(FormatError, match=r"same\.jpg may be b/same\.jpg or c/same\.jpg"):
        match_images([image], ["b/same.jpg", "c/same.jpg"], allow_unmatched=True)
    with pytest.raises(FormatError, match=r"b/same\.jpg has annotations twice"):
        match_images([image, image], ["b/same.jpg"], allow_unmatched=True)


def test_our_own_shards_come_in_again(images: Path, tmp_path: Path) -> None:
    """SA-1B's JSON out of a tar, with its pictures as photos."""
    assert ingest(images, annotations(), "--source=manual").exit_code == 0
    before = records(images)
    photos, shard = tmp_path / "released", next((tmp_path / "out").glob("*.tar"))
    with tarfile.open(shard) as tar:
        tar.extractall(photos, filter="data")
    for file in photos.glob("*.json"):
        file.unlink()
    command = ["ingest", "--images", str(photos), "--annotations", str(shard), "--local"]
    result = CliRunner().invoke(main, [*command, "--out", str(tmp_path / "again")])
    assert result.exit_code == 0, result.output
    for record, original in zip(iter_records(tmp_path / "again"), before.values(), strict=True):
        assert [m.segmentation for m in record.masks] == [m.segmentation for m in original.masks]
        assert [m.predicted_iou for m in record.masks] == [None] * len(original.masks)


@pytest.mark.parametrize(
    ("name", "count"), [("coco/val", 513), ("bsds500/val", 570), ("bbbc038/val", 1851)]
)
def test_real_annotations_come_in_whole(
    shared_data: Path, tmp_path: Path, name: str, count: int
) -> None:
    file = shared_data / name / "annotations.json"
    command = ["ingest", "--images", str(shared_data / name / "images"), "--local", "--no-images"]
    result = CliRunner().invoke(
        main, [*command, "--annotations", str(file), "--out", str(tmp_path / "out")]
    )
    assert result.exit_code == 0, result.output
    areas = {}
    for entry in json.loads(file.read_text())["annotations"]:
        segmentation = entry["segmentation"]
        segmentation["counts"] = segmentation["counts"].encode()
        areas[str(entry["id"])] = int(coco_mask.area(segmentation))
    found = {
        str(mask.original_id): mask.area
        for record in iter_records(tmp_path / "out")
        for mask in record.masks
    }
    assert len(areas) == count
    assert found == areas
