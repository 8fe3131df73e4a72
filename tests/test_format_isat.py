"""ISAT's JSON: what is read, what is refused, and what its masks are in pixels."""

import json
from pathlib import Path
from typing import Any

import lost_masks
import numpy as np
import pytest
from pycocotools import mask as coco_mask

from sa_engine import rle
from sa_engine.formats import isat
from sa_engine.formats.files import read_annotations
from sa_engine.formats.model import AnnotatedImage, FormatError
from sa_engine.formats.raster import rasterize

HEIGHT, WIDTH = 12, 17
TRIANGLE = [[1, 1], [8.5, 1], [3, 9.25]]


def box(left: float, top: float, right: float, bottom: float) -> list[list[float]]:
    return [[left, top], [right, top], [right, bottom], [left, bottom]]


def entry(segmentation: Any, group: Any = 1, **more: Any) -> dict[str, Any]:
    return {
        "category": "thing",
        "group": group,
        "segmentation": segmentation,
        "area": 0.0,
        "layer": 1.0,
        "bbox": [],
        "iscrowd": False,
        "note": "",
        **more,
    }


def file_of(*objects: Any, **more: Any) -> dict[str, Any]:
    info = {
        "description": "ISAT",
        "folder": "",
        "name": "bild ä.jpg",
        "width": WIDTH,
        "height": HEIGHT,
        "depth": 3,
        "note": "",
        **more,
    }
    return {"info": info, "objects": list(objects)}


def image_of(content: Any) -> AnnotatedImage:
    (image,) = isat.read(json.loads(json.dumps(content)), "file.json").images
    return image


def drawn(content: Any) -> list[np.ndarray]:
    image = image_of(content)
    return [rle.decode(rasterize(one.shapes, HEIGHT, WIDTH)) for one in image.annotations]


def masks() -> dict[str, tuple[np.ndarray, list[list[list[float]]]]]:
    """Masks that formats are known to lose, and their polygons."""
    found = lost_masks.masks()
    # A polygon cannot have a hole: four that lie around it.
    rings = {
        "hole": [box(3, 2, 12, 4), box(3, 6, 12, 9), box(3, 4, 5, 6), box(9, 4, 12, 6)],
        "two parts": [box(1, 1, 3, 3), box(10, 8, 16, 11)],
        "one pixel": [box(4, 7, 5, 8)],
        "border": [box(0, 0, 17, 1), box(16, 0, 17, 12)],
        "all": [box(0, 0, 17, 12)],
    }
    return {name: (found[name], ring) for name, ring in rings.items()}


@pytest.mark.parametrize("name", masks())
def test_masks_come_back(name: str) -> None:
    expected, rings = masks()[name]
    (found,) = drawn(file_of(*(entry(ring, 7) for ring in rings)))
    np.testing.assert_array_equal(found, expected)


def test_polygons_are_drawn_as_pycocotools_draws_them() -> None:
    flat = [value for point in TRIANGLE for value in point]
    (found,) = drawn(file_of(entry(TRIANGLE)))
    expected = coco_mask.decode(coco_mask.frPyObjects([flat], HEIGHT, WIDTH))[..., 0]
    np.testing.assert_array_equal(found, expected)


def test_overlaps_stay_and_layers_are_kept() -> None:
    content = file_of(
        entry(box(0, 0, 9, 9), 1, layer=2.0),
        entry(box(5, 5, 12, 12), 2, layer=3.6),
        entry(box(5, 5, 6, 6), 3, layer=None),
    )
    assert [int(mask.sum()) for mask in drawn(content)] == [81, 49, 1]
    assert [one.z_order for one in image_of(content).annotations] == [2, 4, None]


def test_objects_of_a_group_are_one_annotation() -> None:
    content = file_of(
        entry(box(0, 0, 2, 2), 4, layer=1),
        entry(box(8, 8, 9, 9), 5),
        entry(box(5, 5, 7, 7), 4, layer=6, iscrowd="true"),
        entry(box(9, 0, 12, 1), 4, category="other"),
        entry(box(1, 9, 2, 10), None),
        entry(box(3, 9, 4, 10), ""),
    )
    annotations = image_of(content).annotations
    assert [one.original_id for one in annotations] == ["4", "5", "4", None, None]
    assert [int(mask.sum()) for mask in drawn(content)] == [8, 1, 3, 1, 1]
    assert [one.crowd for one in annotations] == [True, False, False, False, False]
    assert annotations[0].z_order == 6


