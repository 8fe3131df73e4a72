"""Nothing but pixels leaves the privacy stage: no metadata, no thumbnail, nothing hidden."""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from blurring import (
    assert_done,
    audit,
    blur,
    decoded,
    files,
    jpeg,
    work_of,
)
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin

from sa_engine.privacy.redact import redacted_area

SECRETS = [b"SECRET-exif", b"SECRET-gps", b"SECRET-xmp", b"SECRET-iptc", b"SECRET-note"]
TRACES = [
    *SECRETS,
    b"Exif\0\0",
    b"http://ns.adobe.com",
    b"adobe:ns:meta",
    b"xmpmeta",
    b"Photoshop",
    b"ICC_PROFILE",
    b"acsp",  # in the head of every colour profile
    b"MPF\0",
]
XMP = (
    b'<x:xmpmeta xmlns:x="adobe:ns:meta/">'
    b'<a xmlns="http://ns.adobe.com/">SECRET-xmp</a></x:xmpmeta>'
)


def exif_with(thumbnail: bytes, orientation: int) -> bytes:
    """EXIF with a description, a place on earth and a thumbnail; begins with the TIFF header."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    exif[0x010E] = "SECRET-exif"
    place = exif.get_ifd(0x8825)
    place.update({1: "N", 2: (52.0, 31.0, 1.5), 3: "E", 4: (13.0, 24.0, 0.5), 0x12: "SECRET-gps"})
    first = bytearray(exif.tobytes().removeprefix(b"Exif\0\0"))
    first += b"\0" * (len(first) % 2)
    order = "<" if first[:2] == b"II" else ">"
    start = struct.unpack_from(f"{order}I", first, 4)[0]
    (entries,) = struct.unpack_from(f"{order}H", first, start)
    struct.pack_into(f"{order}I", first, start + 2 + 12 * entries, len(first))
    where = len(first) + 2 + 3 * 12 + 4
    second = struct.pack(
        f"{order}H HHIHH HHII HHII I",
        *(3, 0x0103, 3, 1, 6, 0, 0x0201, 4, 1, where, 0x0202, 4, 1, len(thumbnail), 0),
    )
    return bytes(first) + second + thumbnail


def segment(marker: int, payload: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(payload) + 2) + payload


@dataclass(frozen=True)
class Telling:
    """Images that tell more than they show, by key, what each has of it, and what it shows."""

    data: Mapping[str, bytes]
    tells: Mapping[str, list[bytes]]
    upright: np.ndarray


@pytest.fixture(scope="module")
def telling(photos: list[np.ndarray]) -> Telling:
    """Photos that lie on their side, with everything that cameras and editors add."""
    upright = Image.fromarray(photos[0][:240, 110:350]).reduce(2).crop((0, 0, 120, 100))
    stored = upright.transpose(Image.Transpose.ROTATE_90)  # as orientation 6 has it
    thumbnail = jpeg(stored.reduce(2))
    exif = exif_with(thumbnail, 6)
    icc = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    photo = jpeg(stored, icc_profile=icc)
    added = [
        segment(0xE1, b"Exif\0\0" + exif),
        segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0" + XMP),
        segment(0xED, b"Photoshop 3.0\x008BIM\x04\x04\0\0\0\0\0\x0fSECRET-iptc"),
        segment(0xFE, b"SECRET-note"),
    ]
    camera = photo[:2] + b"".join(added) + photo[2:] + jpeg(stored)  # such as a gain map

    notes = PngImagePlugin.PngInfo()
    notes.add_text("Comment", "SECRET-note")
    notes.add_itxt("XML:com.adobe.xmp", XMP.decode())
    png, webp, tiff, pair = (io.BytesIO() for _ in range(4))
    stored.save(png, "PNG", pnginfo=notes, exif=b"Exif\0\0" + exif, icc_profile=icc)
    stored.save(webp, "WEBP", quality=95, exif=b"Exif\0\0" + exif, xmp=XMP, icc_profile=icc)
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x0112], tags[0x010E], tags[700], tags[34675] = 6, "SECRET-exif", XMP, icc
    tags[33723], tags[0x013B] = b"SECRET-iptc", "SECRET-note"
    stored.save(tiff, "TIFF", tiffinfo=tags)
    other = upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    turned = exif_with(b"", 1)
    upright.save(pair, "MPO", quality=95, save_all=True, append_images=[other], exif=turned)
    return Telling(
        {
            "camera.jpg": camera,
            "notes.png": png.getvalue() + jpeg(stored),
            "notes.webp": webp.getvalue(),
            "notes.tif": tiff.getvalue(),
            "pair.jpg": pair.getvalue(),
        },
        {
            "camera.jpg": [*TRACES[:-1], thumbnail],
            "notes.png": [SECRETS[0], SECRETS[1], SECRETS[2], SECRETS[4], b"eXIf", thumbnail],
            "notes.webp": [*SECRETS[:3], b"acsp", thumbnail],
            "notes.tif": [SECRETS[0], *SECRETS[2:], b"acsp"],
            "pair.jpg": [*SECRETS[:2], b"MPF\0"],
        },
        np.array(upright).astype(int),
    )


@pytest.fixture(scope="module")
def told_less(
    telling: Telling, portrait_with_holes: bytes, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """What is released of them."""
    folder = tmp_path_factory.mktemp("telling")
    (folder / "photos").mkdir()
    for key, data in telling.data.items():
        (folder / "photos" / key).write_bytes(data)
    (folder / "photos" / "holes.png").write_bytes(portrait_with_holes)
    assert_done(blur(folder / "photos", folder / "out"))
    return folder / "out"


@pytest.fixture(scope="module")
def portrait_with_holes(photos: list[np.ndarray]) -> bytes:
    """The astronaut, her face transparent: whoever drops the alpha channel sees it."""
    pixels = np.array(Image.fromarray(photos[0]).reduce(4).convert("RGBA"))
    pixels[10:55, 35:80, 3] = 0
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


@pytest.mark.parametrize("key", ["camera.jpg", "notes.png", "notes.webp", "notes.tif", "pair.jpg"])
def test_nothing_but_pixels_is_released(telling: Telling, told_less: Path, key: str) -> None:
    for trace in telling.tells[key]:
        assert trace in telling.data[key], "otherwise there is nothing to lose"
    released = (told_less / key).read_bytes()
    for trace in {*TRACES, *telling.tells[key]}:
        assert trace not in released
    assert released.find(b"\xff\xd8\xff", 1) == -1, "a second picture"
    with Image.open(io.BytesIO(released)) as image:
        assert dict(image.getexif()) == {} or image.format == "TIFF"
        assert not image.getexif().get_ifd(0x8825)
        assert image.info.get("icc_profile") is None
    assert (
        parts_of(released)
        <= {
            "camera.jpg": {"APP0 JFIF", "DQT", "SOF0", "DHT", "SOS"},
            "notes.png": {"IHDR", "IDAT", "IEND"},
            "notes.webp": {"VP8 "},
            # Sizes, sample format, compression and where the strips are.
            "notes.tif": {256, 257, 258, 259, 262, 273, 277, 278, 279, 284, 317, 339},
            "pair.jpg": {"APP0 JFIF", "DQT", "SOF0", "DHT", "SOS"},
        }[key]
    )


@pytest.mark.parametrize("key", ["camera.jpg", "notes.png", "notes.webp", "notes.tif", "pair.jpg"])
def test_images_are_released_upright(telling: Telling, told_less: Path, key: str) -> None:
    pixels = decoded(told_less / key)
    assert pixels.shape == telling.upright.shape == (100, 120, 3)
    boxes = [region["box"] for region in audit(work_of(told_less))[key]["regions"]]
    assert boxes, "there is a face, and it is found when it is upright"
    elsewhere = ~redacted_area(boxes, 100, 120)
    assert np.abs(pixels - telling.upright)[elsewhere].mean() < 8


def test_what_transparency_hides_is_not_released(
    told_less: Path, portrait_with_holes: bytes
) -> None:
    hidden = np.array(Image.open(io.BytesIO(portrait_with_holes)))[10:55, 35:80, :3]
    assert hidden.std() > 40
    with Image.open(told_less / "holes.png") as image:
        assert image.mode == "RGB"
        assert (np.array(image)[10:55, 35:80] == 255).all()


def parts_of(data: bytes) -> set[Any]:
    """What a JPEG, PNG, WebP or TIFF file is made of, from its first byte to its last."""
    if data[:2] == b"\xff\xd8":
        return set(jpeg_parts(data))
    if data[:4] == b"RIFF":
        assert struct.unpack("<I", data[4:8])[0] == len(data) - 8
        (size,) = struct.unpack("<I", data[16:20])
        assert len(data) == 20 + size + size % 2, "one chunk"
        return {data[12:16].decode()}
    if data[:4] in (b"II*\0", b"MM\0*"):
        with Image.open(io.BytesIO(data)) as image:
            assert struct.unpack_from("<I", data, 4)[0] > 0
            return set(image.tag_v2)
    names, place = [], 8
    while place < len(data):
        (size,) = struct.unpack_from(">I", data, place)
        names.append(data[place + 4 : place + 8].decode())
        body = data[place + 4 : place + 8 + size]
        assert struct.unpack_from(">I", data, place + 8 + size)[0] == zlib.crc32(body)
        place += 12 + size
    assert names[-1] == "IEND"
    return set(names)


def jpeg_parts(data: bytes) -> Iterator[str]:
    place = 2
    names = {0xDB: "DQT", 0xC0: "SOF0", 0xC4: "DHT", 0xDA: "SOS"}
    while True:
        marker = data[place + 1]
        (size,) = struct.unpack_from(">H", data, place + 2)
        payload = data[place + 4 : place + 2 + size]
        if marker == 0xE0:
            yield f"APP0 {payload[:4].decode()}"
            assert len(payload) == 14, "JFIF without its thumbnail"
        else:
            yield names.get(marker, f"marker {marker:02x}")
        place += 2 + size
        if marker == 0xDA:
            break
    assert data[place:].find(b"\xff\xd9") == len(data) - place - 2, "nothing after the picture"


def test_colour_profiles_stay_if_asked_for(telling: Telling, tmp_path: Path) -> None:
    images = tmp_path / "photos"
    images.mkdir()
    srgb, lab = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile(space)).tobytes()
        for space in ("sRGB", "LAB")
    )
    photo = Image.fromarray(telling.upright.astype(np.uint8))
    for suffix in ("jpg", "png", "webp", "tif", "avif"):
        photo.save(images / f"a.{suffix}", icc_profile=srgb)
    photo.save(images / "lab.png", icc_profile=lab)
    (images / "camera.jpg").write_bytes(telling.data["camera.jpg"])
    assert_done(blur(images, tmp_path / "out", "--keep-icc"))
    for key, data in files(tmp_path / "out").items():
        kept = Image.open(io.BytesIO(data)).info.get("icc_profile")
        before = Image.open(images / key).info["icc_profile"]
        assert kept == (None if key == "lab.png" else before), key
        for trace in TRACES:
            assert trace not in data or trace in (b"ICC_PROFILE", b"acsp"), key
