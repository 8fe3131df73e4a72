"""How much of what must not be seen is found and covered: on photos that a person has labelled."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from sa_engine.errors import SaEngineError
from sa_engine.images import BadImage, decode_image
from sa_engine.privacy.pyramid import box_iou
from sa_engine.privacy.redact import coverage, redacted_area
from sa_engine.privacy.redactor import COVERED, Redactor

# Lower ends of the size bands: heights of the labelled boxes in pixels.
BANDS = (0, 10, 16, 24, 32, 64, 128, 256)
_FOUND_IOU = 0.5


class TruthError(SaEngineError):
    """Labels that cannot be read, or whose images are not there."""


@dataclass(frozen=True)
class Band:
    """Labelled boxes of some heights.

    Attributes:
        low, high: heights in pixels, low <= height < high; None: no end.
        boxes: how many there are.
        found: of them, boxes with a detection of their kind at an IoU of 0.5 or more.
        covered: of them, boxes of whose area at least 95 % is redacted.
    """

    low: int
    high: int | None
    boxes: int
    found: int
    covered: int

    def __str__(self) -> str:
        """Give it as a line of the table."""
        high = f"{self.high - 1:,}" if self.high else ""
        name = f"{self.low}-{high} px" if high else f"from {self.low} px"
        return self.line(name)

    def line(self, name: str) -> str:
        """The numbers under a name."""
        shares = [
            f"{one / self.boxes:8.1%}" if self.boxes else "" for one in (self.found, self.covered)
        ]
        return f"{name:>13}  {self.boxes:>6,}  {shares[0]:>9}  {shares[1]:>9}"


@dataclass(frozen=True, kw_only=True)
class Recall:
    """What `measure` has found.

    Attributes:
        kind: "face" or "plate".
        images: that were looked at.
        bands: by height of the labelled boxes; those without boxes are left out.
        redacted: share of all pixels that would be redacted, by any detector.
        missed: the boxes that are not covered: image, XYWH box as labelled, share covered.
    """

    kind: str
    images: int
    bands: tuple[Band, ...]
    redacted: float
    missed: tuple[dict[str, Any], ...]

    @property
    def total(self) -> Band:
        """All boxes."""
        boxes = sum(band.boxes for band in self.bands)
        found = sum(band.found for band in self.bands)
        return Band(0, None, boxes, found, sum(band.covered for band in self.bands))

    def to_dict(self) -> dict[str, Any]:
        """All numbers as plain JSON values."""
        return {**vars(self), "bands": [vars(b) for b in self.bands], "total": vars(self.total)}

    def __str__(self) -> str:
        """Give a table for a person."""
        missed = [
            f"missed: {one['image']} at {[round(side, 1) for side in one['bbox']]}, "
            f"{one['covered']:.1%} covered"
            for one in self.missed[:20]
        ]
        more = len(self.missed) - len(missed)
        return "\n".join(
            [
                f"{self.kind + 's high':>13}  {'boxes':>6}  {'IoU 0.5':>9}  {'covered':>9}",
                *map(str, self.bands),
                self.total.line("all"),
                f"{self.images} images, {self.redacted:.2%} of their pixels redacted",
                *missed,
                *([f"... and {more} more; --json lists them"] if more else []),
            ]
        )


def measure(
    redactor: Redactor,
    truth: Path,
    images: Path | None = None,
    kind: str | None = None,
    progress: bool = False,
) -> Recall:
    """Look for what is labelled, as `blur` does at its first look, and compare.

    Args:
        redactor: finds.
        truth: COCO annotations: images (id, file_name), annotations (image_id, bbox XYWH in pixels of
            the upright photo). Boxes with `iscrowd` or `ignore` are left out.
        images: folder of the photos; default: `images` beside `truth`, or `truth`'s own folder.
        kind: "face" or "plate"; default: as the categories' names say.
        progress: show a bar on stderr.

    Raises:
        TruthError: the labels are of another form, or a photo is missing.
    """
    labelled, kind = _read_truth(truth, kind)
    folder = images or next(f for f in (truth.parent / "images", truth.parent) if f.is_dir())
    rows: list[tuple[float, bool, float]] = []
    missed = []
    redacted = pixels = 0
    for name, boxes in tqdm(labelled, unit="image", disable=not progress, dynamic_ncols=True):
        try:
            photo = decode_image((folder / name).read_bytes())
        except OSError as error:
            raise TruthError(
                f"{truth} labels {name}, and {folder / name} cannot be read: {error.strerror}; "
                "name the photos' folder with --images"
            ) from None
        except BadImage as error:
            raise TruthError(f"{folder / name}: {error}") from None
        regions = redactor.find(photo)
        area = redacted_area([region.box for region in regions], *photo.shape[:2])
        redacted, pixels = redacted + int(area.sum()), pixels + area.size
        found = np.array([r.detected for r in regions if r.kind == kind]).reshape(-1, 4)
        for x, y, width, height in boxes:
            box = np.array([x, y, x + width, y + height])
            share = coverage(box.tolist(), area)
            best = float(box_iou(found, box[None]).max(initial=0))
            rows.append((height, best >= _FOUND_IOU, share))
            if share < COVERED:
                label = {"image": name, "bbox": [x, y, width, height], "covered": share}
                missed.append(label)
    return Recall(
        kind=kind,
        images=len(labelled),
        bands=tuple(_bands(rows)),
        redacted=redacted / max(pixels, 1),
        missed=tuple(missed),
    )


def _bands(rows: Sequence[tuple[float, bool, float]]) -> Iterable[Band]:
    for low, high in zip(BANDS, [*BANDS[1:], None], strict=True):
        inside = [row for row in rows if low <= row[0] and (high is None or row[0] < high)]
        if inside:
            found = sum(row[1] for row in inside)
            covered = sum(row[2] >= COVERED for row in inside)
            yield Band(low, high, len(inside), found, covered)


def _read_truth(truth: Path, kind: str | None) -> tuple[list[tuple[str, list[list[float]]]], str]:
    """Labelled boxes by image, in the file's order; and what they are boxes of."""
    try:
        content = json.loads(truth.read_bytes())
        names = {image["id"]: str(image["file_name"]) for image in content["images"]}
        boxes: dict[Any, list[list[float]]] = {image_id: [] for image_id in names}
        for annotation in content["annotations"]:
            if not (annotation.get("iscrowd") or annotation.get("ignore")):
                x, y, width, height = map(float, annotation["bbox"])
                boxes[annotation["image_id"]].append([x, y, width, height])
        categories = " ".join(str(c["name"]) for c in content.get("categories", [])).lower()
    except OSError as error:
        raise TruthError(f"truth {truth}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise TruthError(
            f"truth {truth}: not COCO annotations ({type(error).__name__}: {error}); expected images "
            "with id and file_name, and annotations with image_id and bbox [x, y, width, height]"
        ) from None
    if kind is None:
        named = [one for one in ("face", "plate") if one in categories]
        if len(named) != 1:
            raise TruthError(
                f"truth {truth}: its categories ({categories or 'none'}) do not say whether the boxes "
                "are faces or plates: give --kind"
            )
        kind = named[0]
    return [(names[image_id], boxes[image_id]) for image_id in names], kind
