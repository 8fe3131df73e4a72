"""`sa-engine ingest` end to end: annotators' masks into shards, to the pixel, or refused with the reason."""

import hashlib
import io
import json
import tarfile
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import test_format_cvat
from click.testing import CliRunner, Result
from lost_masks import HEIGHT, WIDTH, masks
from PIL import Image
from pycocotools import mask as coco_mask
from test_format_coco import uncompressed

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.config import IngestConfig
from sa_engine.errors import SaEngineError
from sa_engine.formats import files
from sa_engine.formats.matching import match_images
from sa_engine.formats.model import AnnotatedImage, FormatError
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord
from stages import ingest as stage

NAMES = ("bild ä.png", "sub/leer.png")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Two photos of 17 x 12 pixels, one of them in a folder."""
    folder = tmp_path / "photos"
    for number, name in enumerate(NAMES):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), np.uint8)
        Image.fromarray(pixels).save(folder / name)
    return folder


def annotations(**changes: Any) -> dict[str, Any]:
    """All masks on the first photo, none on the second."""
    return {
        "images": [
            {"id": number, "file_name": name, "height": HEIGHT, "width": WIDTH}
            for number, name in enumerate(NAMES)
        ],
        "annotations": [
            {"id": number, "image_id": 0, "segmentation": uncompressed(mask), "iscrowd": 0}
            for number, mask in enumerate(masks().values(), 100)
        ],
        **changes,
    }


def ingest(images: Path, content: Any, *more: str) -> Result:
    file = images.parent / "export.json"
    file.write_text(json.dumps(content))
    out = images.parent / "out"
    command = ["ingest", f"--images={images}", f"--annotations={file}", f"--out={out}", "--local"]
    return CliRunner().invoke(main, [*command, "--set=shard_size=8", *more])


def records(images: Path) -> dict[str, ImageRecord]:
    return {str(record.source_path): record for record in iter_records(images.parent / "out")}


def assert_refused(result: Result, images: Path, *words: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("Error: ") and "Traceback" not in result.stderr
    for word in words:
        assert word in result.stderr
    assert not (images.parent / "out").exists()


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


EMPTY = uncompressed(np.zeros((HEIGHT, WIDTH), bool))


def with_something_of_all() -> dict[str, Any]:
    """Seven masks on the first photo: two are empty, one is a double, one is a crowd."""
    content = annotations()
    content["annotations"][1]["segmentation"] = content["annotations"][3]["segmentation"] = EMPTY
    double = {**content["annotations"][0], "id": 200}
    content["annotations"] += [double, {**content["annotations"][2], "id": 300, "iscrowd": 1}]
    return content


def command(images: Path, name: str, *more: str) -> str:
    result = CliRunner().invoke(main, [name, str(images.parent / "out"), *more])
    assert result.exit_code == 0, result.output
    return result.output


def test_empty_masks_are_left_out_and_listed(images: Path) -> None:
    result = ingest(images, with_something_of_all(), "--crowd=drop")
    assert result.exit_code == 0, result.output
    assert "2 images: 2 ok, 0 skipped, 0 failed" in result.output
    for line in ("3 masks", "2 empty masks left out", "1 doubles left out", "1 crowds left out"):
        assert f"\n{line}, " in result.output
    assert f"what was left out: sa-engine errors {images.parent / 'out'}" in result.output
    found = records(images)[NAMES[0]].masks
    assert [mask.original_id for mask in found] == ["100", "102", "104"]
    file = images.parent / "export.json"
    assert command(images, "errors", "--list").splitlines() == [
        f"left out\t{NAMES[0]}\tmask {said} ({file})"
        for said in (
            "101 has no pixel",
            "103 has no pixel",
            "200 is the same as mask 100",
            "300 is a crowd",
        )
    ]
    rows = [json.loads(line) for line in command(images, "errors", "--json").splitlines()]
    assert [(row["key"], row["error"]) for row in rows][1:3] == [
        (NAMES[0], "empty masks"),
        (NAMES[0], "doubles"),
    ]
    table = command(images, "errors").splitlines()
    assert table[1].startswith("1       left out  process  2 empty masks: mask 101 has no pixel (")
    assert "--retry-failed" not in table[-1]
    assert "empty masks left out 2" in command(images, "status")
    assert "no problem found" in command(images, "verify")
    assert (
        "nothing was left to do" in ingest(images, with_something_of_all(), "--crowd=drop").output
    )


def test_a_retry_keeps_what_was_left_out(images: Path) -> None:
    """A shard that is reopened for one failed photo is, in the end, that of a run without failures."""
    photo = images / NAMES[1]
    good = photo.read_bytes()
    photo.write_bytes(good[:60])
    result = ingest(images, with_something_of_all(), "--crowd=drop")
    assert result.exit_code == 3 and "1 of 2 images failed" in result.stderr
    assert "no problem found" in command(images, "verify")
    photo.write_bytes(good)
    again = ingest(images, with_something_of_all(), "--crowd=drop", "--retry-failed")
    assert again.exit_code == 0, again.output
    assert "2 images: 2 ok" in again.output and "\n2 empty masks left out" in again.output
    assert "no problem found" in command(images, "verify")
    out, before = images.parent / "out", images.parent / "before"
    out.rename(before)
    assert ingest(images, with_something_of_all(), "--crowd=drop").exit_code == 0
    for one in (*out.glob("sa_*"), *out.glob("_run/errors/*")):
        other = before / one.relative_to(out)
        if one.suffix == ".json":  # but for the seconds
            marker, expected = (json.loads(file.read_bytes()) for file in (one, other))
            assert {**marker, "seconds": 0} == {**expected, "seconds": 0}
            assert list(marker["counts"]) == list(expected["counts"])
        else:
            assert one.read_bytes() == other.read_bytes(), one


def test_what_was_left_out_is_verified(images: Path) -> None:
    assert ingest(images, with_something_of_all(), "--crowd=drop").exit_code == 0
    (errors,) = (images.parent / "out").glob("_run/errors/*")
    (marker,) = (images.parent / "out").glob("sa_*.json")
    lines = errors.read_bytes().splitlines(keepends=True)

    def problems(*changed: bytes) -> str:
        """Of lines whose hash is what the marker says."""
        said = json.loads(marker.read_bytes())
        errors.write_bytes(b"".join(changed))
        said["errors_sha256"] = hashlib.sha256(errors.read_bytes()).hexdigest()
        marker.write_text(json.dumps(said, indent=1) + "\n")
        result = CliRunner().invoke(main, ["verify", str(images.parent / "out")])
        assert result.exit_code == 1
        return result.output

    assert "has {'empty masks left out': 2, 'doubles left out': 1}, its" in problems(*lines[:3])
    failed = lines[0].replace(b"left out", b"failed")
    assert "says of images [1] that they ended" in problems(failed, *lines)
    moved = lines[3].replace(b'"image_id": 1', b'"image_id": 2')
    assert "lists images [2, 1, 1, 1]" in problems(moved, *lines[:3])
    errors.unlink()
    result = ingest(images, with_something_of_all(), "--crowd=drop", "--retry-failed")
    assert "nothing was left to do" in result.output, "no image has failed"


def zipped(name: str, data: bytes) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr(name, data)
    return out.getvalue()


BOMB = f"<!DOCTYPE annotations [{test_format_cvat.BOMB}]>".encode()
NAN = annotations()
NAN["annotations"][0]["segmentation"] = [[1, 1, 5, 1, 5, float("nan")]]
TWICE = annotations()
TWICE["annotations"][1]["id"] = 100


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("bomb.xml", BOMB + test_format_cvat.changed("a.jpg", "&c;"), "bomb.xml: XML with decl"),
        ("nan.json", json.dumps(NAN).encode(), "annotation 100: a polygon's coordinate is 'nan'"),
        ("twice.json", json.dumps(TWICE).encode(), "annotation 100: another annotation has the"),
        ("latin.json", '{"images": "ä"}'.encode("latin-1"), "latin.json: not UTF-8 text"),
        ("slip.zip", zipped("../x.json", b"{"), "slip.zip/../x.json: not JSON"),
        ("cut.zip", zipped("a.json", b"{}")[:-30], "cut.zip: "),
    ],
)
def test_what_cannot_be_read_is_one_error_and_no_output(
    images: Path, name: str, data: bytes, words: str
) -> None:
    file = images.parent / name
    file.write_bytes(data)
    before = sorted(images.parent.rglob("*"))
    out = images.parent / "out"
    arguments = ["ingest", f"--images={images}", f"--annotations={file}", f"--out={out}", "--local"]
    result = CliRunner().invoke(main, arguments)
    assert_refused(result, images, words)
    assert len(result.stderr.splitlines()) == 1
    assert sorted(images.parent.rglob("*")) == before


def test_what_has_no_counterpart_is_refused_both_ways(images: Path) -> None:
    content = annotations()
    content["images"][1]["file_name"] = "other.png"
    words = (
        "1 annotated images have no photo (other.png",
        "1 photos have no annotations (sub/leer.png)",
    )
    assert_refused(ingest(images, content), images, *words)
    result = ingest(images, content, "--allow-unmatched")
    assert "2 images: 1 ok, 1 skipped, 0 failed" in result.output


def test_a_resume_with_other_annotations_is_refused(images: Path) -> None:
    assert ingest(images, annotations()).exit_code == 0
    again = ingest(images, annotations())
    assert "nothing was left to do" in again.output
    other = ingest(images, annotations(info={"version": 2}))
    assert other.exit_code == 2
    assert "annotations was 'sha256" in other.stderr


def test_annotations_are_hashed_once_in_a_start(
    images: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[Path] = []
    real = files.hash_annotations

    def counting(path: Path, name: str | None = None) -> str:
        hashed.append(path)
        return real(path, name)

    monkeypatch.setattr(files, "hash_annotations", counting)
    file = images.parent / "export.json"
    file.write_text(json.dumps(annotations()))
    config = IngestConfig(
        images=str(images), out=str(images.parent / "out"), annotations=str(file), local=True
    )
    assert stage.run(replace(config, shard_size=1, limit=1)).ok == 1
    hashed.clear()
    assert stage.run(config).ok == 2  # a resume, which looks at what was begun more than once
    assert hashed == [file]
    stage.describe(config)
    assert hashed == [file] * 2
    file.write_text(json.dumps(annotations(info={"version": 2})))
    with pytest.raises(SaEngineError, match="annotations was 'sha256"):
        stage.run(config)  # nothing of the start before is believed
    with pytest.raises(SaEngineError, match="annotations was 'sha256"):
        stage.describe(config)


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
