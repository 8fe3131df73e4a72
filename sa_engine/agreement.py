"""How well two versions of the same masks agree (paper §5, "Mask quality").

The paper had 500 images' masks corrected by professional annotators, and says which share of the pairs, automatic and
corrected, has an IoU above 90 % (94 % of them) and above 75 % (97 %).
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from sa_engine import pictures, rle
from sa_engine.errors import SaEngineError
from sa_engine.finished import FinishedRun
from sa_engine.pairing import ImageIndex, Pair, pair_masks
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord, MaskRecord
from sa_engine.run_dir import read_run
from sa_engine.storage import AnyPath, RunPaths, write_results

SHARES = (0.9, 0.75)
_SCHEMA_VERSION = 1
_MARGIN = 0.25  # around the masks of a pair, as a share of their box
_LEAST = 40  # pixels of the photo along a picture's side
_BEFORE, _AFTER = (248, 113, 113), (74, 222, 128)
_BAR = 40  # characters


class AuditError(SaEngineError):
    """Two runs that are no two versions of the same masks."""


@dataclass(frozen=True)
class ImagePairs:
    """Two versions of an image."""

    before: ImageRecord
    after: ImageRecord
    pairs: list[Pair]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """Two versions of the same masks.

    Attributes:
        images: that both runs have.
        only_after: images of the second run that the first has not.
        of_images: their pairs, in the order of the first run.
    """

    images: int
    only_after: list[str]
    of_images: list[ImagePairs]

    @property
    def fates(self) -> Counter[str]:
        """How many masks were kept, edited, deleted and added."""
        return Counter(pair.fate for image in self.of_images for pair in image.pairs)

    @property
    def ious(self) -> np.ndarray:
        """IoU of each mask that is in both versions: (N,) float64."""
        pairs = [pair for image in self.of_images for pair in image.pairs]
        return np.array([pair.iou for pair in pairs if pair.before and pair.after])

    def to_dict(self) -> dict[str, Any]:
        """All numbers, and every pair."""
        ious = self.ious
        return {
            "schema_version": _SCHEMA_VERSION,
            "images": self.images,
            "images_only_in_the_second": self.only_after,
            "masks": dict(self.fates),
            "pairs": len(ious),
            "mean_iou": float(ious.mean()) if len(ious) else None,
            "median_iou": float(np.median(ious)) if len(ious) else None,
            "share_above": {
                str(share): float((ious > share).mean()) if len(ious) else None for share in SHARES
            },
            "each": [
                {
                    "image": image.before.source_path or image.before.file_name,
                    "before": pair.before.id if pair.before else None,
                    "after": pair.after.id if pair.after else None,
                    "iou": pair.iou,
                    "fate": pair.fate,
                }
                for image in self.of_images
                for pair in image.pairs
            ],
        }

    def __str__(self) -> str:
        """For a terminal: counts, shares, and the distribution of IoUs."""
        fates, ious = self.fates, self.ious
        lines = [
            f"{self.images:,} images in both; masks: "
            + ", ".join(
                f"{fates[name]:,} {name}" for name in ("kept", "edited", "deleted", "added")
            )
        ]
        if self.only_after:
            lines.append(f"{len(self.only_after):,} images of the second run are not in the first")
        if not len(ious):
            return "\n".join([*lines, "no mask is in both"])
        lines.append(
            f"IoU of {len(ious):,} pairs: mean {ious.mean():.3f}, median {np.median(ious):.3f}"
        )
        lines += [f"above {share:.0%}: {(ious > share).mean():.1%} of them" for share in SHARES]
        edges = np.linspace(0.5, 1, 11)
        counts = np.histogram(ious, edges)[0]
        below = int((ious < edges[0]).sum())
        rows = [("below", edges[0], below)] * bool(below)
        rows += [("from ", low, int(count)) for low, count in zip(edges, counts, strict=False)]
        largest = max(count for *_, count in rows)
        lines += [
            f"{word} {low:.2f} {'#' * round(_BAR * count / largest):{_BAR}} {count:,}"
            for word, low, count in rows
        ]
        return "\n".join(lines)


def compare(before: AnyPath, after: AnyPath) -> Agreement:
    """Pair the masks of two runs, image by image.

    Which images are the same, `ImageIndex` says.

    Args:
        before: the run whose masks were corrected.
        after: the run that the corrected masks were ingested into.

    Raises:
        PairingError: two images of one name, an image of two sizes, or one that may be two.
        AuditError: no image in both.
        RunError: no run there.
    """
    index = ImageIndex(after, iter_records(after))
    advice = "correct the pictures that `sa-engine export --with-images` writes"
    run, found = FinishedRun(before), []
    for record in iter_records(before):
        other = index.take(record, before, advice, run.picture_sha256)
        if other is not None:
            found.append(ImagePairs(record, other, pair_masks(record.masks, other.masks)))
    if not found:
        raise AuditError(
            f"no image of {after} is one of {before}: expected photos of the same names, or the names of its "
            f"released pictures; there is {next(iter(index.rest), 'none')}"
        )
    return Agreement(images=len(found), only_after=sorted(index.rest), of_images=found)


def write_audit(
    agreement: Agreement, before: AnyPath, dest: Path, worst: int = 20
) -> tuple[Path, ...]:
    """Write `audit.json` and `worst.jpg`: the pairs of least IoU, before in red and after in green.

    Raises RunError: a picture that cannot be read, or a file that cannot be written.
    """
    content = json.dumps(agreement.to_dict(), indent=1).encode()
    write_results(dest, {"audit.json": content})
    drawn = list(_worst(agreement, before, worst))
    if not drawn:
        return (dest / "audit.json",)
    title = f"The {len(drawn)} pairs of least IoU: before (red), after (green)"
    sheet = pictures.contact_sheet(drawn, title)
    return dest / "audit.json", pictures.write_picture(dest / "worst.jpg", sheet)


def _worst(agreement: Agreement, before: AnyPath, count: int) -> Iterator[tuple[np.ndarray, str]]:
    config = read_run(RunPaths(before)).config
    both = [
        (pair, image.before)
        for image in agreement.of_images
        for pair in image.pairs
        if pair.fate == "edited"
    ]
    for pair, record in sorted(both, key=lambda one: one[0].iou)[:count]:
        assert pair.before and pair.after, "an edited mask is in both versions"
        image = pictures.released_image(before, config, record)
        caption = f"IoU {pair.iou:.3f}   mask {pair.before.id}   {record.source_path or ''}"
        yield pictures.fit(_draw(image, pair.before, pair.after), *pictures.CELL), caption


def _draw(image: np.ndarray, before: MaskRecord, after: MaskRecord) -> np.ndarray:
    """Both versions beside each other, cut out around them."""
    height, width = image.shape[:2]
    boxes = np.array([[x, y, x + w, y + h] for x, y, w, h in (before.bbox, after.bbox)])
    low, high = boxes[:, :2].min(0), boxes[:, 2:].max(0)
    margin = np.maximum((high - low) * _MARGIN, (_LEAST - (high - low)) / 2)
    left, top = np.maximum(low - margin, 0).astype(int)
    right, bottom = np.minimum(high + margin + 1, (width, height)).astype(int)
    # Enlarged in whole pixels, so that each can be seen.
    cell_width, cell_height = pictures.CELL
    scale = max(1, min(cell_width // (2 * (right - left) + 4), cell_height // (bottom - top)))
    sides = []
    for mask, colour in ((before, _BEFORE), (after, _AFTER)):
        side = image[top:bottom, left:right].repeat(scale, 0).repeat(scale, 1)
        pixels = rle.decode(mask.segmentation)[top:bottom, left:right]
        pixels = pixels.repeat(scale, 0).repeat(scale, 1)
        side[pixels] = (0.55 * side[pixels] + 0.45 * np.array(colour)).astype(np.uint8)
        outlines, _ = cv2.findContours(
            pixels.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
        )
        sides.append(cv2.drawContours(side, outlines, -1, colour, 1))
    return pictures.beside(*sides)


def sample(out: AnyPath, count: int, seed: int = 0) -> list[int]:
    """Ids of `count` random images of a run's finished ones, rising: to be handed out for correction.

    Raises AuditError if there are fewer.
    """
    ids = [record.image_id for record in iter_records(out) if record.masks]
    if count > len(ids):
        raise AuditError(f"{out} has {len(ids)} finished images with masks: cannot draw {count}")
    chosen = np.random.default_rng(seed).choice(ids, count, replace=False)
    return sorted(int(image_id) for image_id in chosen)
