"""CVAT for images 1.1: masks and polygons as CVAT writes them, and files that it would not write."""

from pathlib import Path
from xml.etree.ElementTree import Element, SubElement, fromstring, tostring

import numpy as np
import pytest

from sa_engine import rle
from sa_engine.formats import cvat
from sa_engine.formats.files import read_annotations
from sa_engine.formats.model import FormatError, Parsed, Patch
from sa_engine.formats.raster import rasterize

HEIGHT, WIDTH = 7, 9
NAME = "ordner/größe ✓.jpg"


def drawn(*boxes: tuple[int, int, int, int], holes: tuple[tuple[int, int], ...] = ()) -> np.ndarray:
    """A mask of boxes, XYXY with the ends excluded, and without pixels (x, y)."""
    mask = np.zeros((HEIGHT, WIDTH), bool)
    for left, top, right, bottom in boxes:
        mask[top:bottom, left:right] = True
    for x, y in holes:
        mask[y, x] = False
    return mask


MASKS = {
    "hole": drawn((1, 1, 6, 5), holes=((3, 2), (3, 3))),
    "two parts": drawn((0, 1, 2, 3), (5, 4, 8, 6)),
    "one pixel": drawn((4, 3, 5, 4)),
    "border": drawn((6, 0, WIDTH, HEIGHT)),
    "whole image": drawn((0, 0, WIDTH, HEIGHT)),
    "corner": drawn((WIDTH - 1, HEIGHT - 1, WIDTH, HEIGHT)),
}


def add_mask(image: Element, mask: np.ndarray, **more: str) -> None:
    """As CVAT writes it: the tight box, row by row, background first."""
    rows, columns = np.nonzero(mask)
    top, left = rows.min(), columns.min()
    crop = mask[top : rows.max() + 1, left : columns.max() + 1]
    runs, value, length = [], False, 0
    for pixel in crop.ravel():
        if pixel != value:
            runs.append(length)
            value, length = pixel, 0
        length += 1
    runs.append(length)
    box = {"left": left, "top": top, "width": crop.shape[1], "height": crop.shape[0]}
    attributes = {"label": "thing", "source": "manual", "occluded": "0", "z_order": "0", **more}
    text = {name: str(value) for name, value in box.items()}
    SubElement(image, "mask", {**attributes, "rle": str(runs)[1:-1], **text})


def document(meta: str = "") -> tuple[Element, Element]:
    root = fromstring(f"<annotations><version>1.1</version>{meta}</annotations>")
    sides = {"width": str(WIDTH), "height": str(HEIGHT)}
    return root, SubElement(root, "image", {"id": "0", "name": NAME, **sides})


def read_file(root: Element, folder: Path) -> Parsed:
    """Through a file, whose format nobody says."""
    (folder / "annotations.xml").write_bytes(tostring(root, "utf-8"))
    (parsed,) = read_annotations(folder)
    return parsed


def pixels(parsed: Parsed, index: int = 0) -> np.ndarray:
    (image,) = parsed.images
    return rle.decode(rasterize(image.annotations[index].shapes, HEIGHT, WIDTH))


@pytest.mark.parametrize("what", MASKS)
def test_a_mask_keeps_its_pixels(what: str, tmp_path: Path) -> None:
    root, image = document()
    add_mask(image, MASKS[what])
    parsed = read_file(root, tmp_path)
    assert np.array_equal(pixels(parsed), MASKS[what])
    assert (parsed.format, parsed.tool, parsed.images[0].name) == ("cvat", "cvat", NAME)
    assert (parsed.images[0].width, parsed.images[0].height) == (WIDTH, HEIGHT)


def test_overlapping_masks_keep_their_pixels_and_their_order(tmp_path: Path) -> None:
    root, image = document()
    add_mask(image, MASKS["hole"], z_order="2")
    add_mask(image, MASKS["whole image"], z_order="-1")
    parsed = read_file(root, tmp_path)
    assert np.array_equal(pixels(parsed, 0), MASKS["hole"])
    assert np.array_equal(pixels(parsed, 1), MASKS["whole image"])
    assert [one.z_order for one in parsed.images[0].annotations] == [2, -1]


