"""Pictures by which a person judges a run: photos beside their masks, and a contact sheet."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from sa_engine import rle
from sa_engine.images import decode_image, resize_image
from sa_engine.plan import read_plan
from sa_engine.reader import iter_records, read_image
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.run_dir import read_run
from sa_engine.shards import ShardStats, read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths, atomic_write, location

_GOLDEN_RATIO = 0.6180339887498949
_FILL = 0.55  # opacity of a mask's colour over the grey photo
_UNCOVERED = 0.45  # brightness of what no mask covers
_BACKGROUND = (24, 24, 27)
_TEXT = (228, 228, 231)
_GAP = 8  # pixels between pictures, here and below
CELL = (808, 320)  # width and height of a pair on the contact sheet
_COLUMNS = 2
_LINE = 26  # height of a line of text


def show(out: AnyPath, dest: Path, ids: Sequence[int] = (), count: int = 12) -> list[Path]:
    """Draw images of a run: each photo beside its masks, and all of them on a contact sheet.

    Args:
        out: output folder of a run; only its finished shards are looked at.
        dest: folder for `sa_<id>.jpg` (full size) and `contact_sheet.jpg`; made if missing.
        ids: images to draw; if there are none, `count` images spread evenly over the run.
        count: how many, at most.

    Returns:
        The files written, the contact sheet last.

    Raises:
        RunError: no run there, nothing finished, an id without masks on disk, or a photo that is
            gone.
    """
    config = read_run(RunPaths(out)).config
    if "formats" not in config:
        raise RunError(f"{out} has no masks to show: it is no run of shards")
    plan = read_plan(RunPaths(out).plan)
    markers = list(read_markers(RunPaths(out), range(len(plan))).values())
    records = _choose(out, ids, count, sum(marker.ok for marker in markers))
    paths, pairs = [], []
    for record in records:
        released = released_image(out, config, record)
        pair = beside(released, draw_masks(released, record.masks))
        paths.append(write_picture(dest / f"sa_{record.image_id}.jpg", pair))
        pairs.append((fit(pair, *CELL), _caption(record)))
    paths.append(
        write_picture(dest / "contact_sheet.jpg", contact_sheet(pairs, _title(out, markers)))
    )
    return paths


def mask_colours(count: int) -> np.ndarray:
    """Distinct colours, the same in every run: (count, 3) uint8 RGB.

    Hues advance by the golden ratio, so that any few neighbours lie far apart; saturation and
    brightness alternate.
    """
    index = np.arange(count)
    hue = (0.02 + index * _GOLDEN_RATIO) % 1.0 * 360
    saturation = np.array([0.9, 0.6, 1.0])[index % 3]
    value = np.array([1.0, 1.0, 0.8])[index % 3]
    hsv = np.stack([hue, saturation, value], axis=1).astype(np.float32)[None]
    rgb = cv2.cvtColor(hsv, cv2.COLOR_HSV2RGB)[0] if count else hsv[0]
    return (rgb * 255 + 0.5).astype(np.uint8)


def draw_masks(image: np.ndarray, masks: Sequence[MaskRecord]) -> np.ndarray:
    """Paint masks over their image, large ones below small ones, each with its outline.

    What no mask covers is dark and grey.

    Args:
        image: (H, W, 3) uint8 RGB, of the size that the masks state.
        masks: with RLEs of that size.

    Returns:
        (H, W, 3) uint8 RGB.
    """
    height, width = image.shape[:2]
    grey = cv2.cvtColor(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), cv2.COLOR_GRAY2RGB)
    base = (grey * _UNCOVERED).astype(np.uint8)
    paint = np.zeros_like(image)
    covered = np.zeros((height, width), bool)
    outlines = []
    by_area = sorted(masks, key=lambda mask: (-mask.area, mask.id))
    for mask, colour in zip(by_area, mask_colours(len(by_area)), strict=True):
        pixels = rle.decode(mask.segmentation)
        paint[pixels] = colour
        covered |= pixels
        found, _ = cv2.findContours(pixels.view(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
        outlines.append((found, colour))
    mixed = cv2.addWeighted(grey, 1 - _FILL, paint, _FILL, 0)
    drawn = np.where(covered[..., None], mixed, base)
    thickness = max(1, round(min(height, width) / 500))
    for found, colour in outlines:
        bright = tuple(int(255 - (255 - channel) * 0.45) for channel in colour)
        cv2.drawContours(drawn, found, -1, bright, thickness, cv2.LINE_AA)
    return drawn


def released_image(out: AnyPath, config: dict[str, Any], record: ImageRecord) -> np.ndarray:
    """The image that a record describes, (H, W, 3) uint8 RGB: from its shard, or made again from the photo.

    Args:
        out: the run's folder.
        config: of the run.
        record: of the run.

    Raises:
        RunError: the run has no pictures, and the photo is gone.
    """
    if config["write_images"] and "tar" in config["formats"]:
        return decode_image(read_image(out, record.image_id))
    return released_photo(config, record)


def released_photo(config: dict[str, Any], record: ImageRecord) -> np.ndarray:
    """The image that a record describes, made again from its photo: for runs without pictures.

    Raises RunError if the photo is gone.
    """
    photo = location(config["images"]) / str(record.source_path)
    try:
        data = photo.read_bytes()
    except OSError as error:
        raise RunError(
            f"there is no image {record.image_id}: its run wrote no pictures, and its photo {photo} "
            f"cannot be read ({error.strerror})"
        ) from None
    return resize_image(decode_image(data), record.height, record.width)


def _choose(out: AnyPath, ids: Sequence[int], count: int, total: int) -> list[ImageRecord]:
    """Records by id, or `count` spread evenly over the `total` finished ones."""
    if not total:
        raise RunError(f"{out} has no finished image to show yet")
    if ids:
        wanted = set(ids)
        chosen = [record for record in iter_records(out) if record.image_id in wanted]
        missing = wanted - {record.image_id for record in chosen}
        if missing:
            raise RunError(
                f"{out} has no masks of image {', '.join(map(str, sorted(missing)))}: "
                f"not planned, not done, or failed (see {RunPaths(out).errors('*')})"
            )
        return chosen
    count = min(count, total)
    positions = {index * total // count for index in range(count)}
    return [record for index, record in enumerate(iter_records(out)) if index in positions]


def beside(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Two pictures of one height with a gap between them."""
    gap = np.full((len(left), _GAP, 3), _BACKGROUND, np.uint8)
    return np.hstack([left, gap, right])


