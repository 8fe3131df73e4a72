"""COCO instances and SA-1B's JSON: what is read, what is refused, and what their masks are in pixels."""

import copy
import json
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lost_masks import HEIGHT, WIDTH, masks
from pycocotools import mask as coco_mask

from sa_engine import rle
from sa_engine.config import ANNOTATION_FORMATS
from sa_engine.formats import coco, sa1b
from sa_engine.formats.files import FORMATS, hash_annotations, read_annotations
from sa_engine.formats.model import (
    AnnotatedImage,
    Annotation,
    FormatError,
    Parsed,
    Patch,
    Runs,
)
from sa_engine.formats.raster import compact, rasterize


def uncompressed(mask: np.ndarray) -> dict[str, Any]:
    """An RLE with a list of counts, written without pycocotools."""
    flat = mask.T.reshape(-1)
    counts, value = [0], False
    for pixel in flat.tolist():
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    return {"size": [HEIGHT, WIDTH], "counts": counts}


def file_of(segmentation: Any, **more: Any) -> dict[str, Any]:
    return {
        "images": [{"id": 1, "file_name": "bild ä.jpg", "height": HEIGHT, "width": WIDTH}],
        "annotations": [
            {"id": 5, "image_id": 1, "category_id": 1, "segmentation": segmentation, **more}
        ],
        "categories": [{"id": 1, "name": "object"}],
    }


def drawn(content: Any) -> np.ndarray:
    (image,) = coco.read(content, "file.json").images
    (annotation,) = image.annotations
    return rle.decode(rasterize(annotation.shapes, HEIGHT, WIDTH))


@pytest.mark.parametrize("name", masks())
@pytest.mark.parametrize("compressed", [False, True])
def test_run_lengths_come_back_to_the_pixel(name: str, compressed: bool) -> None:
    mask = masks()[name]
    segmentation = uncompressed(mask)
    if compressed:
        segmentation = coco_mask.encode(np.asfortranarray(mask))
        segmentation["counts"] = segmentation["counts"].decode()
    assert np.array_equal(drawn(file_of(segmentation)), mask)


def test_polygons_are_a_union_as_pycocotools_draws_them() -> None:
    """The second lies in the first, and is no hole in it."""
    rings = [[2.0, 2, 12, 2, 12, 9, 2, 9], [4.0, 4, 8, 4, 8, 6, 4, 6], [14.0, 1, 16, 1, 15, 5]]
    expected = coco_mask.decode(coco_mask.frPyObjects(rings, HEIGHT, WIDTH)).any(axis=2)
    mask = drawn(file_of(rings))
    assert np.array_equal(mask, expected)
    assert mask[5, 6]


def test_what_is_said_of_masks_is_kept() -> None:
    content = file_of(uncompressed(masks()["hole"]), iscrowd=1, attributes={"annotator": "mia"})
    content["annotations"].append({"id": 6, "image_id": 1, "bbox": [1, 2, 3, 4]})
    content["images"].append({"id": 2, "file_name": "empty.jpg"})
    parsed = coco.read(content, "file.json")
    image, empty = parsed.images
    assert (image.name, image.height, image.width) == ("bild ä.jpg", HEIGHT, WIDTH)
    (annotation,) = image.annotations
    assert (annotation.original_id, annotation.annotator, annotation.crowd) == ("5", "mia", True)
    assert (empty.annotations, empty.width) == ((), None)
    assert parsed.left_out == {"boxes without a mask": 1}


def test_sa1b_keeps_its_scores_and_forgets_their_placeholders() -> None:
    mask = coco_mask.encode(np.asfortranarray(masks()["hole"]))
    mask["counts"] = mask["counts"].decode()
    scored = {
        "id": 10,
        "segmentation": mask,
        "predicted_iou": 0.9,
        "stability_score": -1.0,
        "point_coords": [[3.0, 4.0]],
        "crop_box": [0, 0, WIDTH, HEIGHT],
    }
    image = {"image_id": 7, "file_name": "sa_7.jpg", "height": HEIGHT, "width": WIDTH}
    (read,) = sa1b.read({"image": image, "annotations": [scored]}, "sa_7.json").images
    (annotation,) = read.annotations
    assert (annotation.predicted_iou, annotation.stability_score) == (0.9, None)
    assert annotation.point_coords == [[3.0, 4.0]]
    assert np.array_equal(rle.decode(rasterize(annotation.shapes, HEIGHT, WIDTH)), masks()["hole"])


