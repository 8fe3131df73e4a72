"""Instance maps in PNG files: every id and colour, and maps that are none."""

import io
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sa_engine import rle
from sa_engine.formats import instance_png
from sa_engine.formats.files import hash_annotations, read_annotations
from sa_engine.formats.model import AnnotatedImage, FormatError, Patch
from sa_engine.formats.raster import rasterize

HEIGHT, WIDTH = 12, 17


def masks() -> dict[str, np.ndarray]:
    """Masks that formats are known to lose, none over another: (12, 17) bool."""
    names = ("hole", "two parts", "one pixel", "border")
    found = {name: np.zeros((HEIGHT, WIDTH), bool) for name in names}
    found["hole"][2:7, 3:9] = True
    found["hole"][4:6, 5:7] = False
    found["two parts"][1:3, 1:3] = found["two parts"][8:11, 10:15] = True
    found["one pixel"][5, 5] = True  # in the hole
    found["border"][0, :] = found["border"][:, -1] = True
    return found


def png(pixels: np.ndarray | Image.Image, **options: object) -> bytes:
    out = io.BytesIO()
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    image.save(out, "PNG", **options)
    return out.getvalue()


def image_of(content: bytes) -> AnnotatedImage:
    (image,) = instance_png.read(content, "folder/bild ä.png").images
    return image


def drawn(content: bytes) -> dict[str | None, np.ndarray]:
    image = image_of(content)
    assert image.height and image.width
    return {
        one.original_id: rle.decode(rasterize(one.shapes, image.height, image.width))
        for one in image.annotations
    }


def mapped(ids: tuple[int, ...], dtype: type = np.uint8) -> np.ndarray:
    pixels = np.zeros((HEIGHT, WIDTH), dtype)
    for mask, value in zip(masks().values(), ids, strict=True):
        pixels[mask] = value
    return pixels


def assert_drawn(content: bytes, ids: tuple[object, ...]) -> None:
    found = drawn(content)
    assert set(found) == {str(value) for value in ids}
    for mask, value in zip(masks().values(), ids, strict=True):
        np.testing.assert_array_equal(found[str(value)], mask)


@pytest.mark.parametrize(
    ("ids", "dtype"), [((7, 1, 255, 30), np.uint8), ((300, 1, 65535, 256), np.uint16)]
)
def test_ids_come_back(ids: tuple[int, ...], dtype: type) -> None:
    assert_drawn(png(mapped(ids, dtype)), ids)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_a_palette_means_its_index(bits: int) -> None:
    ids = (1, 2, 3, 3) if bits == 2 else (7, 1, 15, 3)
    image = Image.fromarray(mapped(ids))
    image.putpalette([0, 0, 0] + [200, 10, 10] * 200)  # all of one colour
    content = png(image, bits=bits)
    if bits == 2:
        assert set(drawn(content)) == {"1", "2", "3"}
    else:
        assert_drawn(content, ids)


