"""Decode, resize and encode pictures: bytes in, RGB arrays out.

Pillow does the work, as in the reference, whose antialiased bilinear resize decides what the image
encoder sees. EXIF orientation is applied in `decode_image` and nowhere else; colour profiles are
ignored, as by the reference's reader.
"""

import io
import math
import warnings
from typing import Any

import numpy as np
from PIL import ExifTags, Image, PngImagePlugin

from sa_engine.errors import SaEngineError

_SUFFIXES = "jpg jpeg jpe jfif mpo png webp avif bmp gif tif tiff jp2 ppm pgm"
IMAGE_SUFFIXES = frozenset(f".{suffix}" for suffix in _SUFFIXES.split())
PIXEL_LIMIT = 400_000_000

# Named one by one: other readers of Pillow start programs (EPS) or only look like images (PDF).
_FORMATS = ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "JPEG2000", "PPM")
# By EXIF orientation: how to turn a picture upright; then where its rows, from top to bottom, lie:
# in columns, or from the far end, or both.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_JPEG = ("JPEG", {"quality": 95, "subsampling": "4:2:0"})
# Nothing that Pillow remembers of a file's metadata is passed on: the picture is made of an array.
_WRITERS: dict[str, tuple[str, dict[str, Any]]] = {
    **dict.fromkeys((".jpg", ".jpeg", ".jpe", ".jfif", ".mpo"), _JPEG),
    ".png": ("PNG", {}),
    ".webp": ("WEBP", {"quality": 95}),
    ".avif": ("AVIF", {"quality": 95}),
    ".bmp": ("BMP", {}),
    ".gif": ("GIF", {}),
    **dict.fromkeys((".tif", ".tiff"), ("TIFF", {"compression": "tiff_adobe_deflate"})),
    ".jp2": ("JPEG2000", {"irreversible": False}),
    **dict.fromkeys((".ppm", ".pgm"), ("PPM", {})),
}
_SIDEWAYS = (5, 6, 7, 8)
_BACKWARDS = (3, 4, 6, 7)

# Converted at once, so that a picture of any size is held but once beside its pixels.
_STRIP_PIXELS = 1 << 19

# Pillow warns above its own limit and refuses twice as much; a 200-megapixel photo is neither.
Image.MAX_IMAGE_PIXELS = PIXEL_LIMIT
# Pillow refuses a PNG for a megabyte of notes, as editors leave them; 64 is what it allows for all.
PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
# They name no file, and what makes a picture useless is an error.
warnings.filterwarnings("ignore", module=r"PIL\.")


class BadImage(SaEngineError):
    """A file that is not one picture that can be decoded; `reason` says why."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def decode_image(data: bytes) -> np.ndarray:
    """Decode an image file to upright RGB pixels.

    Alpha is composited over white, 16-bit samples are scaled to 8 bits, of a phone's multi-picture
    JPEG the first picture is taken.

    Args:
        data: the bytes of the file.

    Returns:
        (H, W, 3) uint8 RGB, C-contiguous and writable, EXIF orientation applied.

    Raises:
        BadImage: empty, truncated, not an image, animated, or beyond `PIXEL_LIMIT`.
    """
    if not data:
        raise BadImage("the file is empty")
    try:
        with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
            _check_one_picture(image)
            image.load()
            return _upright_pixels(image)
    except BadImage:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise BadImage(f"more than {PIXEL_LIMIT:,} pixels") from None
    except Image.UnidentifiedImageError:
        raise BadImage(_why_unidentified(data)) from None
    except Exception as error:  # a broken file makes Pillow's readers raise nearly anything
        raise BadImage(f"cannot be decoded: {error or type(error).__name__}") from error


def fit_short_side(height: int, width: int, short_side: int | None) -> tuple[int, int]:
    """Size (height, width) whose shorter side is `short_side` pixels, never enlarged.

    The other side is rounded half up; None keeps the size.
    """
    if short_side is None or short_side >= min(height, width):
        return height, width
    scale = short_side / min(height, width)
    return int(height * scale + 0.5), int(width * scale + 0.5)


def resize_image(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize (H, W, 3) uint8 to (height, width, 3), bilinear with antialiasing.

    Returns the array itself when it has that size already.
    """
    if image.shape[:2] == (height, width):
        return image
    resized = Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR)
    return np.array(resized)


def resize_region(
    image: np.ndarray, box: tuple[float, float, float, float], height: int, width: int
) -> np.ndarray:
    """Resize a part of an image, bilinear with antialiasing, as if it had been cut out first.

    Pixels outside the region's enclosing integer box take no part, as in the reference, which
    crops before it resizes.

    Args:
        image: (H, W, 3) uint8.
        box: XYXY in pixels of `image`, fractions allowed; clipped to the image.
        height: of the result.
        width: of the result.

    Returns:
        (height, width, 3) uint8.
    """
    image_height, image_width = image.shape[:2]
    x0, x1 = max(box[0], 0.0), min(box[2], float(image_width))
    y0, y1 = max(box[1], 0.0), min(box[3], float(image_height))
    left, top = math.floor(x0), math.floor(y0)
    region = Image.fromarray(image[top : math.ceil(y1), left : math.ceil(x1)])
    inner = (x0 - left, y0 - top, x1 - left, y1 - top)
    return np.array(region.resize((width, height), Image.Resampling.BILINEAR, box=inner))


