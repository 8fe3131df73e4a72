"""Label Studio's JSON: brush masks and polygons as it writes them, and files that it would not write."""

import copy
import json
import uuid
from collections.abc import Callable
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from test_format_cvat import HEIGHT, MASKS, WIDTH, drawn

from sa_engine import rle
from sa_engine.cli import main
from sa_engine.formats import label_studio
from sa_engine.formats.brush import decode_brush
from sa_engine.formats.files import read_annotations
from sa_engine.formats.model import FormatError, Parsed
from sa_engine.formats.raster import rasterize
from sa_engine.reader import iter_records

NAME = "1a2b3c4d-größe ✓.jpg"
Json = Any


def pack(
    words: np.ndarray, word_bits: int = 8, sizes: tuple[int, ...] = (3, 4, 8, 16)
) -> list[int]:
    """Words as rle-pack packs them: equal ones in a block, and those that differ in another."""
    bits = [f"{len(words):032b}{word_bits - 1:05b}", *(f"{size - 1:04b}" for size in sizes)]
    singles: list[int] = []

    def block(repeat: int, words: list[int], length: int) -> None:
        fits = [index for index, size in enumerate(sizes) if length <= 1 << size]
        bits.append(f"{repeat}{fits[0]:02b}{length - 1:0{sizes[fits[0]]}b}")
        bits.extend(f"{word:0{word_bits}b}" for word in words)

    def close() -> None:
        while singles:
            part = singles[: 1 << max(sizes)]
            block(0, part, len(part))
            del singles[: len(part)]

    for word, group in groupby(words.tolist()):
        length = len(list(group))
        if length == 1:
            singles.append(word)
            continue
        close()
        while length:
            part = min(length, 1 << max(sizes))
            block(1, [word], part)
            length -= part
    close()
    text = "".join(bits)
    text += "0" * (-len(text) % 8)
    return [int(text[at : at + 8], 2) for at in range(0, len(text), 8)]


def rgba(mask: np.ndarray, color: tuple[int, int, int, int] = (255,) * 4) -> np.ndarray:
    """Words of a mask in this colour, row by row."""
    pixels: np.ndarray = mask[..., None] * np.array(color, np.uint8)
    return pixels.ravel()


def region(kind: str, value: Json, **more: Json) -> Json:
    sizes = {"original_width": WIDTH, "original_height": HEIGHT, "image_rotation": 0}
    return {"id": "r1", "type": kind, "to_name": "image", **sizes, "value": value, **more}


def brush(mask: np.ndarray, **more: Json) -> Json:
    value = {"format": "rle", "rle": pack(rgba(mask)), "brushlabels": ["thing"]}
    return region("brushlabels", value, **more)


def annotation(*regions: Json, **more: Json) -> Json:
    fields = {"id": 11, "completed_by": 4, "was_cancelled": False, "lead_time": 12.5}
    return {**fields, "result": list(regions), **more}


def task(*annotations: Json, **more: Json) -> Json:
    fields = {"id": 1, "file_upload": NAME, "data": {"image": f"/data/upload/1/{NAME}"}}
    return {**fields, "annotations": list(annotations), "drafts": [], "predictions": [], **more}


def read_file(content: Json, folder: Path) -> Parsed:
    """Through a file, whose format nobody says."""
    (folder / "project.json").write_text(json.dumps(content), "utf-8")
    (parsed,) = read_annotations(folder)
    return parsed


def pixels(parsed: Parsed, index: int = 0) -> np.ndarray:
    return rle.decode(rasterize(parsed.images[0].annotations[index].shapes, HEIGHT, WIDTH))


@pytest.mark.parametrize("what", MASKS)
def test_a_brush_mask_keeps_its_pixels(what: str, tmp_path: Path) -> None:
    parsed = read_file([task(annotation(brush(MASKS[what])))], tmp_path)
    assert np.array_equal(pixels(parsed), MASKS[what])
    assert (parsed.format, parsed.tool) == ("label-studio", "label studio")
    (image,) = parsed.images
    assert (image.name, image.width, image.height) == (NAME, WIDTH, HEIGHT)
    assert image.annotations[0].original_id == "r1"


def test_overlapping_masks_keep_their_pixels(tmp_path: Path) -> None:
    both = annotation(brush(MASKS["hole"]), brush(MASKS["whole image"], type="brush"))
    parsed = read_file([task(both)], tmp_path)
    assert np.array_equal(pixels(parsed, 0), MASKS["hole"])
    assert np.array_equal(pixels(parsed, 1), MASKS["whole image"])


