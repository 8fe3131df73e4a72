"""The privacy stage for tests: run, looked at, compared.

Every run has the real detectors. Most look at photos in their own size only, which finds the one
face there is here as well and is four times as fast.
"""

import hashlib
import io
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from click.testing import Result
from PIL import Image
from test_cli import sa_engine

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


def jpeg(picture: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95, **options)
    return buffer.getvalue()


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