@pytest.mark.parametrize(
    ("value", "crowd"),
    [(True, True), (1, True), ("true", True), (False, False), ("false", False), (None, False)],
)
def test_crowds_may_be_text(value: Any, crowd: bool) -> None:
    (annotation,) = image_of(file_of(entry(TRIANGLE, iscrowd=value))).annotations
    assert annotation.crowd is crowd


def test_background_is_counted() -> None:
    hole = entry(box(2, 2, 4, 4), 2, category="__background__", layer=2.0)
    parsed = isat.read(file_of(entry(TRIANGLE), hole), "file.json")
    assert parsed.left_out == {"background objects": 1}
    assert len(parsed.images[0].annotations) == 1
    assert (parsed.format, parsed.tool) == ("isat", "isat")


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("", "bild ä.jpg"),
        (None, "bild ä.jpg"),
        ("D:\\fotos\\", "D:/fotos/bild ä.jpg"),
        ("images", "images/bild ä.jpg"),
    ],
)
def test_an_image_without_objects(folder: str | None, name: str) -> None:
    image = image_of(file_of(folder=folder))
    assert (image.name, image.height, image.width) == (name, HEIGHT, WIDTH)
    assert image.annotations == ()


def test_a_pixel_beyond_the_border_is_no_mistake() -> None:
    (found,) = drawn(file_of(entry(box(-1, -1, 18, 13))))
    assert found.all()


def test_files_are_told_by_their_content(tmp_path: Path) -> None:
    content = file_of(entry(TRIANGLE), description="isat")
    (tmp_path / "bild ä.json").write_text(json.dumps(content))
    (parsed,) = read_annotations(tmp_path)
    assert parsed.format == "isat"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "no ISAT annotations"),
        ({"info": None, "objects": []}, "no ISAT annotations"),
        (file_of(description="COCO"), "no ISAT annotations"),
        ({"info": {"description": "ISAT"}}, "no ISAT annotations"),
        ({**file_of(), "objects": {}}, "dict found, a list expected"),
        (file_of(name=None), "the name 'None'"),
        (file_of(folder=3), "the folder 3: expected text"),
        (file_of(width=None), "width is 'None': expected a finite number"),
        (file_of(height=-3), "height is -3: expected at least 1"),
        (file_of(height=3.5), "height is 3.5: expected a whole number"),
        (file_of("polygon"), "object number 0 is polygon"),
        (file_of(entry(TRIANGLE, category=None)), "with a category"),
        (file_of(entry(TRIANGLE, group=[1])), "its group is \\[1\\]"),
        (file_of(entry(TRIANGLE, layer="top")), "its layer is 'top'"),
        (file_of(entry(None)), "its points are None"),
        (file_of(entry([])), "polygon of 0 points: expected at least 3"),
        (file_of(entry(TRIANGLE), entry(TRIANGLE[:2])), "object number 1: a polygon of 2 points"),
        (file_of(entry([1, 1, 8, 1, 3, 9])), "a point is 1: expected \\[x, y\\]"),
        (file_of(entry([[1, 1], [8], [3, 9]])), "a point is \\[8\\]"),
        (file_of(entry([[1, 1], [8, None], [3, 9]])), "coordinate is 'None'"),
        (file_of(entry([[1, 1], [8, float("inf")], [3, 9]])), "coordinate is 'inf'"),
        (file_of(entry([[1, 1], [8, float("nan")], [3, 9]])), "coordinate is 'nan'"),
        (file_of(entry(box(0, 0, 17, 14))), "17, 14 lies outside of its image of 17 x 12"),
    ],
)
def test_what_is_wrong_is_told(content: Any, message: str) -> None:
    with pytest.raises(FormatError, match=f"^file\\.json: .*{message}"):
        isat.read(content, "file.json")
