"""labelme's and X-AnyLabeling's JSON: pixels as labelme makes them, and what is refused."""

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from lost_masks import HEIGHT, WIDTH, masks
from PIL import Image, ImageDraw

from sa_engine import rle
from sa_engine.formats import labelme
from sa_engine.formats.files import read_annotations
from sa_engine.formats.model import AnnotatedImage, FormatError
from sa_engine.formats.raster import rasterize


def png(mask: np.ndarray, mode: str = "L") -> str:
    """A mask as labelme stores it."""
    out = io.BytesIO()
    Image.fromarray(mask.astype(np.uint8)).convert(mode).save(out, "PNG")
    return base64.b64encode(out.getvalue()).decode()


def mask_shape(mask: np.ndarray, **more: Any) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    top, bottom, left, right = rows[0], rows[-1], columns[0], columns[-1]
    points = [[float(left), float(top)], [float(right), float(bottom)]]
    crop = mask[top : bottom + 1, left : right + 1]
    return {"label": "a", "shape_type": "mask", "points": points, "mask": png(crop), **more}


def shape(kind: str | None, *points: tuple[float, float], **more: Any) -> dict[str, Any]:
    return {"label": "a", "shape_type": kind, "points": [list(point) for point in points], **more}


def file_of(*shapes: Any, size: tuple[int, int] = (HEIGHT, WIDTH), **more: Any) -> dict[str, Any]:
    return {
        "version": "5.5.0",
        "flags": {},
        "shapes": list(shapes),
        "imagePath": "..\\bilder\\bild ä.jpg",
        "imageData": None,
        "imageHeight": size[0],
        "imageWidth": size[1],
        **more,
    }


def image_of(content: Any) -> AnnotatedImage:
    (image,) = labelme.read(json.loads(json.dumps(content)), "file.json").images
    return image


def drawn(content: Any) -> list[np.ndarray]:
    image = image_of(content)
    assert image.height and image.width
    return [
        rle.decode(rasterize(one.shapes, image.height, image.width)).astype(bool)
        for one in image.annotations
    ]


def reference(one: dict[str, Any], size: tuple[int, int]) -> np.ndarray:
    """What labelme draws: on an image of the full size."""
    canvas = Image.new("L", (size[1], size[0]))
    draw = ImageDraw.Draw(canvas)
    points = [tuple(point) for point in one["points"]]
    if one["shape_type"] == "circle":
        (x, y), radius = points[0], math.dist(*points)
        draw.ellipse(((x - radius, y - radius), (x + radius, y + radius)), outline=1, fill=1)
    elif one["shape_type"] == "rectangle" and len(points) == 2:
        xs, ys = zip(*points, strict=True)
        draw.rectangle(((min(xs), min(ys)), (max(xs), max(ys))), outline=1, fill=1)
    else:
        draw.polygon(points, outline=1, fill=1)
    return np.array(canvas, bool)


@pytest.mark.parametrize("name", masks())
def test_stored_masks_come_back(name: str) -> None:
    (found,) = drawn(file_of(mask_shape(masks()[name])))
    np.testing.assert_array_equal(found, masks()[name])


def test_overlapping_masks_stay_apart() -> None:
    expected = [masks()["hole"], masks()["all"]]
    found = drawn(file_of(*(mask_shape(mask) for mask in expected)))
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("mode", ["1", "L", "P"])
def test_stored_masks_of_any_one_channel(mode: str) -> None:
    crop = png(masks()["hole"] * np.uint8(255 if mode == "1" else 1), mode)
    (found,) = drawn(file_of(shape("mask", (0, 0), (16, 11), mask=crop)))
    np.testing.assert_array_equal(found, masks()["hole"])


def test_fractional_corners_leave_the_stored_extent() -> None:
    crop = np.ones((2, 3), bool)
    (found,) = drawn(file_of(shape("mask", (2.6, 3.5), (5.4, 5.2), mask=png(crop))))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[4:6, 3:6] = True
    np.testing.assert_array_equal(found, expected)


def test_a_mask_that_begins_a_pixel_early_ends_at_the_border() -> None:
    (found,) = drawn(file_of(shape("mask", (-1, -1), (1, 2), mask=png(np.ones((4, 3))))))
    assert found[:3, :2].all() and found.sum() == 6