def encode_jpeg(image: np.ndarray, quality: int) -> bytes:
    """Encode (H, W, 3) uint8 RGB as a baseline JPEG without metadata; equal pixels, equal bytes.

    Chroma is halved in both directions (4:2:0), as in SA-1B's own files.
    """
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def encode_as(image: np.ndarray, suffix: str, quality: int, icc: bytes | None = None) -> bytes:
    """Encode (H, W, 3) uint8 RGB in the format that a file name's suffix asks for, without metadata.

    JPEG, WebP and AVIF lose as much as `quality` says, GIF all but 256 colours, the others nothing.

    Args:
        image: the picture.
        suffix: of `IMAGE_SUFFIXES`, in any case.
        quality: 1 to 100.
        icc: a colour profile to keep, as `read_icc` gives it.

    Raises:
        BadImage: the format cannot hold so large a picture.
    """
    buffer = io.BytesIO()
    written, options = _WRITERS[suffix.lower()]
    if "quality" in options:
        options = {**options, "quality": quality}
    if icc is not None:
        options = {**options, "icc_profile": icc}
    try:
        Image.fromarray(image).save(buffer, written, **options)
    except (OSError, ValueError, MemoryError) as error:
        raise BadImage(f"cannot be written as {written}: {error}") from None
    return buffer.getvalue()


def read_icc(data: bytes) -> bytes | None:
    """The colour profile of an image file that `decode_image` reads; None if it has none."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        profile = image.info.get("icc_profile")
        # Of another colour space it would describe other numbers than those that are written.
        return profile if profile and profile[16:20] == b"RGB " else None


def read_orientation(data: bytes) -> int:
    """EXIF orientation, 1 to 8, of an image file that `decode_image` reads; it is applied there."""
    with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
        image.load()  # a PNG may have its EXIF at its end
        return _orientation(image)


def upright_mask(mask: np.ndarray, orientation: int) -> np.ndarray:
    """Turn a (H, W) bool mask of an image as it is stored, as `decode_image` turns the image."""
    method = _UPRIGHT.get(orientation)
    if method is None:
        return mask
    return np.asarray(Image.fromarray(mask.astype(np.uint8)).transpose(method)).astype(bool)


def _check_one_picture(image: Image.Image) -> None:
    """Raise BadImage for too many pixels or more than one frame; decodes nothing."""
    if image.width * image.height > PIXEL_LIMIT:
        raise BadImage(f"{image.width} x {image.height} is more than {PIXEL_LIMIT:,} pixels")
    # Not n_frames: to count a TIFF's pages takes the square of their number.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadImage("animated or multi-page: more than one frame, expected one picture")


def _why_unidentified(data: bytes) -> str:
    """What Pillow keeps to itself when it says that no reader can identify a file."""
    for name in _FORMATS:
        read, accepts = Image.OPEN[name]
        if accepts is not None and accepts(data[:16]) is True:
            try:
                read(io.BytesIO(data), "")
            except Exception as error:  # as wide as in decode_image
                return f"damaged, or an unusual {name}: {error or type(error).__name__}"
    return f"not an image in a format that can be read: it begins with {data[:12]!r}"


def _upright_pixels(image: Image.Image) -> np.ndarray:
    """Convert a loaded image, strip by strip, to upright (H, W, 3) uint8 RGB."""
    width, height = image.size
    orientation = _orientation(image)
    method = _UPRIGHT.get(orientation)
    sideways = orientation in _SIDEWAYS
    pixels = np.empty((width, height, 3) if sideways else (height, width, 3), np.uint8)
    rows = max(1, _STRIP_PIXELS // width)
    for top in range(0, height, rows):
        bottom = min(top + rows, height)
        strip = _to_rgb(image.crop((0, top, width, bottom)))
        upright = np.asarray(strip if method is None else strip.transpose(method))
        place = slice(top, bottom)
        if orientation in _BACKWARDS:
            place = slice(height - bottom, height - top)
        pixels[(slice(None), place) if sideways else place] = upright
    return pixels


def _orientation(image: Image.Image) -> int:
    """EXIF orientation of a loaded image, 1 to 8; unreadable EXIF counts as none, as in viewers."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # as wide as in decode_image; the pixels are fine
        return 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode of Pillow to RGB without clipping."""
    if image.mode.startswith("I"):
        return _scale_16_bit(image).convert("RGB")
    if image.mode == "F":
        raise BadImage("floating-point samples without a known range: save it with 8 or 16 bits")
    if image.has_transparency_data:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _scale_16_bit(image: Image.Image) -> Image.Image:
    """Map grey samples 0..65535 to 0..255, rounded; BadImage when they exceed 16 bits."""
    samples = np.asarray(image).astype(np.int32)
    if samples.min() < 0 or samples.max() > 65535:
        raise BadImage("integer samples beyond 16 bits: save it with 8 or 16 bits")
    return Image.fromarray(((samples + 128) // 257).astype(np.uint8))
