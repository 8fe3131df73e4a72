"""A folder of hostile files goes through the real command, and every one is accounted for.

`hostile_files` is the table: each file, what is in it, and what must become of it.
"""

import hashlib
import json
import os
import re
import signal
import stat
import struct
import subprocess
import sys
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
from PIL import Image
from test_images import png_16_bit, png_chunk, save

from sa_engine.images import decode_image
from sa_engine.reader import iter_records, read_image

QUICK = ("--set=points_per_side=4", "--set=crop_n_layers=0", "--threads-per-worker=2", "--local")
DROP_RIGHTS = ("setpriv", "--bounding-set=-dac_override,-dac_read_search")
SMALL = (16, 12)
# A process between: the peak of a child counts from its parent's size, and pytest's is large.
MEASURE = """if True:
    import resource, subprocess, sys
    exit_code = subprocess.call(sys.argv[1:])
    print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
    sys.exit(exit_code)
"""
PNG_START = b"\x89PNG\r\n\x1a\n"
YEAR_NS = 365 * 86_400 * 10**9


class Ok(NamedTuple):
    """A record of this size; `like`: it shows the upright photo."""

    width: int = SMALL[0]
    height: int = SMALL[1]
    like: bool = False


class Failed(NamedTuple):
    """A line in `_run/errors` whose message has this pattern."""

    pattern: str
    step: str = "prepare"


class Ignored(NamedTuple):
    """Counted in `run.json` under this reason; None: its folder is listed elsewhere, or counted."""

    reason: str | None


Content = bytes | Callable[[Path], Any]
Row = tuple[str, Content, Ok | Failed | Ignored]

ELSEWHERE = Ignored(None)
UNKNOWN = Failed("not an image in a format that can be read: it begins with b")
CUT = Failed("truncated")
TOO_LARGE = Failed("more than 400,000,000 pixels")
FRAMES = Failed("more than one frame, expected one picture")
EMPTY = Failed("the file is empty")
BROKEN = Failed("cannot be decoded: .")
DIARY = Failed("it begins with b'Dear diary,")
TERABYTE = Failed("1,099,511,627,776 bytes is no photo", "read")
NOT_A_FILE = Failed("not a regular file", "read")