@pytest.mark.parametrize(
    "one",
    [
        shape("polygon", (2, 2), (12.5, 3.2), (7.7, 10.9)),
        shape(None, (2, 2), (12.5, 3.2), (7.7, 10.9), (3, 9)),
        shape("polygon", (0, 0), (17, 0), (17, 12), (0, 12)),
        shape("polygon", (-0.9, -1), (18, 0.5), (16.5, 13)),
        shape("polygon", (1, 1), (15, 11), (15, 1), (1, 11)),  # crosses itself
        shape("polygon", (4, 7), (4, 7), (4, 7)),  # a pixel
        shape("polygon", (4, 7), (9, 7), (6, 7)),  # a line
        shape("rectangle", (12, 9), (3.5, 2)),
        shape("rectangle", (3, 2), (12, 2), (12, 9), (3, 9)),
        shape("circle", (8, 6), (10.4, 7.1)),
        shape("circle", (1, 1), (6, 5)),  # beyond the border
        shape("rotation", (8, 1), (13, 5), (9, 10), (4, 6), direction=0.67),
        shape("oriented_rectangle", (8.5, 1), (13, 5.2), (9, 10), (4, 6)),
    ],
)
def test_shapes_are_drawn_as_labelme_draws_them(one: dict[str, Any]) -> None:
    (found,) = drawn(file_of(one))
    expected = reference(one, (HEIGHT, WIDTH))
    assert expected.any()
    np.testing.assert_array_equal(found, expected)


def test_many_polygons_are_equal_to_drawings_of_the_full_image() -> None:
    """Pillow computes in float32: the same polygon elsewhere may be another one."""
    rng = np.random.default_rng(7)
    size = (900, 1300)
    shapes = []
    for index in range(300):
        kind = ("polygon", "rectangle", "circle")[index % 3]
        centre = rng.uniform((40, 40), (1260, 860))
        count = rng.integers(3, 12) if kind == "polygon" else 2
        points = centre + rng.uniform(-38, 38, (count, 2))
        if index % 2:
            points = points.round()
        shapes.append(shape(kind, *map(tuple, points.tolist())))
    for one, found in zip(shapes, drawn(file_of(*shapes, size=size)), strict=True):
        np.testing.assert_array_equal(found, reference(one, size))


def test_a_rectangle_of_four_corners_is_that_of_two() -> None:
    four = shape("rectangle", (3.4, 2.6), (12.7, 2.6), (12.7, 9.5), (3.4, 9.5))
    two = shape("rectangle", (3.4, 2.6), (12.7, 9.5))
    first, second = drawn(file_of(four, two))
    np.testing.assert_array_equal(first, second)


@pytest.mark.parametrize(
    "empty",
    [
        shape("rectangle", (17.2, 1), (17.9, 2)),
        shape("mask", (1, 1), (2, 2), mask=png(np.zeros((2, 2)))),
        shape("mask", (17, 1), (17, 2), mask=png(np.ones((2, 1)))),
    ],
)
def test_masks_without_a_pixel_are_read_as_such(empty: dict[str, Any]) -> None:
    """Whoever takes them in leaves them out and says so; in a group they change nothing."""
    first, second = drawn(file_of(empty, RECTANGLE))
    assert (first.sum(), second.sum()) == (0, 4)
    (both,) = drawn(file_of({**empty, "group_id": 1}, {**RECTANGLE, "group_id": 1}))
    np.testing.assert_array_equal(both, second)


def test_patches_are_no_larger_than_what_is_drawn() -> None:
    (annotation,) = image_of(file_of(shape("polygon", (3, 2), (9, 2), (9, 8)))).annotations
    (patch,) = annotation.shapes
    assert isinstance(patch, labelme.Patch)
    assert (patch.left, patch.top, patch.pixels.shape) == (3, 2, (7, 7))


def test_shapes_of_a_label_and_group_are_one_annotation() -> None:
    shapes = [
        shape("rectangle", (1, 1), (2, 2), group_id=4),
        shape("rectangle", (5, 5), (6, 6), group_id=4),
        shape("rectangle", (8, 8), (9, 9), group_id=4, label="b"),
        shape("rectangle", (8, 1), (9, 2), group_id=None),
        shape("rectangle", (12, 1), (13, 2)),
    ]
    content = file_of(*shapes)
    assert [one.original_id for one in image_of(content).annotations] == ["4", "4", None, None]
    assert [int(mask.sum()) for mask in drawn(content)] == [8, 4, 4, 4]


def test_lines_and_points_are_counted() -> None:
    lines = [shape("line", (1, 1), (2, 2)), shape("point", (1, 1)), shape("point", (3, 1))]
    parsed = labelme.read(file_of(*lines, shape("linestrip", (1, 1), (4, 4))), "file.json")
    assert sum(parsed.left_out.values()) == 4
    assert parsed.left_out["point shapes, which have no area"] == 2
    assert parsed.images[0].annotations == ()