def fit(picture: np.ndarray, width: int, height: int) -> np.ndarray:
    """Shrink a picture into a box; small ones stay as they are."""
    scale = min(width / picture.shape[1], height / picture.shape[0], 1.0)
    size = [max(1, round(side * scale)) for side in picture.shape[:2]]
    return resize_image(picture, *size)


def _caption(record: ImageRecord) -> str:
    masks = "1 mask" if len(record.masks) == 1 else f"{len(record.masks)} masks"
    return f"sa_{record.image_id}   {masks}   {record.source_path or ''}"


def _title(out: AnyPath, markers: Sequence[ShardStats]) -> str:
    images, masks = sum(marker.ok for marker in markers), sum(marker.masks for marker in markers)
    failed = sum(marker.failed for marker in markers)
    return (
        f"{out.name}:  {images:,} images,  {masks:,} masks,  "
        f"{masks / images:.1f} masks per image,  {failed:,} failed"
    )


def contact_sheet(pairs: Sequence[tuple[np.ndarray, str]], title: str) -> np.ndarray:
    """Captioned pictures in rows under a title; a row is as high as its highest picture."""
    columns = min(_COLUMNS, len(pairs))
    rows = [pairs[start : start + columns] for start in range(0, len(pairs), columns)]
    heights = [max(len(picture) for picture, _ in row) + _LINE + 2 * _GAP for row in rows]
    size = (columns * (CELL[0] + 2 * _GAP) + 2 * _GAP, sum(heights) + 2 * _LINE)
    sheet = Image.new("RGB", size, _BACKGROUND)
    draw = ImageDraw.Draw(sheet)
    draw.text((2 * _GAP, _GAP), title, _TEXT, ImageFont.load_default(20))
    top = 2 * _LINE
    for row, height in zip(rows, heights, strict=True):
        for column, (picture, caption) in enumerate(row):
            left = 2 * _GAP + column * (CELL[0] + 2 * _GAP)
            sheet.paste(Image.fromarray(picture), (left, top))
            draw.text((left, top + len(picture) + 4), caption, _TEXT, ImageFont.load_default(15))
        top += height
    return np.asarray(sheet)


def write_picture(path: Path, picture: np.ndarray, private: bool = False) -> Path:
    """Write a JPEG with full-resolution colour: outlines are one pixel wide.

    Raises RunError if it cannot be written.
    """
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "JPEG", quality=90, subsampling="4:4:4")
    try:
        atomic_write(path, buffer.getvalue(), private=private)
    except OSError as error:
        raise RunError(f"cannot write {path}: {error.strerror}") from None
    return path
