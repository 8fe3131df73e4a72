"""Every kind of file that a folder of photos holds, made from a real photo."""

import io
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps

from sa_engine import images
from sa_engine.images import (
    BadImage,
    decode_image,
    encode_jpeg,
    fit_short_side,
    resize_image,
    resize_region,
)


def save(image: Image.Image, file_format: str, **options: Any) -> bytes:
    """Encode with Pillow."""
    buffer = io.BytesIO()
    image.save(buffer, file_format, **options)
    return buffer.getvalue()


def png_chunk(kind: bytes, body: bytes) -> bytes:
    """One PNG chunk with its checksum."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png_16_bit(samples: np.ndarray, colour_type: int) -> bytes:
    """(H, W, C) uint16 as a 16-bit PNG, which Pillow reads but writes in grey only."""
    height, width = samples.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in samples)
    body = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    return b"\x89PNG\r\n\x1a\n" + body + png_chunk(b"IEND", b"")


def assert_close(decoded: np.ndarray, expected: np.ndarray, mean: float, most: int = 255) -> None:
    """Same shape, type and layout, and nearly the same pixels."""
    assert decoded.shape == expected.shape
    assert decoded.dtype == np.uint8 and decoded.flags.c_contiguous and decoded.flags.writeable
    difference = np.abs(decoded.astype(int) - expected)
    assert difference.mean() <= mean and difference.max() <= most


@pytest.mark.parametrize("file_format", ["PNG", "BMP", "TIFF", "PPM"])
def test_lossless_formats_are_exact(small_photo: np.ndarray, file_format: str) -> None:
    data = save(Image.fromarray(small_photo), file_format)
    np.testing.assert_array_equal(decode_image(data), small_photo)


@pytest.mark.parametrize(
    ("file_format", "options"),
    [
        ("JPEG", {"quality": 95}),
        ("JPEG", {"quality": 95, "progressive": True}),
        ("JPEG2000", {}),
        ("WEBP", {"quality": 95}),
        ("AVIF", {"quality": 95}),
    ],
)
def test_lossy_formats(small_photo: np.ndarray, file_format: str, options: dict) -> None:
    data = save(Image.fromarray(small_photo), file_format, **options)
    assert_close(decode_image(data), small_photo, mean=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "TIFF", "WEBP", "AVIF"])
def test_exif_orientation_is_applied_once(
    small_photo: np.ndarray, file_format: str, orientation: int
) -> None:
    """Stored so that a viewer shows the photo upright: decoded upright."""
    p = small_photo
    stored = {
        1: p,
        2: p[:, ::-1],
        3: p[::-1, ::-1],
        4: p[::-1],
        5: p.transpose(1, 0, 2),
        6: p.transpose(1, 0, 2)[::-1],
        7: p[::-1, ::-1].transpose(1, 0, 2),
        8: p.transpose(1, 0, 2)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {} if file_format in ("PNG", "TIFF") else {"quality": 95}
    image = Image.fromarray(np.ascontiguousarray(stored))
    assert_close(decode_image(save(image, file_format, exif=exif, **options)), p, mean=4)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("mode", ["RGB", "P", "I;16"])
def test_large_pictures_are_turned_and_converted_strip_by_strip(
    photos: list[np.ndarray], orientation: int, mode: str
) -> None:
    """As Pillow does it with the whole of them; the height is no multiple of a strip's."""
    image = Image.fromarray(photos[1]).resize((1500, 1201))
    image = image.convert("P") if mode == "P" else image
    if mode == "I;16":
        image = Image.fromarray(np.asarray(image.convert("L")) * np.uint16(257))
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored = Image.open(io.BytesIO(save(image, "PNG", exif=exif, compress_level=1)))
    whole = ImageOps.exif_transpose(stored)
    expected = np.asarray(whole) // 257 if mode == "I;16" else np.asarray(whole.convert("RGB"))
    decoded = decode_image(save(image, "PNG", exif=exif, compress_level=1))
    assert decoded.flags.c_contiguous and decoded.flags.writeable
    np.testing.assert_array_equal(decoded, np.broadcast_to(expected.T, decoded.T.shape).T)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_the_picture_and_its_pixels(tmp_path: Path) -> None:
    """Pillow's four bytes a pixel and the three of the result; not the same again for each step."""
    side, exif = 6000, Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (side, side)).save(tmp_path / "large.jpg", exif=exif)
    code = """if True:
        import re, sys
        from pathlib import Path
        from sa_engine.images import decode_image
        def peak():
            return int(re.search("VmHWM: *(.*) kB", Path("/proc/self/status").read_text())[1])
        data, before = Path(sys.argv[1]).read_bytes(), peak()
        decode_image(data)
        print(peak() - before)
    """
    command = [sys.executable, "-c", code, str(tmp_path / "large.jpg")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 7 < int(done.stdout) * 1024 / side**2 < 9


def test_unreadable_exif_is_ignored(small_photo: np.ndarray) -> None:
    data = save(Image.fromarray(small_photo), "JPEG", exif=b"Exif\0\0not a TIFF header at all")
    assert decode_image(data).shape == small_photo.shape


def test_grey_16_bit_is_scaled_not_clipped(small_photo: np.ndarray) -> None:
    grey = small_photo[..., :1]
    data = save(Image.fromarray(grey[..., 0].astype(np.uint16) * 257), "PNG")
    np.testing.assert_array_equal(decode_image(data), np.repeat(grey, 3, axis=2))
    tiff = save(Image.fromarray(grey[..., 0].astype(np.uint16) * 257), "TIFF")
    np.testing.assert_array_equal(decode_image(tiff), np.repeat(grey, 3, axis=2))


def test_colour_16_bit_is_scaled(small_photo: np.ndarray) -> None:
    wide = small_photo.astype(np.uint16) * 257
    np.testing.assert_array_equal(decode_image(png_16_bit(wide, colour_type=2)), small_photo)


def test_grey_and_bilevel(small_photo: np.ndarray) -> None:
    grey = Image.fromarray(small_photo).convert("L")
    expected = np.repeat(np.asarray(grey)[..., None], 3, axis=2)
    np.testing.assert_array_equal(decode_image(save(grey, "PNG")), expected)
    bilevel = grey.point(lambda v: 255 * (v > 127), "1")
    expected = np.where(expected > 127, 255, 0)
    np.testing.assert_array_equal(decode_image(save(bilevel, "PNG")), expected)


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_alpha_is_composited_over_white(small_photo: np.ndarray, mode: str) -> None:
    image = Image.fromarray(small_photo).convert(mode)
    alpha = np.full(small_photo.shape[:2], 255, np.uint8)
    alpha[:, :40], alpha[:, 40:80] = 0, 128
    image.putalpha(Image.fromarray(alpha))
    opaque = np.asarray(image.convert("RGB")).astype(float)
    expected = opaque * (alpha[..., None] / 255) + 255 * (1 - alpha[..., None] / 255)
    decoded = decode_image(save(image, "PNG"))
    assert (decoded[:, :40] == 255).all()
    assert_close(decoded, expected.round().astype(int), mean=1, most=1)


def test_palette_with_and_without_transparency(small_photo: np.ndarray) -> None:
    palette = Image.fromarray(small_photo).quantize(64)
    expected = np.asarray(palette.convert("RGB")).copy()
    np.testing.assert_array_equal(decode_image(save(palette, "PNG")), expected)
    clear = np.asarray(palette) == 5
    assert clear.any()
    expected[clear] = 255
    data = save(palette, "PNG", transparency=5)
    np.testing.assert_array_equal(decode_image(data), expected)
    np.testing.assert_array_equal(decode_image(save(palette, "GIF", transparency=5)), expected)


def test_cmyk_jpeg(small_photo: np.ndarray) -> None:
    data = save(Image.fromarray(small_photo).convert("CMYK"), "JPEG", quality=95)
    assert_close(decode_image(data), small_photo, mean=4)


def test_one_pixel(small_photo: np.ndarray) -> None:
    decoded = decode_image(save(Image.fromarray(small_photo[:1, :1]), "PNG"))
    np.testing.assert_array_equal(decoded, small_photo[:1, :1])


def test_phone_jpeg_gives_its_first_picture(small_photo: np.ndarray) -> None:
    first, second = Image.fromarray(small_photo), Image.fromarray(255 - small_photo)
    data = save(first, "MPO", save_all=True, append_images=[second], quality=95)
    assert Image.open(io.BytesIO(data)).n_frames == 2
    assert_close(decode_image(data), small_photo, mean=4)


@pytest.mark.parametrize("file_format", ["GIF", "PNG", "WEBP", "TIFF", "AVIF"])
def test_animated_and_multi_page_are_refused(small_photo: np.ndarray, file_format: str) -> None:
    frames = [Image.fromarray(small_photo), Image.fromarray(255 - small_photo)]
    data = save(frames[0], file_format, save_all=True, append_images=frames[1:])
    with pytest.raises(BadImage, match="more than one frame"):
        decode_image(data)


@pytest.mark.timeout(60)
def test_pages_are_not_counted(small_photo: np.ndarray) -> None:
    """To count them would take an hour: its time is the square of their number."""
    tags = [(256, 4, 1, 1), (257, 4, 1, 1), (258, 3, 1, 8), (262, 3, 1, 1), (273, 4, 1, 0)]
    entries = b"".join(struct.pack("<HHII", *tag) for tag in tags)
    size = 2 + len(entries) + 4
    offsets = [*range(8 + size, 8 + size * 500_000, size), 0]
    pages = [struct.pack("<H", len(tags)) + entries + struct.pack("<I", next) for next in offsets]
    with pytest.raises(BadImage, match="more than one frame"):
        decode_image(b"II*\0" + struct.pack("<I", 8) + b"".join(pages))


@pytest.mark.parametrize("file_format", ["JPEG", "PNG", "WEBP", "TIFF", "GIF", "BMP", "AVIF"])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.9])
def test_truncated_files_are_refused(
    small_photo: np.ndarray, file_format: str, kept: float
) -> None:
    data = save(Image.fromarray(small_photo), file_format)
    with pytest.raises(BadImage):
        decode_image(data[: int(len(data) * kept)])


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"Dear diary, this is a text.\n" * 50, "not an image .* begins with b'Dear diary, '"),
        (b"\xff\xd8\xff\xe0" + bytes(500), "damaged, or an unusual JPEG"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + bytes(17), "damaged, or an unusual PNG: .*checksum"),
        (b"II*\0\x08\0\0\0", "TIFF"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "not an image .*%!PS"),
    ],
)
def test_files_that_are_no_images(data: bytes, reason: str) -> None:
    with pytest.raises(BadImage, match=reason) as caught:
        decode_image(data)
    assert caught.value.reason == str(caught.value)