def hostile_files(photo: Image.Image) -> list[Row]:
    """The table, in the order in which the files are made."""
    like, wide, tall = Ok(*photo.size, like=True), (20_000, 8), (8, 20_000)
    turned = Image.fromarray(np.rot90(np.asarray(photo)).copy())
    small = photo.resize(SMALL)
    palette = small.quantize(9)
    jpeg, png, tiff = (save(photo, kind) for kind in ("JPEG", "PNG", "TIFF"))
    progressive = save(photo, "JPEG", progressive=True)
    cmyk = save(photo.convert("CMYK"), "JPEG", quality=95)
    notes = zlib.compress(bytes(70 << 20))

    def grey(samples: type, scale: float, kind: str) -> bytes:
        values = np.asarray(small.convert("L")).astype(float) * scale
        return save(Image.fromarray(values.astype(samples)), kind)

    return [
        # What is cut off, damaged or edited by hand.
        ("broken/header only.jpg", jpeg[:20], Failed("damaged, or an unusual JPEG")),
        ("broken/tables only.jpg", jpeg[:400], Failed("[Tt]runcated")),
        ("broken/half.jpg", jpeg[: len(jpeg) // 2], CUT),
        ("broken/last bytes missing.jpg", jpeg[:-40], CUT),
        ("broken/half.png", png[: len(png) // 2], CUT),
        ("broken/half.tiff", tiff[: len(tiff) // 2], Failed("TIFF|truncated")),
        ("broken/half.webp", save(photo, "WEBP")[:500], BROKEN),
        ("broken/header checksum.png", flip_checksum(png, b"IHDR"), Failed("checksum in b'IHDR'")),
        ("broken/no iend.png", png[:-12], like),
        ("broken/other line ends.png", png.replace(b"\r\n", b"\n"), UNKNOWN),
        ("broken/sof lower.jpg", frame_header(jpeg, height=20), Ok(photo.width, 20)),
        ("broken/sof no height.jpg", frame_header(jpeg, height=0), Failed("JPEG")),
        ("broken/sof huge.jpg", frame_header(jpeg, height=65_500, width=65_500), TOO_LARGE),
        ("broken/sof 12 bit.jpg", frame_header(jpeg, bits=12), Failed("12-bit")),
        ("broken/sof lossless.jpg", frame_header(jpeg, marker=0xC3), BROKEN),
        ("broken/circle.tiff", next_page(save(small, "TIFF"), 8), Ok()),
        ("broken/page beyond the end.tiff", next_page(tiff, 1 << 30), FRAMES),
        ("broken/bmp size.bmp", bmp_size(save(small, "BMP"), 2**31 - 1, -(2**31)), TOO_LARGE),
        # What is no image.
        *((f"other/empty.{suffix}", b"", EMPTY) for suffix in ("jpg", "png", "tif", "gif", "avif")),
        ("other/zeros.jpg", bytes(5000), UNKNOWN),
        ("other/text.jpg", b"Dear diary, this is no picture.\n" * 9, DIARY),
        ("other/html.png", b"<!DOCTYPE html><title>404 Not Found</title>", Failed("b'<!DOCTYPE")),
        ("other/pdf.jpg", b"%PDF-1.7\n1 0 obj\n<< /Type /Catalog >>\n", Failed("b'%PDF-1.7")),
        ("other/eps.jpg", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", Failed("b'%!PS-")),
        ("other/svg.png", b'<svg xmlns="http://www.w3.org/2000/svg"/>', Failed("b'<svg")),
        ("other/zip.jpg", b"PK\3\4" + bytes(90), Failed("b'PK")),
        ("other/elf.png", Path(sys.executable).read_bytes()[:4096], Failed(r"b'\\x7fELF")),
        ("other/mp4.jpg", b"\0\0\0\x18ftypisom" + bytes(90), Failed("ftypisom")),
        ("other/heic.jpg", b"\0\0\0\x18ftypheic" + bytes(90), Failed("ftypheic")),
        ("other/icon.png", save(small, "ICO"), UNKNOWN),
        ("other/Thumbs.db", b"", Ignored(".db")),
        ("other/IMG_0001.HEIC", b"", Ignored(".heic")),
        ("other/README", b"", Ignored("no suffix")),
        ("other/.hidden.jpg", jpeg, Ignored("hidden")),
        ("other/.cache/thumb.jpg", jpeg, Ignored("hidden")),
        # What has another format than its name says, or a rare one; more of them under the names.
        ("format/jpeg.jpg.png", jpeg, like),
        ("format/webp.gif", save(photo, "WEBP", quality=95), like),
        ("format/float.tiff", grey(np.float32, 1 / 255, "TIFF"), Failed("floating-point samples")),
        ("format/32 bit.tiff", grey(np.int32, 999, "TIFF"), Failed("samples beyond 16 bits")),
        ("format/alpha.png", save(photo.convert("RGBA"), "PNG"), like),
        ("format/orientation 6.jpg", save(turned, "JPEG", exif=orientation(6)), like),
        ("format/moving.gif", two_frames(small, "GIF"), FRAMES),
        ("format/moving.webp", two_frames(small, "WEBP"), FRAMES),
        ("format/moving.avif", two_frames(small, "AVIF"), FRAMES),
        ("format/moving.png", two_frames(small, "PNG"), FRAMES),
        ("format/pages.tiff", two_frames(small, "TIFF"), FRAMES),
        # Sizes, from a pixel to what must not be unpacked.
        ("size/1x1.png", save(Image.new("RGB", (1, 1)), "PNG"), Ok(1, 1)),
        ("size/1x300.png", save(photo.resize((1, 300)), "PNG"), Ok(1, 300)),
        ("size/300x1.png", save(photo.resize((300, 1)).convert("LA"), "PNG"), Ok(300, 1)),
        ("size/banner.png", save(photo.resize(wide), "PNG"), Ok(*wide)),
        ("size/tower.png", save(photo.resize(tall), "PNG"), Ok(*tall)),
        ("size/claim.png", png_of(100_000, 100_000, b"\0" * 99), TOO_LARGE),
        ("size/bomb.png", png_of(20_001, 20_000, bytes(2502 * 20_000), bits=1), TOO_LARGE),
        ("size/bomb.gif", splice(save(small, "GIF"), 6, b"\xff\xff\xff\xff"), TOO_LARGE),
        ("size/bomb.tiff", tiff_size(tiff, 100_000, 100_000), TOO_LARGE),
        ("size/bomb.webp", b"RIFF\x16\0\0\0WEBPVP8X\n\0\0\0" + b"\0" * 4 + b"\xff" * 6, TOO_LARGE),
        ("size/bomb.ppm", b"P6\n99999 99999\n255\n" + bytes(99), TOO_LARGE),
        ("size/short.pgm", b"P5\n20000 19999\n255\n" + bytes(99), CUT),
        ("size/text bomb.png", with_chunk(png, b"zTXt", b"a\0\0" + notes), Failed("too large")),
        ("size/profile bomb.png", with_chunk(png, b"iCCP", b"a\0\0" + notes), Failed("too large")),
        ("size/terabyte.jpg", sparse(1 << 40), TERABYTE),
        # Names: of good files and of bad ones, since records and errors are kept apart.
        ("names/progressive, new\nline\r.jpg", progressive + b"<?php ?>" + bytes(999), like),
        ("names/new\nline\t tab.png", b"", EMPTY),
        ('names/two  words, it\'s "quoted" .jpg', b"", EMPTY),
        ("names/back\\slash\\.jpg", b"", EMPTY),
        ("names/png $(touch x);|&`touch y`>z*?.jpg", flip_checksum(png, b"IDAT"), like),
        ("names/100%25 #1?x=%00&y.jpg", b"", EMPTY),
        ("names/\x1b[31m\x07\x7f\u202egpj.jpg", b"", EMPTY),
        ("names/cmyk фото 写真 صورة 🐈.jpg", cmyk, like),
        ("names/caf\u00e9.png", b"", EMPTY),
        ("names/cafe\u0301.png", png_16_bit(np.asarray(photo) * np.uint16(257), 2), like),
        ("names/case.png", b"", EMPTY),
        ("names/CASE.PNG", grey(np.uint16, 257, "PNG"), Ok()),
        (f"names/{'jpeg2000' * 29}.jp2", save(photo, "JPEG2000"), like),
        (f"names/{'д' * 125}.png", b"", EMPTY),
        ("names/trailing space.jpg ", jpeg, Ignored(".jpg ")),
        ("names/suffix.\x1b[31m", jpeg, Ignored(r"'.\x1b[31m'")),
        ("names/latin \udce9.jpg", jpeg, Ignored("name is not UTF-8")),
        ("names/latin \udce9/photo.jpg", jpeg, Ignored("name is not UTF-8")),
        ("-exif --rf.jpg", save(small, "JPEG", exif=b"Exif\0\0no TIFF header"), Ok()),
        ("--help.png", b"", EMPTY),
        ("folder.jpg/phone.mpo", two_frames(photo, "MPO", quality=95), like),
        ("deep/" + "d/" * 100 + "avif.avif", save(photo, "AVIF"), like),
        ("deeper than a path", deeper_than_a_path, Ignored("unreadable folder")),
        # Links, and what only looks like a file.
        ("links/hard.jpg", hard_link("other/text.jpg"), DIARY),
        ("links/soft.jpg", soft_link("../other/text.jpg"), DIARY),
        ("links/gone.jpg", soft_link("nowhere.jpg"), Failed("No such file", "read")),
        ("links/gone album", soft_link("/nowhere"), Ignored("broken link or no permission")),
        ("links/self.jpg", soft_link("self.jpg"), Failed("Too many levels", "read")),
        ("links/up", soft_link(".."), ELSEWHERE),
        ("links/outside", soft_link("../../outside"), ELSEWHERE),
        ("links/outside/back", soft_link("../images/links"), ELSEWHERE),
        ("links/outside/upside down.bmp", bmp_size(save(small, "BMP"), 16, -12), Ok()),
        ("links/zero.png", soft_link("/dev/zero"), NOT_A_FILE),
        ("links/null.jpg", soft_link("/dev/null"), NOT_A_FILE),
        ("links/pipe.jpg", os.mkfifo, NOT_A_FILE),
        # Either the one or the other, as one asks before it is opened or afterwards.
        ("links/socket.jpg", socket_file, Failed("not a regular file|No such device", "read")),
        # Times; the last is beyond 64 bits of nanoseconds.
        ("times/1969.jpg", dated(b"", -1), EMPTY),
        ("times/1970 palette.png", dated(save(palette, "PNG", transparency=b"\0\x80"), 0), Ok()),
        ("times/2200.jpg", dated(b"", 230 * YEAR_NS), EMPTY),
        ("times/2400 1 bit.png", dated(save(small.convert("1"), "PNG"), 430 * YEAR_NS), Ok()),
    ]


def closed_files(photo: Image.Image) -> list[Row]:
    """The rest of the table, for a process that may not read everything."""
    jpeg, closed = save(photo, "JPEG"), Failed("Permission denied", "read")
    return [
        ("closed/file.jpg", jpeg, closed),
        ("closed/file.jpg", mode(0o000), closed),
        ("closed/folder/photo.jpg", jpeg, ELSEWHERE),
        ("closed/folder", mode(0o000), Ignored("unreadable folder")),
        ("closed/names only/photo.jpg", jpeg, closed),
        ("closed/names only", mode(0o444), ELSEWHERE),
        ("closed/to folder", soft_link("folder/photos"), Ignored("broken link or no permission")),
    ]


def two_frames(image: Image.Image, kind: str, **options: Any) -> bytes:
    # Copies, since Pillow leaves the options of one format in an image for the next.
    return save(image.copy(), kind, save_all=True, append_images=[image.rotate(180)], **options)


def splice(data: bytes, start: int, part: bytes) -> bytes:
    return data[:start] + part + data[start + len(part) :]


def png_of(width: int, height: int, rows: bytes, bits: int = 8) -> bytes:
    """A grey PNG with this header and these rows."""
    header = struct.pack(">IIBBBBB", width, height, bits, 0, 0, 0, 0)
    data = png_chunk(b"IHDR", header) + png_chunk(b"IDAT", zlib.compress(rows))
    return PNG_START + data + png_chunk(b"IEND", b"")


def with_chunk(png: bytes, kind: bytes, body: bytes) -> bytes:
    end_of_header = len(PNG_START) + 25
    return png[:end_of_header] + png_chunk(kind, body) + png[end_of_header:]


def flip_checksum(png: bytes, kind: bytes) -> bytes:
    start = png.index(kind)
    (length,) = struct.unpack_from(">I", png, start - 4)
    checksum = start + 4 + length
    return splice(png, checksum, bytes([png[checksum] ^ 1]))


def frame_header(jpeg: bytes, **values: int) -> bytes:
    """A baseline JPEG whose start-of-frame segment says something else."""
    fields = {"marker": (1, ">B"), "bits": (4, ">B"), "height": (5, ">H"), "width": (7, ">H")}
    start = jpeg.index(b"\xff\xc0")
    for name, value in values.items():
        offset, kind = fields[name]
        jpeg = splice(jpeg, start + offset, struct.pack(kind, value))
    return jpeg


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def _first_page(tiff: bytes) -> tuple[int, int]:
    """Offset of its first tag, and number of tags."""
    (start,) = struct.unpack_from("<I", tiff, 4)
    return start + 2, struct.unpack_from("<H", tiff, start)[0]


def next_page(tiff: bytes, offset: int) -> bytes:
    start, tags = _first_page(tiff)
    return splice(tiff, start + 12 * tags, struct.pack("<I", offset))


def tiff_size(tiff: bytes, width: int, height: int) -> bytes:
    start, tags = _first_page(tiff)
    for place in range(start, start + 12 * tags, 12):
        (tag,) = struct.unpack_from("<H", tiff, place)
        if tag in (256, 257):
            value = width if tag == 256 else height
            tiff = splice(tiff, place + 2, struct.pack("<HII", 4, 1, value))
    return tiff


def bmp_size(bmp: bytes, width: int, height: int) -> bytes:
    return splice(bmp, 18, struct.pack("<ii", width, height))


def soft_link(target: str) -> Content:
    return lambda path: path.symlink_to(target)


def hard_link(key: str) -> Content:
    return lambda path: path.hardlink_to(path.parents[1] / key)


def socket_file(path: Path) -> None:
    os.mknod(path, stat.S_IFSOCK | 0o600)


def sparse(size: int) -> Content:
    def put(path: Path) -> None:
        path.touch()
        os.truncate(path, size)

    return put


def dated(data: bytes, mtime_ns: int) -> Content:
    def put(path: Path) -> None:
        path.write_bytes(data)
        os.utime(path, ns=(mtime_ns, mtime_ns))

    return put


def mode(bits: int) -> Content:
    return lambda path: path.chmod(bits)


def deeper_than_a_path(path: Path) -> None:
    """Folders in folders, until the last one's path is longer than a system call takes."""
    path.mkdir()
    folder = os.open(path, os.O_RDONLY)
    for _ in range(20):
        os.mkdir("d" * 250, dir_fd=folder)
        inner = os.open("d" * 250, os.O_RDONLY, dir_fd=folder)
        os.close(folder)
        folder = inner
    os.close(os.open("photo.jpg", os.O_CREAT | os.O_WRONLY, dir_fd=folder))
    os.close(folder)


def make_files(folder: Path, rows: list[Row]) -> None:
    for name, content, _ in rows:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            content(path)


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Mode, size and modification time of all that is below a folder, by path; links are not followed."""
    found = {}
    for folder, folders, files, descriptor in os.fwalk(root):
        for name in [*folders, *files]:
            with suppress(PermissionError):  # without root's rights, in a folder of names only
                status = os.lstat(name, dir_fd=descriptor)
                found[f"{folder}/{name}"] = (status.st_mode, status.st_size, status.st_mtime_ns)
    return found


def without_rights() -> list[str] | None:
    """What takes from a command root's right to read everything; None if that cannot be done."""
    if os.geteuid() != 0:
        return []
    try:
        subprocess.run([*DROP_RIGHTS, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return list(DROP_RIGHTS)


def run_auto(place: Path, prefix: list[str], max_failed: float = 1.0) -> SimpleNamespace:
    """Run `sa-engine auto` over `place/images` in a process of its own, and measure its memory."""
    command = [*prefix, str(Path(sys.executable).with_name("sa-engine")), "auto"]
    folders = [f"--images={place / 'images'}", f"--out={place / 'out'}"]
    process = subprocess.Popen(
        [sys.executable, "-c", MEASURE, *command, *folders, f"--max-failed={max_failed}", *QUICK],
        cwd=place / "cwd",
        env={**os.environ, "TMPDIR": str(place / "tmp")},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        stdout, stderr = process.communicate()
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    *lines, peak = stdout.splitlines()
    return SimpleNamespace(
        exit_code=process.returncode, lines=lines, stderr=stderr, peak=int(peak) * 1024
    )


@pytest.fixture(scope="module")
def hostile(
    tmp_path_factory: pytest.TempPathFactory, small_photo: np.ndarray
) -> Iterator[SimpleNamespace]:
    """The files of the table, and the run that has met them."""
    place = tmp_path_factory.mktemp("hostile")
    for name in ("images", "outside", "cwd", "tmp"):
        (place / name).mkdir()
    photo = Image.fromarray(small_photo)
    prefix, rows = without_rights(), hostile_files(photo)
    if prefix is None:
        warnings.warn("unreadable files are left out: setpriv does not work here", stacklevel=1)
    else:
        rows += closed_files(photo)
    make_files(place / "images", rows)
    before = [snapshot(place / name) for name in ("images", "outside")]
    run = run_auto(place, prefix or [])
    outcomes = {name: outcome for name, _, outcome in rows}
    yield SimpleNamespace(
        place=place, out=place / "out", run=run, before=before, outcomes=outcomes, prefix=prefix
    )
    for name in ("closed/folder", "closed/names only"):
        if (place / "images" / name).exists():
            (place / "images" / name).chmod(0o700)


def outcomes_of(hostile: SimpleNamespace, kind: type) -> dict[str, Any]:
    return {name: end for name, end in hostile.outcomes.items() if isinstance(end, kind)}


def test_the_table_is_long(hostile: SimpleNamespace) -> None:
    assert len(hostile.outcomes) > 100


def test_the_command_succeeds_and_counts_every_file(hostile: SimpleNamespace) -> None:
    run, ok, failed = hostile.run, outcomes_of(hostile, Ok), outcomes_of(hostile, Failed)
    assert run.exit_code == 0, run.stderr
    planned = len(ok) + len(failed)
    assert f"{planned} images: {len(ok)} ok, 0 skipped, {len(failed)} failed" == run.lines[0]
    assert all(re.match(r"\d+ of \d+ images, ", line) for line in run.stderr.splitlines())


def test_every_good_file_has_a_record_of_its_size(hostile: SimpleNamespace) -> None:
    records = {record.source_path: record for record in iter_records(hostile.out)}
    sizes = {name: (record.width, record.height) for name, record in records.items()}
    assert sizes == {name: end[:2] for name, end in outcomes_of(hostile, Ok).items()}
    for name, record in records.items():
        data = (hostile.place / "images" / str(name)).read_bytes()
        assert record.sha256 == hashlib.sha256(data).hexdigest()


def test_files_that_show_the_photo_are_decoded_right(
    hostile: SimpleNamespace, small_photo: np.ndarray
) -> None:
    like = {name for name, end in outcomes_of(hostile, Ok).items() if end.like}
    shown = [record for record in iter_records(hostile.out) if record.source_path in like]
    assert len(shown) == len(like) > 10
    for record in shown:
        released = decode_image(read_image(hostile.out, record.image_id))
        difference = np.abs(released.astype(int) - small_photo)
        assert difference.mean() < 8, record.source_path
    assert any(record.masks for record in shown)


def test_every_bad_file_has_its_reason(hostile: SimpleNamespace) -> None:
    lines = b"".join(path.read_bytes() for path in hostile.out.glob("_run/errors/*.jsonl"))
    errors = {row["key"]: row for row in map(json.loads, lines.splitlines())}
    expected = outcomes_of(hostile, Failed)
    assert set(errors) == set(expected)
    for name, end in expected.items():
        assert re.search(end.pattern, errors[name]["message"]), errors[name]
        assert errors[name]["step"] == end.step, errors[name]
        assert "\n" not in errors[name]["message"]


def test_everything_else_is_counted(hostile: SimpleNamespace) -> None:
    reasons = Counter(end.reason for end in outcomes_of(hostile, Ignored).values())
    del reasons[None]
    assert json.loads((hostile.out / "_run" / "run.json").read_text())["ignored"] == reasons


def test_nothing_is_written_but_the_output(hostile: SimpleNamespace) -> None:
    place = hostile.place
    assert [snapshot(place / name) for name in ("images", "outside")] == hostile.before
    assert not [*(place / "cwd").iterdir(), *(place / "tmp").iterdir()]
    folders = {"images", "outside", "cwd", "tmp", "out"}
    assert {path.name for path in place.iterdir()} == folders


def test_memory_stays_what_a_photo_takes(hostile: SimpleNamespace) -> None:
    """The peak of the process; a limit on its address space would be met by torch's own reserve."""
    assert hostile.run.peak < 2e9


def test_too_many_failures_are_told(hostile: SimpleNamespace) -> None:
    """With the default of 5 %: the run is finished, and the exit code is 3."""
    run = run_auto(hostile.place, hostile.prefix or [], max_failed=0.05)
    assert run.exit_code == 3, run.stderr
    assert re.match(r"Error: \d+ of \d+ images failed, more than max_failed = 0.05", run.stderr)


def test_the_same_command_again_has_nothing_to_do(hostile: SimpleNamespace) -> None:
    before = snapshot(hostile.out)
    run = run_auto(hostile.place, hostile.prefix or [])
    assert run.exit_code == 0, run.stderr
    assert "nothing was left to do" in run.lines
    assert run.lines[0] == hostile.run.lines[0]
    assert snapshot(hostile.out) == before
