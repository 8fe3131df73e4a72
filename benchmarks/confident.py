"""How often a confident mask of `sa-engine prefill` is right: precision and recall by score of its box.

    python benchmarks/confident.py PREFILLED=TRUTH ... [--precision 0.7] [--unmatched DIR]

Each PREFILLED is a run of `prefill`, TRUTH a run of the same photos with drawn masks, as from `ingest`. A mask is
right if its IoU with some true mask reaches 0.75; the share of these is the precision. The least score at which it
reaches --precision over all runs is told: set `box_score_thresh` to it. PREFILLED may be a run of `auto` too, whose
masks have their predicted IoU as score: --budget compares such runs by the best masks of each, so many an image in the
mean. What matches no true mask may be an object all the same, as nobody draws everything: --unmatched writes pictures
of up to 50 of them to look at.
"""

import argparse
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from sa_engine import rle
from sa_engine.finished import FinishedRun
from sa_engine.pairing import ImageIndex
from sa_engine.reader import iter_records
from sa_engine.records import ImageRecord, MaskRecord

RIGHT, FOUND = 0.75, 0.5
UNMATCHED = 50
SIDE = 320  # pixels of a picture
AROUND = 3.0  # sides of a mask's box that a picture shows


class Drawn(NamedTuple):
    """A prefilled mask."""

    run: Path
    image: ImageRecord
    mask: MaskRecord
    iou: float  # with the true mask that it overlaps most


class Scored(NamedTuple):
    """A run's masks, and what they find."""

    name: str
    images: int
    drawn: list[Drawn]
    truths: list[np.ndarray]  # of each image (P, G): IoU of its masks with the true ones
    scores: list[np.ndarray]  # of each image (P,): of the boxes

    def score_of(self, masks: float) -> float:
        """From which score on there are so many masks an image."""
        best = sorted((score_of(one.mask) for one in self.drawn), reverse=True)
        return best[min(len(best), max(1, round(masks * self.images))) - 1]

    def precision(self, score: float) -> tuple[int, int]:
        """Right masks, and all, from a score on."""
        some = [one for one in self.drawn if score_of(one.mask) >= score]
        return sum(one.iou >= RIGHT for one in some), len(some)

    def recall(self, score: float, iou: float) -> float:
        """Share of the true masks that some mask reaches."""
        found = sum(
            int((ious[scores >= score].max(axis=0, initial=0) >= iou).sum())
            for ious, scores in zip(self.truths, self.scores, strict=True)
        )
        return found / max(1, sum(ious.shape[1] for ious in self.truths))


def main() -> None:
    """Print the table of every run, and the score to be set or those of the budgets."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("pairs", nargs="+", metavar="PREFILLED=TRUTH")
    parser.add_argument("--precision", type=float, default=0.7)
    parser.add_argument("--unmatched", type=Path, metavar="DIR")
    only = parser.add_mutually_exclusive_group()
    only.add_argument("--score", type=float, help="the one score to report")
    only.add_argument("--budget", type=float, action="append", help="masks an image, in the mean")
    asked = parser.parse_args()
    runs = [read(*map(Path, pair.split("=", 1))) for pair in asked.pairs]
    scores = np.arange(0, 1, 0.05) if asked.score is None else [asked.score]
    print("run              score  masks  an image  precision  recall at 0.5  at 0.75")
    for run in runs:
        for score in [run.score_of(masks) for masks in asked.budget] if asked.budget else scores:
            right, count = run.precision(score)
            if count:
                print(
                    f"{run.name:16} {score:5.2f}  {count:5}  {count / run.images:8.1f}  {right / count:9.3f}  "
                    f"{run.recall(score, FOUND):13.3f}  {run.recall(score, RIGHT):7.3f}"
                )
    if asked.score is None and not asked.budget:
        print(least_score(runs, asked.precision))
    if asked.unmatched is not None:
        write_unmatched(runs, float(scores[0]), asked.unmatched)


def score_of(mask: MaskRecord) -> float:
    """How sure a mask is: its box's score, or without one its predicted IoU."""
    return float(mask.predicted_iou or 0 if mask.box_score is None else mask.box_score)


def read(prefilled: Path, truth: Path) -> Scored:
    """A run's masks with their best IoU."""
    index = ImageIndex(truth, iter_records(truth))
    run = FinishedRun(prefilled)
    drawn, truths, scores = [], [], []
    for record in iter_records(prefilled):
        advice = "make both with the same short_side"
        true = index.take(record, prefilled, advice, run.picture_sha256)
        if true is None or not true.masks:
            continue
        iou = rle.iou([m.segmentation for m in record.masks], [m.segmentation for m in true.masks])
        best = iou.max(axis=1, initial=0)
        drawn += [
            Drawn(prefilled, record, mask, float(one))
            for mask, one in zip(record.masks, best, strict=True)
        ]
        truths.append(iou)
        scores.append(np.array([score_of(mask) for mask in record.masks]))
    return Scored(prefilled.name, len(truths), drawn, truths, scores)


def least_score(runs: list[Scored], precision: float) -> str:
    """From which score on so many masks are right, each run counting the same."""
    for score in np.arange(0, 1, 0.01):
        counts = [run.precision(score) for run in runs]
        if all(count for _, count in counts):
            mean = float(np.mean([right / count for right, count in counts]))
            if mean >= precision:
                return f"box_score_thresh = {score:.2f}: precision {mean:.3f}, the mean over runs"
    return f"no score reaches a precision of {precision}"


def write_unmatched(runs: list[Scored], score: float, out: Path) -> None:
    """Pictures of masks that match nothing, a random sample, and what it was drawn from."""
    out.mkdir(parents=True, exist_ok=True)
    some = [
        one for run in runs for one in run.drawn if one.iou < FOUND and score_of(one.mask) >= score
    ]
    order = np.random.default_rng(0).permutation(len(some))[:UNMATCHED]
    print(f"{len(some)} masks match nothing; {len(order)} of them in {out}")
    tiles = [tile(some[i]) for i in order.tolist()]
    for start in range(0, len(tiles), 10):
        rows = tiles[start : start + 10]
        rows += [np.full_like(rows[0], 255)] * (-len(rows) % 5)
        sheet = np.vstack([np.hstack(rows[i : i + 5]) for i in range(0, len(rows), 5)])
        cv2.imwrite(str(out / f"unmatched_{start:02}.png"), sheet)


def tile(one: Drawn) -> np.ndarray:
    """A mask's outline on the part of its photo around it, (SIDE, SIDE, 3) BGR."""
    image = cv2.cvtColor(FinishedRun(one.run).picture(one.image), cv2.COLOR_RGB2BGR)
    outlines, _ = cv2.findContours(
        rle.decode(one.mask.segmentation).astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE
    )
    x, y, width, height = one.mask.bbox
    side = max(AROUND * max(width, height), max(image.shape) / 4)
    x, y = max(0, int(x + (width - side) / 2)), max(0, int(y + (height - side) / 2))
    part = np.ascontiguousarray(image[y : y + int(side), x : x + int(side)])
    scale = SIDE / max(part.shape)
    small = cv2.resize(part, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
    for color, width in ((255, 255, 255), 3), ((0, 0, 255), 1):
        moved = [((line - (x, y)) * scale).round().astype(np.int32) for line in outlines]
        cv2.drawContours(small, moved, -1, color, width)
    canvas = np.full((SIDE, SIDE, 3), 255, np.uint8)
    canvas[: small.shape[0], : small.shape[1]] = small[:SIDE, :SIDE]
    return canvas


if __name__ == "__main__":
    main()