def test_a_mask_lies_where_its_box_is() -> None:
    root, image = document()
    add_mask(image, MASKS["one pixel"])
    shape = cvat.read(root, "a.xml").images[0].annotations[0].shapes[0]
    assert isinstance(shape, Patch)
    assert (shape.left, shape.top, shape.pixels.shape) == (4, 3, (1, 1))


def test_a_polygon_is_drawn_as_coco_draws_it(tmp_path: Path) -> None:
    root, image = document()
    SubElement(image, "polygon", {"points": "1.0,1.0;6.00,1.00;6,5;1,5", "z_order": "3"})
    parsed = read_file(root, tmp_path)
    assert np.array_equal(pixels(parsed), drawn((1, 1, 6, 5)))
    assert parsed.images[0].annotations[0].z_order == 3


def test_shapes_of_a_group_are_one_annotation(tmp_path: Path) -> None:
    root, image = document()
    add_mask(image, drawn((0, 0, 2, 2)), group_id="5")
    add_mask(image, MASKS["one pixel"], group_id="0")
    SubElement(image, "polygon", {"points": "5,5;8,5;8,7;5,7", "group_id": "5", "z_order": "4"})
    add_mask(image, MASKS["corner"], group_id="0")
    parsed = read_file(root, tmp_path)
    assert [len(one.shapes) for one in parsed.images[0].annotations] == [2, 1, 1]
    assert np.array_equal(pixels(parsed), drawn((0, 0, 2, 2), (5, 5, 8, 7)))
    assert parsed.images[0].annotations[0].z_order == 4


def test_what_is_no_mask_is_counted() -> None:
    root, image = document()
    for tag in ("box", "box", "polyline", "points", "cuboid", "ellipse", "tag", "skeleton"):
        SubElement(image, tag, {"label": "thing", "group_id": "1"})
    parsed = cvat.read(root, "a.xml")
    assert parsed.images[0].annotations == ()
    assert parsed.left_out.pop("boxes") == 2
    assert parsed.left_out == dict.fromkeys(
        ("polylines", "points", "cuboids", "ellipses", "tags", "skeletons"), 1
    )


def test_an_image_without_masks_is_an_image(tmp_path: Path) -> None:
    root, _ = document()
    (image,) = read_file(root, tmp_path).images
    assert (image.name, image.annotations) == (NAME, ())


def user(role: str, name: str) -> str:
    return f"<{role}><username>{name}</username><email/></{role}>"


@pytest.mark.parametrize(
    ("meta", "annotator"),
    [
        ("", None),
        (f"<meta><task>{user('owner', 'olga')}{user('assignee', 'anna')}</task></meta>", "anna"),
        (f"<meta><task>{user('owner', 'olga')}<assignee/></task></meta>", "olga"),
        (f"<meta><job>{user('assignee', ' ben ')}</job></meta>", "ben"),
        (f"<meta><a>{user('assignee', 'anna')}</a><b>{user('assignee', 'ben')}</b></meta>", None),
        (
            f"<meta><task><id>3</id>{user('assignee', 'anna')}</task>"
            f"<task><id>4</id>{user('assignee', 'ben')}</task></meta>",
            "ben",
        ),
    ],
)
def test_the_annotator_is_the_assignee_or_the_owner(meta: str, annotator: str | None) -> None:
    root, image = document(meta)
    image.set("task_id", "4")
    add_mask(image, MASKS["one pixel"])
    assert cvat.read(root, "a.xml").images[0].annotations[0].annotator == annotator


MASK = '<mask label="a" rle="1, 2, 1" left="1" top="1" width="2" height="2" z_order="0"/>'
IMAGE = f'<image id="0" name="a.jpg" width="9" height="7">{MASK}</image>'


def whole_file(image: str = IMAGE) -> bytes:
    return f"<annotations><version>1.1</version>{image}</annotations>".encode()


def changed(old: str, new: str) -> bytes:
    assert old in IMAGE
    return whole_file(IMAGE.replace(old, new))


def polygon(attributes: str) -> bytes:
    return changed(MASK, f"<polygon {attributes}/>")