# Word and length sizes that rle-pack allows; colours that make literal blocks of all alignments.
@pytest.mark.parametrize("sizes", [(3, 4, 8, 16), (1, 2, 3, 4), (16, 16, 16, 16), (5, 1, 7, 2)])
@pytest.mark.parametrize("color", [(255, 255, 255, 255), (1, 2, 3, 4), (9, 9, 7, 7), (0, 0, 0, 1)])
def test_any_stream_is_decoded(sizes: tuple[int, ...], color: tuple[int, int, int, int]) -> None:
    for seed in range(5):
        random = np.random.default_rng(seed)
        mask = random.random((23, 17)) < random.random()
        for word_bits in (4, 5, 7, 8) if max(color) < 16 else (8,):
            packed = pack(rgba(mask, color), word_bits, sizes)
            assert np.array_equal(decode_brush(packed, 23, 17, "mask"), mask)


def test_the_alpha_alone_counts() -> None:
    words = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 4), np.uint8)
    words[..., 3] *= MASKS["hole"]
    expected = words[..., 3] > 0
    assert expected.any()
    assert np.array_equal(decode_brush(pack(words.ravel()), HEIGHT, WIDTH, "mask"), expected)


def test_blocks_longer_than_a_length_can_say() -> None:
    mask = np.zeros((300, 400), bool)
    mask[100:, 50:] = True
    for color in ((255, 255, 255, 255), (1, 2, 3, 4)):
        assert np.array_equal(decode_brush(pack(rgba(mask, color)), 300, 400, "mask"), mask)


def test_it_agrees_with_label_studio_itself() -> None:
    """Needs `pip install --no-deps label-studio-converter`."""
    reference = pytest.importorskip("label_studio_converter.brush")
    for seed in range(20):
        random = np.random.default_rng(seed)
        mask = random.random((40, 31)) < random.random() ** 3
        theirs = reference.encode_rle(rgba(mask).astype(int))
        assert np.array_equal(decode_brush(theirs, 40, 31, "mask"), mask)
        ours = pack(random.integers(0, 3, mask.size * 4))
        alpha = reference.decode_rle(ours).reshape(40, 31, 4)[..., 3]
        assert np.array_equal(decode_brush(ours, 40, 31, "mask"), alpha > 0)


def test_a_polygon_is_in_percent(tmp_path: Path) -> None:
    corners = [(1, 1), (6, 1), (6, 5), (1, 5)]
    points = [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in corners]
    kinds = [region(kind, {"points": points}) for kind in ("polygonlabels", "polygon")]
    parsed = read_file([task(annotation(*kinds))], tmp_path)
    assert np.array_equal(pixels(parsed, 0), drawn((1, 1, 6, 5)))
    assert np.array_equal(pixels(parsed, 1), drawn((1, 1, 6, 5)))


def test_what_is_no_mask_is_counted(tmp_path: Path) -> None:
    box = region("rectanglelabels", {"x": 1, "y": 1, "width": 5, "height": 5})
    choice = {"type": "choices", "to_name": "image", "value": {"choices": ["good"]}}
    parsed = read_file(
        [
            task(
                annotation(brush(MASKS["hole"]), box, box, choice),
                annotation(brush(MASKS["hole"]), was_cancelled=True),
                drafts=[{"result": []}, {"result": []}],
                predictions=[{"result": []}],
            )
        ],
        tmp_path,
    )
    assert len(parsed.images[0].annotations) == 1
    assert parsed.left_out == {
        "rectanglelabels": 2,
        "choices": 1,
        "cancelled annotations": 1,
        "drafts": 2,
        "predictions": 1,
    }


def test_only_what_was_submitted_says_anything(images: Path) -> None:
    """A skipped task and one that nobody opened have no masks either; they are no images of nothing."""
    nothing = task(annotation(), data={"image": "bild ä.png"}, file_upload=None)
    skipped = annotation(brush(MASKS["hole"]), was_cancelled=True)
    for other in (task(skipped), task(), task(drafts=[{"result": [brush(MASKS["hole"])]}])):
        file = images.parent / "export.json"
        file.write_text(json.dumps([nothing, {**other, "file_upload": "leer.png"}]))
        out = images.parent / uuid.uuid4().hex
        command = ["ingest", f"--images={images}", f"--annotations={file}", f"--out={out}"]
        result = CliRunner().invoke(main, [*command, "--local"])
        assert result.exit_code == 0 and "2 images: 1 ok, 1 skipped" in result.output, result.output
        assert "1 tasks that were skipped or not submitted" in result.output
        (record,) = iter_records(out)
        assert (record.source_path, record.masks) == ("bild ä.png", ())
        listed = CliRunner().invoke(main, ["errors", "--list", str(out)]).output
        assert "leer.png" in listed and "no annotator has submitted it" in listed