def test_thirty_two_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pillow has read maps of 16 bits as of 32 ones: its mode I."""
    ids = (70000, 1, 2**31 - 1, 65536)
    wide = Image.fromarray(mapped(ids, np.int32))
    assert wide.mode == "I"
    monkeypatch.setattr(instance_png.Image, "open", lambda *_, **__: wide)
    assert_drawn(b"", ids)


def test_a_map_of_one_bit_is_one_instance() -> None:
    found = drawn(png(masks()["hole"]))
    np.testing.assert_array_equal(found["1"], masks()["hole"])


def test_grey_of_few_bits_is_not_stretched() -> None:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", 4, 1, 4, 0, 0, 0, 0)  # 4 x 1 pixels of 4 bits
    data = zlib.compress(bytes([0, 0x01, 0x2F]))
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data)
    assert set(drawn(content + chunk(b"IEND", b""))) == {"1", "2", "15"}


@pytest.mark.parametrize("channels", [3, 4])
def test_colours_are_instances(channels: int) -> None:
    colours = ((255, 0, 0), (0, 255, 0), (0, 0, 255), (1, 0, 0))
    pixels = np.zeros((HEIGHT, WIDTH, channels), np.uint8)
    if channels == 4:
        pixels[..., 3] = 255
    for mask, colour in zip(masks().values(), colours, strict=True):
        pixels[mask, :3] = colour
    assert_drawn(png(pixels), tuple(",".join(map(str, colour)) for colour in colours))


def test_what_is_transparent_is_background() -> None:
    pixels = np.full((HEIGHT, WIDTH, 4), 255, np.uint8)
    pixels[:, 4:, 3] = 0
    found = drawn(png(pixels))
    assert set(found) == {"255,255,255"} and found["255,255,255"].sum() == 4 * HEIGHT


def test_an_image_without_instances() -> None:
    image = image_of(png(np.zeros((HEIGHT, WIDTH), np.uint8)))
    assert (image.name, image.height, image.width) == ("bild ä.png", HEIGHT, WIDTH)
    assert image.annotations == ()


def test_many_ids_at_once() -> None:
    """Each window is the least that holds its id."""
    rng = np.random.default_rng(3)
    pixels = np.zeros((300, 400), np.uint16)
    for value in range(1, 501):
        top, left = rng.integers(0, (280, 380))
        pixels[top : top + 20, left : left + 20] = value
    annotations = image_of(png(pixels)).annotations
    assert {one.original_id for one in annotations} == set(map(str, np.unique(pixels)[1:]))
    for one in annotations:
        (patch,) = one.shapes
        assert isinstance(patch, Patch)
        rows, columns = np.nonzero(pixels == int(one.original_id or 0))
        assert (patch.left, patch.top) == (columns.min(), rows.min())
        assert patch.pixels.shape == (np.ptp(rows) + 1, np.ptp(columns) + 1)
        assert patch.pixels.sum() == len(rows)


def test_five_thousand_ids_are_a_map() -> None:
    pixels = np.arange(5001, dtype=np.uint16).reshape(3, 1667)
    assert len(image_of(png(pixels)).annotations) == 5000


def test_maps_are_read_only_if_their_format_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(mapped((1, 2, 3, 4))))
    (tmp_path / "notes.json").write_text("{}")
    with zipfile.ZipFile(tmp_path / "maps.zip", "w") as archive:
        archive.writestr("SegmentationObject/b.png", png(mapped((1, 2, 3, 4))))
    for path, name in ((tmp_path, "a.png"), (tmp_path / "maps.zip", "b.png")):
        (parsed,) = read_annotations(path, "png")
        assert (parsed.format, parsed.images[0].name) == ("png", name)
        assert len(parsed.images[0].annotations) == 4
    with pytest.raises(FormatError, match="a.png: of no format that is known"):
        read_annotations(tmp_path / "a.png")
    (tmp_path / "notes.json").unlink()
    with pytest.raises(FormatError, match="no annotations there"):
        read_annotations(tmp_path)
    with pytest.raises(FormatError, match="a.png: no COCO annotations"):
        read_annotations(tmp_path / "a.png", "coco")


def test_the_hash_is_of_the_maps(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(mapped((1, 2, 3, 4))))
    before = hash_annotations(tmp_path, "png")
    (tmp_path / "a.png").write_bytes(png(mapped((1, 2, 3, 5))))
    assert hash_annotations(tmp_path, "png") != before


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.fromarray(mapped((1, 2, 3, 4))).save(out, "JPEG")
    return out.getvalue()


def scaled() -> bytes:
    """A coloured map that was made smaller smoothly."""
    rng = np.random.default_rng(5)
    blocks = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
    return png(Image.fromarray(blocks).resize((300, 300), Image.Resampling.BICUBIC))


def sixteen_bit_colours() -> bytes:
    content = bytearray(png(np.zeros((2, 2, 3), np.uint8)))
    content[24] = 16
    return bytes(content)


GREY = png(np.ones((90, 90), np.uint8) * np.arange(90, dtype=np.uint8))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({}, "expected a PNG file"),
        (None, "expected a PNG file"),
        (b"", "not a PNG that can be read"),
        (b"no picture", "not a PNG that can be read"),
        (GREY[:8], "not a PNG that can be read"),
        (GREY[:30], "not a PNG that can be read"),
        (GREY[: len(GREY) // 2], "not a PNG that can be read"),
        (GREY[:16] + bytes(8) + GREY[24:], "not a PNG that can be read"),
        (GREY[:60] + b"\0\0\0\0\0\0" + GREY[66:], "not a PNG that can be read"),
        (jpeg(), "not a PNG that can be read"),
        (sixteen_bit_colours(), "not a PNG that can be read"),
        (png(Image.new("LA", (3, 3))), "a PNG of mode LA"),
        (scaled(), r"[0-9]{2},[0-9]{3} ids: expected at most 5,000"),
        (png(np.arange(5002, dtype=np.uint16).reshape(2, -1)), "5,001 ids"),
    ],
)
def test_what_is_wrong_is_told(content: object, message: str) -> None:
    with pytest.raises(FormatError, match=f"^map\\.png: .*{message}"):
        instance_png.read(content, "map.png")