GOOD = file_of(uncompressed(masks()["hole"]))
SQUARE = [1, 1, 5, 1, 5, 5, 1, 5]


def changed(path: str, value: Any) -> Any:
    """The good file with one thing changed: `images.0.id` names it."""
    content = copy.deepcopy(GOOD)
    *way, last = [int(part) if part.isdigit() else part for part in path.split(".")]
    place: Any = content
    for part in way:
        place = place[part]
    place[last] = value
    return content


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (changed("images", {}), "images: dict found, a list expected"),
        (changed("annotations", None), "annotations: NoneType found"),
        (changed("images.0", 3), "image number 0 has no id"),
        (changed("images.0.id", None), "has no id"),
        (changed("images.0.file_name", ""), "image 1 has no file_name"),
        (changed("images.0.width", 0), "image 1: width is 0: expected at least 1"),
        (changed("images.0.height", "12"), "height is '12': expected a finite number"),
        (changed("images", GOOD["images"] * 2), "image 1: another image has the same id"),
        (changed("annotations", GOOD["annotations"] * 2), "annotation 5: another annotation"),
        (changed("annotations.0", []), "annotation number 0 is no object"),
        (changed("annotations.0.image_id", 9), "annotation 5 is of image 9, and there is no such"),
        (changed("annotations.0.image_id", [1]), "is of image [1]"),
        (changed("annotations.0.segmentation", "text"), "'text': expected polygons or RLE"),
        (changed("annotations.0.segmentation", SQUARE), "one flat list"),
        (changed("annotations.0.segmentation", [[1, 1, 5, 5]]), "three points at least"),
        (changed("annotations.0.segmentation", [[*SQUARE, 3]]), "three points at least"),
        (changed("annotations.0.segmentation", [[[1, 1], [5, 1], [5, 5]]]), "three points"),
        (changed("annotations.0.segmentation", [[1, 1, 5, 1, 5, float("nan")]]), "'nan'"),
        (changed("annotations.0.segmentation", [[1, 1, 5, 1, 5, "5"]]), "coordinate is '5'"),
        (changed("annotations.0.segmentation", [[1, 1, 5, 1, 5, 10**400]]), "a finite number"),
        (changed("annotations.0.segmentation.size", [WIDTH, HEIGHT]), "its RLE is 12 x 17"),
        (changed("annotations.0.segmentation.size", None), "size None"),
        (changed("annotations.0.segmentation.size", [12.5, 17]), "expected a whole number"),
        (
            changed("annotations.0.segmentation.counts", [10]),
            "10 pixels, its size 12 x 17 says 204",
        ),
        (changed("annotations.0.segmentation.counts", [-1, 205]), "expected at least 0"),
        (changed("annotations.0.segmentation.counts", ["204"]), "'204'"),
        (changed("annotations.0.segmentation.counts", None), "counts: NoneType found"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(content: Any, reason: str) -> None:
    with pytest.raises(FormatError) as told:
        coco.read(content, "export.json")
    assert str(told.value).startswith("export.json: ")
    assert reason in str(told.value)


@pytest.mark.parametrize("counts", ["", "0", "204", "100 4 100", "ö", "PPPP", "o" * 50])
def test_damaged_text_of_run_lengths_is_told(counts: str) -> None:
    (image,) = coco.read(file_of({"size": [HEIGHT, WIDTH], "counts": counts}), "file").images
    with pytest.raises(FormatError, match="damaged"):
        rasterize(image.annotations[0].shapes, HEIGHT, WIDTH)


@pytest.mark.parametrize("where", ["file", "folder", "zip", "tar"])
def test_exports_are_read_as_they_are(tmp_path: Path, where: str) -> None:
    text = json.dumps(GOOD).encode()
    folder = tmp_path / "export" / "annotations"
    folder.mkdir(parents=True)
    (folder / "instances_default.json").write_bytes(text)
    (folder / "readme.txt").write_text("not annotations")
    path = {"file": folder / "instances_default.json", "folder": tmp_path / "export"}.get(where)
    if where == "zip":
        path = tmp_path / "export.zip"
        with zipfile.ZipFile(path, "w") as archive:
            archive.write(folder / "instances_default.json", "../../evil/instances.json")
            archive.write(folder / "readme.txt", "readme.txt")
    elif where == "tar":
        path = tmp_path / "export.tar.gz"
        with tarfile.open(path, "w:gz") as archive:
            archive.add(folder)
    assert path is not None
    before = sorted(tmp_path.rglob("*"))
    (parsed,) = read_annotations(path)
    assert [len(image.annotations) for image in parsed.images] == [1]
    assert sorted(tmp_path.rglob("*")) == before, "nothing is unpacked"
    assert len(hash_annotations(path)) == 64


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "not JSON"),
        (b'{"images": [', "not JSON"),
        (b"\xff\xfe{", "not UTF-8"),
        (b"[" * 100_000, "not JSON"),
        (b"{}", "of no format that is known"),
        (b"[1, 2]", "of no format that is known"),
        (b"3", "of no format that is known (int)"),
    ],
)
def test_files_that_are_no_annotations_are_told(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    file = tmp_path / "export.json"
    file.write_bytes(content)
    with pytest.raises(FormatError) as told:
        read_annotations(file)
    assert str(told.value).startswith(str(file))
    assert reason in str(told.value)


def test_coco_exports_of_label_studio_are_taken_only_when_named(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    info = {"info": {"description": "", "contributor": "Label Studio"}}
    file.write_text(json.dumps({**GOOD, **info}))
    with pytest.raises(FormatError, match="lost holes"):
        read_annotations(file)
    assert read_annotations(file, "coco")[0].tool == "label studio"


def test_rectangles_of_pixels_are_kept_as_run_lengths() -> None:
    mask = masks()["hole"]
    inside, beyond = Patch(3, 2, mask[2:9, 3:12]), Patch(10, 2, mask[2:9, 3:12])
    image = AnnotatedImage(
        name="x",
        width=WIDTH,
        height=HEIGHT,
        annotations=(Annotation(shapes=(inside,)), Annotation(shapes=(beyond,))),
        source="x",
    )
    parsed = compact(Parsed(format="png", tool=None, images=(image,)))
    first, second = parsed.images[0].annotations
    assert isinstance(first.shapes[0], Runs)
    assert np.array_equal(rle.decode(rasterize(first.shapes, HEIGHT, WIDTH)), mask)
    assert second.shapes == (beyond,)
    with pytest.raises(FormatError, match="beyond its image"):
        rasterize(second.shapes, HEIGHT, WIDTH)


def test_every_format_can_be_named() -> None:
    assert sorted(FORMATS) == sorted(ANNOTATION_FORMATS)
    assert [module.NAME for module in FORMATS.values()] == list(FORMATS)


def test_paths_without_annotations_are_told(tmp_path: Path) -> None:
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(FormatError, match="no annotations there"):
        read_annotations(tmp_path)
    with pytest.raises(FormatError, match=r"none\.json: cannot be read: No such file"):
        read_annotations(tmp_path / "none.json")
    broken = tmp_path / "export.zip"
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("a.json", json.dumps(GOOD) * 50)
    broken.write_bytes(broken.read_bytes()[:60] + b"\0" * 40 + broken.read_bytes()[100:])
    with pytest.raises(FormatError, match=r"export\.zip"):
        read_annotations(broken)
