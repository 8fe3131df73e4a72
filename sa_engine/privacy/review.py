"""Pictures for a person who checks a run of `blur`: no detector knows what it has missed.

They show originals, so only their owner may read them, and they never lie in the output.
"""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sa_engine.images import decode_image
from sa_engine.pictures import CELL, beside, contact_sheet, fit, write_picture
from sa_engine.plan import read_plan
from sa_engine.reader import read_audit
from sa_engine.run_dir import read_run
from sa_engine.shards import read_markers
from sa_engine.storage import AnyPath, RunError, RunPaths, location

_LOWEST, _SAMPLE = 40, 24
_MARGIN = 1.0  # of a region's size, around it
_OUTLINE = (255, 214, 10)


def review(paths: RunPaths, dest: Path) -> list[Path]:
    """Draw the detections of lowest score, and a random sample of the photos.

    Args:
        paths: of a run of `blur`, finished or not.
        dest: folder for `lowest_scores.jpg` (each region in the photo and redacted: was it one?) and
            `random_sample.jpg` (photos beside what was released: what was missed?). Made if missing.

    Returns:
        The files written.

    Raises:
        RunError: no run, nothing finished, `dest` in the output, or a photo that is gone.
    """
    config = read_run(paths).config
    if config.get("work") is None:
        raise RunError(f"{paths.out} is no run of blur: there is nothing to review")
    check_dest(paths, dest)
    images = location(config["images"])
    lines = list(_lines(paths))
    if not lines:
        raise RunError(f"{paths.out} has no finished image to review yet")
    found = [
        (region, line)
        for line in lines
        for region in line["regions"]
        if region["score"] is not None
    ]
    found.sort(key=lambda one: (one[0]["score"], one[1]["image_id"]))
    sample = random.Random(0).sample(lines, min(_SAMPLE, len(lines)))
    lowest = [_region(paths, images, *one) for one in found[:_LOWEST]]
    titles = (
        f"{paths.out.name}: the {len(lowest)} detections of lowest score, of {len(found)}",
        f"{paths.out.name}: {len(sample)} of {len(lines)} images at random",
    )
    written = []
    if lowest:
        sheet = contact_sheet(lowest, titles[0])
        written.append(write_picture(dest / "lowest_scores.jpg", sheet, private=True))
    whole = [
        _whole(paths, images, line) for line in sorted(sample, key=lambda one: one["image_id"])
    ]
    sheet = contact_sheet(whole, titles[1])
    return [*written, write_picture(dest / "random_sample.jpg", sheet, private=True)]


def check_dest(paths: RunPaths, dest: Path) -> None:
    """Raise RunError if a folder for the pictures lies in the output."""
    if isinstance(paths.out, Path) and paths.out in (dest.resolve(), *dest.resolve().parents):
        raise RunError(f"{dest} lies in the output {paths.out}: reviews show originals")


def _lines(paths: RunPaths) -> Iterator[dict[str, Any]]:
    plan = read_plan(paths.plan)
    for stats in read_markers(paths, range(len(plan))).values():
        yield from read_audit(paths, stats.name, stats).values()


def _region(
    paths: RunPaths, images: AnyPath, region: dict[str, Any], line: dict[str, Any]
) -> tuple[np.ndarray, str]:
    """A region and what lies around it, in the photo and in the released image."""
    x0, y0, x1, y1 = region["box"]
    x, y = int((x1 - x0) * _MARGIN), int((y1 - y0) * _MARGIN)
    part = (slice(max(0, y0 - y), y1 + y), slice(max(0, x0 - x), x1 + x))
    photo, released = _pictures(paths, images, line)
    cv2.rectangle(photo, (x0 - 1, y0 - 1), (x1, y1), _OUTLINE, 1)
    both = [photo[part], released[part]]
    scale = max(1, (CELL[1] - 40) // max(*both[0].shape[:2], 1))
    both = [
        cv2.resize(one, None, fx=scale, fy=scale, interpolation=cv2.INTER_NEAREST) for one in both
    ]
    caption = f"{region['kind']} {region['score']:.2f}   {line['key']} at {x0}, {y0}"
    return fit(beside(*both), *CELL), caption


def _whole(paths: RunPaths, images: AnyPath, line: dict[str, Any]) -> tuple[np.ndarray, str]:
    photo, released = _pictures(paths, images, line)
    thickness = max(2, round(max(photo.shape) / 400))
    for region in line["regions"]:
        x0, y0, x1, y1 = region["box"]
        cv2.rectangle(photo, (x0, y0), (x1, y1), _OUTLINE, thickness)
    return fit(beside(photo, released), *CELL), f"{line['key']}   {len(line['regions'])} regions"


def _pictures(
    paths: RunPaths, images: AnyPath, line: dict[str, Any]
) -> tuple[np.ndarray, np.ndarray]:
    pictures = []
    for folder in (images, paths.out):
        try:
            pictures.append(decode_image((folder / line["key"]).read_bytes()))
        except OSError as error:
            detail = error.strerror or json.dumps(str(error))
            raise RunError(f"cannot review {folder / line['key']}: {detail}") from None
    return pictures[0], pictures[1]