def test_an_image_without_shapes() -> None:
    image = image_of(file_of())
    assert image.annotations == ()
    assert (image.name, image.height, image.width) == ("../bilder/bild ä.jpg", HEIGHT, WIDTH)


def test_the_tool_is_told_by_its_keys() -> None:
    one = shape("rectangle", (1, 1), (2, 2), flags={}, description="")
    assert labelme.read(file_of(one), "a").tool == "labelme"
    for score in (None, 0.7):
        scored = {**one, "score": score, "attributes": {}, "difficult": False}
        assert labelme.read(file_of(scored), "a").tool == "x-anylabeling"
    assert labelme.read(file_of(one, chat_history=[]), "a").tool == "x-anylabeling"


def test_files_are_told_by_their_content(tmp_path: Path) -> None:
    (tmp_path / "bild ä.json").write_text(json.dumps(file_of(mask_shape(masks()["hole"]))))
    (parsed,) = read_annotations(tmp_path)
    assert parsed.format == "labelme"


RECTANGLE = shape("rectangle", (1, 1), (2, 2))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "expected an object with shapes"),
        ({"shapes": []}, "expected an object with shapes"),
        (file_of(imagePath=None), "imagePath is 'None'"),
        (file_of(imagePath=""), "imagePath is ''"),
        (file_of(shapes={}), "dict found, a list expected"),
        (file_of(imageWidth=None), "imageWidth is 'None'"),
        (file_of(imageHeight=0), "imageHeight is 0: expected at least 1"),
        (file_of(imageHeight=10**6, imageWidth=10**6), "at most 400,000,000"),
        (file_of("polygon"), "shape number 0 is polygon"),
        (file_of({**RECTANGLE, "label": None}), "expected an object with a label"),
        (file_of({**RECTANGLE, "points": None}), "its points are None"),
        (file_of(RECTANGLE, {**RECTANGLE, "points": [1, 2, 3]}), "shape number 1: a point is 1"),
        (file_of({**RECTANGLE, "points": [[1, 2, 3], [4, 5, 6]]}), "expected \\[x, y\\]"),
        (file_of({**RECTANGLE, "points": [["1", 2], [4, 5]]}), "coordinate is '1'"),
        (file_of({**RECTANGLE, "points": [[math.nan, 2], [4, 5]]}), "a finite number"),
        (file_of({**RECTANGLE, "group_id": [1]}), "group_id is \\[1\\]"),
        (file_of({**RECTANGLE, "shape_type": "cuboid"}), "shape_type is 'cuboid'"),
        (file_of({**RECTANGLE, "shape_type": ["polygon"]}), "shape_type is"),
        (file_of(shape("polygon", (1, 1), (2, 2))), "polygon of 2 points: expected at least 3"),
        (file_of({**RECTANGLE, "points": []}), "rectangle of 0 points: expected 2 or 4"),
        (file_of(shape("rectangle", (1, 1), (2, 2), (3, 3))), "rectangle of 3 points"),
        (file_of(shape("circle", (1, 1))), "circle of 1 points: expected 2"),
        (file_of(shape("rotation", (1, 1), (2, 2), (3, 3))), "rotation of 3 points: expected 4"),
        (file_of(shape("rectangle", (1, 1), (18.5, 2))), "18.5, 2 lies outside .* 17 x 12"),
        (file_of(shape("polygon", (1, 1), (-1.25, 2), (3, 3))), "-1.25, 2 lies outside"),
        (file_of({**RECTANGLE, "shape_type": "mask"}), "no PNG in base64"),
        (file_of({**RECTANGLE, "shape_type": "mask", "mask": "%%%"}), "no PNG in base64"),
        (file_of(shape("mask", (1, 1), (2, 2), mask="QUJD")), "no PNG in base64"),
        (file_of(shape("mask", (1, 1), (9, 9), mask=png(np.ones((9, 9)))[:60])), "no PNG"),
        (
            file_of(shape("mask", (1, 1), (2, 2), mask=png(np.ones((3, 2))))),
            "has 2 x 3 pixels, its corners 1, 1 and 2, 2 say 2 x 2",
        ),
        (file_of(shape("mask", (9.5, 1), (10, 2), mask=png(np.ones((2, 9))))), "reaches beyond"),
        (file_of(shape("mask", (1, 1), (2, 2), mask=png(np.ones((2, 2)), "RGB"))), "of mode RGB"),
        (file_of(shape("mask", (1, 1), mask=png(np.ones((2, 2))))), "mask of 1 points"),
    ],
)
def test_what_is_wrong_is_told(content: Any, message: str) -> None:
    with pytest.raises(FormatError, match=f"^file\\.json: .*{message}"):
        labelme.read(content, "file.json")