def test_all_annotators_are_kept_with_their_time(tmp_path: Path) -> None:
    masks = [brush(MASKS["hole"]), brush(MASKS["border"])]
    two = [
        annotation(*masks, completed_by={"id": 4, "email": "a@b.c", "first_name": "A"}),
        annotation(masks[0], completed_by={"id": 5, "email": ""}, lead_time=None),
        annotation(masks[0], completed_by=6, lead_time=0),
        annotation(masks[0], completed_by=None),
    ]
    parsed = read_file([task(*two)], tmp_path)
    found = [(a.annotator, a.time_s, a.time_scope) for a in parsed.images[0].annotations]
    assert found == [
        ("a@b.c", 12.5, "image"),
        ("a@b.c", 12.5, "image"),
        ("5", None, None),
        ("6", 0, "image"),
        (None, 12.5, "image"),
    ]


def test_images_without_masks_are_images(tmp_path: Path) -> None:
    parsed = read_file([task(), task(annotation(), file_upload="b.jpg")], tmp_path)
    assert [(one.name, one.width, one.annotations) for one in parsed.images] == [
        (NAME, None, ()),
        ("b.jpg", None, ()),
    ]


@pytest.mark.parametrize(
    ("data", "name"),
    [
        ({"image": "s3://bucket/a.jpg"}, "s3://bucket/a.jpg"),
        ({"text": "see x.jpg", "image": "a.jpg"}, "a.jpg"),
        (
            {"text": "No path here.", "photo": "/data/local-files/?d=a/b"},
            "/data/local-files/?d=a/b",
        ),
        ({"number": 3, "url": "https://[host/a"}, "https://[host/a"),
        ({"image": "data:image/png;base64,AA", "name": "größe.png"}, "größe.png"),
    ],
)
def test_the_name_is_of_the_data_without_an_upload(data: Json, name: str) -> None:
    content = [task(annotation(brush(MASKS["hole"])), file_upload=None, data=data)]
    assert label_studio.read(content, "a.json").images[0].name == name


@pytest.mark.parametrize("upload", ["d7600e5b-tasks.json", "d7600e5b-Tasks.CSV"])
def test_an_imported_list_of_tasks_is_no_images_name(upload: str) -> None:
    data = {"image": "/data/local-files/?d=images/sa_1.jpg"}
    content = [task(annotation(brush(MASKS["hole"])), file_upload=upload, data=data)]
    assert label_studio.read(content, "a.json").images[0].name == data["image"]


def test_the_name_is_where_the_masks_belong() -> None:
    mask = brush(MASKS["hole"], to_name="photo")
    content = [task(annotation(mask), file_upload=None, data={"image": "a.jpg", "photo": "b.jpg"})]
    assert label_studio.read(content, "a.json").images[0].name == "b.jpg"


def edit(change: Callable[[Json, Json, Json], None]) -> Json:
    """A good file with a change to its task, the annotation, or its mask."""
    content = copy.deepcopy([task(annotation(brush(MASKS["hole"])))])
    entry = content[0]["annotations"][0]
    change(content[0], entry, entry["result"][0])
    return content


def put(name: str, value: Json) -> Json:
    """The mask with this field."""
    return edit(lambda _, __, mask: mask.update({name: value}))


def stream(values: Json) -> Json:
    """The mask with this stream."""
    return put("value", {"format": "rle", "rle": values})


def points(*found: Json) -> Json:
    return edit(lambda _, __, mask: mask.update(type="polygonlabels", value={"points": found}))