def test_jpegs_that_pillow_does_not_read_say_why(small_photo: np.ndarray) -> None:
    data = bytearray(save(Image.fromarray(small_photo), "JPEG"))
    data[data.index(b"\xff\xc0") + 4] = 12
    with pytest.raises(BadImage, match="unusual JPEG: .*12-bit"):
        decode_image(bytes(data))


@pytest.mark.parametrize("kind", [b"zTXt", b"iCCP"])
def test_notes_in_a_png_may_be_long_but_not_without_end(
    small_photo: np.ndarray, kind: bytes
) -> None:
    data = save(Image.fromarray(small_photo), "PNG")

    def with_notes(size: int) -> bytes:
        return data[:33] + png_chunk(kind, b"a\0\0" + zlib.compress(bytes(size))) + data[33:]

    np.testing.assert_array_equal(decode_image(with_notes(5_000_000)), small_photo)
    with pytest.raises(BadImage, match="too large"):
        decode_image(with_notes(70_000_000))


def test_float_samples_are_refused(small_photo: np.ndarray) -> None:
    data = save(Image.fromarray(small_photo[..., 0].astype(np.float32)), "TIFF")
    with pytest.raises(BadImage, match="floating-point"):
        decode_image(data)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize("side", [20_001, 60_000])
def test_decompression_bomb_is_refused_from_its_header(side: int) -> None:
    header = png_chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0))
    data = b"\x89PNG\r\n\x1a\n" + header + png_chunk(b"IDAT", zlib.compress(b"\0" * 99))
    with pytest.raises(BadImage, match="400,000,000 pixels"):
        decode_image(data + png_chunk(b"IEND", b""))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_flipped_bytes_never_escape_as_another_error(small_photo: np.ndarray) -> None:
    """Any damage is a picture or a BadImage, nothing else."""
    rng = np.random.default_rng(0)
    for file_format in ("JPEG", "PNG", "GIF", "TIFF", "WEBP", "BMP"):
        original = np.frombuffer(save(Image.fromarray(small_photo), file_format), np.uint8)
        for _ in range(40):
            damaged = original.copy()
            damaged[rng.integers(0, min(200, len(damaged)), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode_image(damaged.tobytes()).ndim == 3
            except BadImage as error:
                assert error.reason


@pytest.mark.parametrize(
    ("size", "short_side", "expected"),
    [
        ((3000, 4500), 1500, (1500, 2250)),
        ((4500, 3000), 1500, (2250, 1500)),
        ((2003, 3001), 1500, (1500, 2247)),
        ((4, 5), 2, (2, 3)),
        ((1000, 4000), 1500, (1000, 4000)),
        ((3000, 4500), None, (3000, 4500)),
        ((1, 1), 1500, (1, 1)),
    ],
)
def test_fit_short_side(
    size: tuple[int, int], short_side: int | None, expected: tuple[int, int]
) -> None:
    assert fit_short_side(*size, short_side) == expected


def test_resize_image_is_pillows_and_keeps_the_array_of_equal_size(
    small_photo: np.ndarray,
) -> None:
    assert resize_image(small_photo, *small_photo.shape[:2]) is small_photo
    expected = Image.fromarray(small_photo).resize((50, 40), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(resize_image(small_photo, 40, 50), np.asarray(expected))


@pytest.mark.parametrize("size", [(30, 40), (37, 45), (200, 260)])
def test_resize_region_equals_cut_then_resize(
    small_photo: np.ndarray, size: tuple[int, int]
) -> None:
    cut = Image.fromarray(small_photo[11:48, 20:65])
    expected = np.asarray(cut.resize(size[::-1], Image.Resampling.BILINEAR))
    result = resize_region(small_photo, (20.0, 11.0, 65.0, 48.0), *size)
    np.testing.assert_array_equal(result, expected)


def test_resize_region_keeps_the_fraction_of_its_box() -> None:
    """On a ramp, bilinear sampling gives the coordinates back: half a pixel must not be lost."""
    ramp = np.repeat(np.arange(200, dtype=np.uint8)[None, :, None], 8, axis=0).repeat(3, axis=2)
    result = resize_region(ramp, (10.5, 0.0, 170.5, 8.0), 8, 40)[4, 5:-5, 0]
    centres = 10.5 + (np.arange(40) + 0.5) * 4 - 0.5
    assert np.abs(result - centres[5:-5]).max() <= 0.51


def test_resize_region_clips_to_the_image(small_photo: np.ndarray) -> None:
    height, width = small_photo.shape[:2]
    result = resize_region(small_photo, (-0.001, 0.0, width + 0.001, height), 20, 20)
    np.testing.assert_array_equal(result, resize_image(small_photo, 20, 20))


def test_encode_jpeg_is_deterministic_and_plain(small_photo: np.ndarray) -> None:
    data = encode_jpeg(small_photo, 95)
    assert data == encode_jpeg(small_photo.copy(), 95)
    assert len(data) > len(encode_jpeg(small_photo, 50))
    assert not Image.open(io.BytesIO(data)).getexif()
    assert_close(decode_image(data), small_photo, mean=4)


def test_suffixes_are_lower_case_with_a_dot() -> None:
    assert {".jpg", ".jpeg", ".png", ".webp", ".tif"} <= images.IMAGE_SUFFIXES
    assert all(s.startswith(".") and s == s.lower() for s in images.IMAGE_SUFFIXES)