MALFORMED = {
    "cut off": (whole_file()[:-20], "not XML"),
    "another root": (b"<annotation><version>1.1</version></annotation>", "no format|no CVAT"),
    "no version": (b"<annotations/>", "no CVAT annotations"),
    "old version": (whole_file().replace(b"1.1", b"1.0"), "version '1.0'.*expected 1.1"),
    "video": (whole_file('<track id="0" label="a"/>'), "tracks of a video"),
    "image without a name": (changed('name="a.jpg"', ""), "image 0 has no name"),
    "image without a width": (changed('width="9"', ""), "a.jpg has no width"),
    "image without pixels": (changed('height="7"', 'height="0"'), "height is 0"),
    "image too large": (changed('height="7"', 'height="70000000000"'), "more than 400,000,000"),
    "unknown shape": (changed("<mask", "<blob"), "blob number 0: no shape"),
    "no box": (changed('left="1"', ""), "mask number 0 has no left"),
    "box is text": (changed('left="1"', 'left="one"'), "left is 'one'"),
    "box is broken": (changed('left="1"', 'left="1.5"'), "left is 1.5.*whole number"),
    "box is infinite": (changed('left="1"', 'left="1e999"'), "left is 'inf'"),
    "box is Python's": (changed('left="1"', 'left="1_0"'), "left is '1_0'"),
    "box is negative": (changed('left="1"', 'left="-1"'), "left is -1"),
    "box without height": (changed('width="2" height="2"', 'width="2" height="0"'), "height is 0"),
    "beyond the right": (changed('left="1"', 'left="8"'), "reaches beyond its image of 9 x 7"),
    "beyond the foot": (changed('top="1"', 'top="6"'), "reaches beyond its image of 9 x 7"),
    "no rle": (changed('rle="1, 2, 1"', ""), "its rle is ''"),
    "rle is empty": (changed("1, 2, 1", ""), "its rle is ''"),
    "rle is text": (changed("1, 2, 1", "1, two, 1"), "its rle is '1, two, 1'"),
    "rle is negative": (changed("1, 2, 1", "1, -2, 5"), "its rle is '1, -2, 5'"),
    "rle is compressed": (changed("1, 2, 1", "PP21"), "its rle is 'PP21'"),
    "rle is short": (changed("1, 2, 1", "1, 2"), "has 3 pixels, its box 2 x 2 says 4"),
    "rle is long": (changed("1, 2, 1", "1, 2, 2"), "has 5 pixels, its box 2 x 2 says 4"),
    "rle is huge": (changed("1, 2, 1", "9999999999"), "has 9999999999 pixels"),
    "z_order is text": (changed('z_order="0"', 'z_order="top"'), "z_order is 'top'"),
    "group is text": (changed('z_order="0"', 'group_id="a"'), "group_id is 'a'"),
    "polygon without points": (polygon(""), "polygon number 0: a point is ''"),
    "polygon of two": (polygon('points="1,1;2,2"'), "2 points: expected three"),
    "polygon of text": (polygon('points="1,1;2,b;3,3"'), "a coordinate is 'b'"),
    "polygon of triples": (polygon('points="1,1,1;2,2,2;3,3,3"'), "a point is '1,1,1'"),
    "polygon of nothing": (polygon('points="1,1;2,nan;3,3"'), "a coordinate is 'nan'"),
    "polygon far away": (polygon('points="1,1;2,1e9;3,3"'), "far outside of its image"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_by_its_name(what: str, tmp_path: Path) -> None:
    data, message = MALFORMED[what]
    path = tmp_path / "bad.xml"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"(?s)bad.xml: .*({message})"):
        read_annotations(path, "cvat")


def test_the_file_that_the_malformed_ones_come_from_is_read(tmp_path: Path) -> None:
    (tmp_path / "good.xml").write_bytes(whole_file())
    (parsed,) = read_annotations(tmp_path / "good.xml")
    assert len(parsed.images[0].annotations) == 1


def test_what_is_no_xml_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(FormatError, match="bad.json: no CVAT annotations"):
        read_annotations(tmp_path / "bad.json", "cvat")


BOMB = '<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;">'


@pytest.mark.parametrize("name", [None, "cvat"])
@pytest.mark.parametrize("entities", [BOMB, '<!ENTITY c SYSTEM "file:///etc/passwd">'])
def test_entities_are_refused(entities: str, name: str | None, tmp_path: Path) -> None:
    path = tmp_path / "bomb.xml"
    path.write_bytes(f"<!DOCTYPE annotations [{entities}]>".encode() + changed("a.jpg", "&c;"))
    with pytest.raises(FormatError, match="bomb.xml: XML with declarations"):
        read_annotations(path, name)