GOOD = pack(rgba(MASKS["hole"]))
MIN = [{"image": "a.jpg", "id": 1, "tag": [{"format": "rle", "rle": GOOD}], "annotator": 1}]
SECOND = region("rectanglelabels", {}, original_width=HEIGHT, original_height=WIDTH)
MALFORMED = {
    "no list": ({"a": 1}, "expected a list of tasks"),
    "no tasks": ([1, 2], "expected a list of tasks"),
    "minimal": (MIN, "task 1 has no annotations.*JSON-MIN: export JSON"),
    "annotations are an object": (edit(lambda t, _, __: t.update(annotations={})), "annotations: "),
    "annotations are numbers": (edit(lambda t, _, __: t.update(annotations=[7])), "annotations: "),
    "no result": (edit(lambda _, a, __: a.pop("result")), "annotation 11: result: 'None' found"),
    "result of text": (edit(lambda _, a, __: a.update(result=["a"])), "annotation 11: result: "),
    "time is text": (edit(lambda _, a, __: a.update(lead_time="12")), "lead_time is '12'"),
    "time is negative": (edit(lambda _, a, __: a.update(lead_time=-1)), "lead_time is -1"),
    "time is no number": (edit(lambda _, a, __: a.update(lead_time=float("nan"))), "lead_time is"),
    "corner is no number": (points([1, 1], [9, float("nan")], [9, 9]), "a coordinate is 'nan'"),
    "user is a list": (edit(lambda _, a, __: a.update(completed_by=[1])), "completed_by is"),
    "no name": (
        edit(lambda t, _, __: t.update(file_upload=None, data={"a": "b"})),
        "nor an image's path",
    ),
    "no data": (edit(lambda t, _, __: t.update(file_upload="", data=None)), "its data is 'None'"),
    "no size": (
        edit(lambda _, __, m: [m.pop("original_width"), m.pop("original_height")]),
        "no or",
    ),
    "half a size": (put("original_width", None), "original size is 'None'"),
    "size is text": (put("original_height", "7"), "original size is '7'"),
    "size is none": (put("original_height", 0), "original size is 0"),
    "size is huge": (put("original_height", 10**9), "more than 400,000,000"),
    "sizes differ": (edit(lambda _, a, __: a["result"].append(SECOND)), "7 x 9, but"),
    "turned": (put("image_rotation", 90), "turned by 90 degrees"),
    "second image": (put("item_index", 1), "second image"),
    "no value": (put("value", None), "value: '.None.' found"),
    "no format": (put("value", {"rle": GOOD}), "its format is None: expected 'rle'"),
    "no rle": (put("value", {"format": "rle"}), "has 0 bytes"),
    "rle is text": (stream("AAAB"), "its rle is 'AAAB'"),
    "rle of text": (stream(["1"]), "expected a list of bytes"),
    "rle of fractions": (stream([1.5]), "expected a list of bytes"),
    "rle above a byte": (stream([*GOOD[:-1], 256]), "no bytes, 0 to 255"),
    "rle below a byte": (stream([-1, *GOOD]), "no bytes, 0 to 255"),
    "rle of a header": (stream(GOOD[:6]), "has 6 bytes"),
    "rle cut off": (stream(GOOD[:-1]), "is cut off"),
    "rle cut early": (stream(GOOD[:7]), "is cut off"),
    "rle of another size": (stream(pack(rgba(MASKS["hole"][1:]))), "has 216 values: expected 252"),
    "rle of one channel": (stream(pack(MASKS["hole"].ravel() * 255)), "has 63 values"),
    "rle of large words": (stream(pack(rgba(MASKS["hole"]), 9)), "values of 9 bits"),
    "rle too long": (
        stream([*(252).to_bytes(4, "big"), *pack(np.zeros(300, int))[4:]]),
        "has 300 values, and says that it has 252",
    ),
    "polygon of two": (points([1, 1], [2, 2]), "expected three at least"),
    "polygon of numbers": (points(1, 2, 3), r"a point is 1: expected \[x, y\]"),
    "polygon of triples": (points([1, 1, 1], [2, 2, 2], [3, 3, 3]), "a point is"),
    "polygon of text": (points([1, 1], [2, "b"], [3, 3]), "a coordinate is 'b'"),
    "polygon in pixels": (
        points([1, 1], [2000, 2], [3, 3]),
        "a coordinate is 2000: expected percent",
    ),
    "polygon far away": (points([1, 1], [2, -2000], [3, 3]), "a coordinate is -2000"),
}


@pytest.mark.parametrize("what", MALFORMED)
def test_a_malformed_file_is_refused_by_its_name(what: str, tmp_path: Path) -> None:
    content, message = MALFORMED[what]
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(content), "utf-8")
    with pytest.raises(FormatError, match=f"(?s)bad.json: .*({message})"):
        read_annotations(path, "label-studio")


def test_the_file_that_the_malformed_ones_come_from_is_read(tmp_path: Path) -> None:
    assert np.array_equal(pixels(read_file(edit(lambda *_: None), tmp_path)), MASKS["hole"])


def test_every_cut_of_a_stream_is_refused() -> None:
    noise = np.random.default_rng(1).integers(0, 2, (HEIGHT, WIDTH)) * 255
    for packed in (GOOD, pack(rgba(noise)), pack(rgba(noise > 0, (1, 2, 3, 4)))):
        for length in range(len(packed)):
            with pytest.raises(FormatError, match="^mask: "):
                decode_brush(packed[:length], HEIGHT, WIDTH, "mask")


def test_damaged_streams_are_masks_or_refused() -> None:
    random = np.random.default_rng(2)
    for _ in range(2000):
        packed = list(GOOD)
        packed[random.integers(4, len(packed))] = int(random.integers(256))
        try:
            assert decode_brush(packed, HEIGHT, WIDTH, "mask").shape == (HEIGHT, WIDTH)
        except FormatError as error:
            assert str(error).startswith("mask: ")
