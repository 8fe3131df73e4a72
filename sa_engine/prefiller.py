"""Masks of detected boxes, for annotators to start from (paper §4, "Semi-automatic stage").

A box prompts the model, and once more together with its own mask (§D.4); what is confident, stable and no duplicate
stays. Everything is in the released frame, as in ``generator.py``.
"""

from dataclasses import dataclass

import numpy as np
import torch

from sa_engine import masks as mask_ops
from sa_engine import rle
from sa_engine.config import PrefillConfig
from sa_engine.filters import passes, passes_iou
from sa_engine.masks import WindowMask
from sa_engine.predictor import Embedding, Prediction, Predictor


@dataclass(frozen=True)
class PrefilledMask:
    """One mask in the released frame.

    Attributes:
        mask: its pixels.
        predicted_iou: of the model, 0 to 1.
        stability_score: 0 to 1.
        box_score: of the box that prompted it, as the detector gave it; None: it gave none.
    """

    mask: WindowMask
    predicted_iou: float
    stability_score: float
    box_score: float | None

    def segmentation(self, height: int, width: int) -> rle.RLE:
        """COCO RLE in the (height, width) image."""
        x0, y0, _, _ = self.mask.box
        return rle.encode_window(self.mask.window, y0, x0, height, width)


class Prefiller:
    """Masks for boxes.

    Args:
        predictor: the model.
        config: numbers and rules; the filters' defaults are the automatic stage's.
    """

    def __init__(self, predictor: Predictor, config: PrefillConfig) -> None:
        self.predictor, self.config = predictor, config
        self.boxes_per_batch = config.points_per_batch or predictor.prompts_at_once

    @torch.inference_mode()
    def prefill(
        self,
        image: np.ndarray,
        boxes: np.ndarray,
        scores: np.ndarray,
        embedding: Embedding | None = None,
    ) -> list[PrefilledMask]:
        """Masks of a (H, W, 3) uint8 RGB image at its released size, most to least confident.

        Args:
            image: the image.
            boxes: (N, 4) XYXY in its pixels.
            scores: (N,) of the boxes, 0 to 1; not a number where a box has none: such boxes come first, and all stay.
            embedding: of the image, where there is one already.
        """
        chosen = self._choose(scores)
        if not len(chosen):
            return []
        boxes, scores = boxes[chosen], scores[chosen]
        if embedding is None:
            embedding = self.predictor.embed(image)
        found = [
            mask
            for start in range(0, len(boxes), self.boxes_per_batch)
            for mask in self._masks(
                embedding,
                boxes[start : start + self.boxes_per_batch],
                scores[start : start + self.boxes_per_batch],
            )
        ]
        ranking = np.argsort([-one.predicted_iou for one in found], kind="stable")
        places = [one.mask.box for one in found]
        kept = mask_ops.greedy_nms(places, ranking, self.config.box_nms_thresh)
        cleaned = (self._cleaned(found[i], *embedding.size) for i in kept)
        return [one for one in cleaned if one is not None]

    def _choose(self, scores: np.ndarray) -> np.ndarray:
        """Indices of the boxes that become prompts, from the highest score down."""
        known = np.nan_to_num(scores, nan=1.0)
        order = np.argsort(-known, kind="stable")
        return order[known[order] >= self.config.least_box_score][: self.config.max_boxes]

    def _masks(
        self, embedding: Embedding, boxes: np.ndarray, scores: np.ndarray
    ) -> list[PrefilledMask]:
        """The confident, stable masks of a batch of boxes."""
        config, upsampler = self.config, self.predictor.upsampler(embedding)
        predicted = self._predict(embedding, boxes)
        rows = passes_iou(predicted.iou[:, 0], config).nonzero()[:, 0]
        logits = predicted.logits[rows, 0]
        seen = upsampler.measure(logits, config.stability_score_offset)
        kept = passes(seen, config, *embedding.size).nonzero()[:, 0]
        # To the host all at once: a GPU is waited for once a batch, not once a mask.
        measured = (
            rows[kept],
            seen.boxes[kept],
            seen.stability[kept],
            predicted.iou[rows[kept], 0],
        )
        found = []
        for i, row, box, stability, iou in zip(
            kept.tolist(), *(values.tolist() for values in measured), strict=True
        ):
            part = logits[i][upsampler.window(box)]
            pixels = upsampler.render(part, tuple(box)).cpu().numpy()
            mask = WindowMask.of(pixels, box[1], box[0])
            if mask is not None:
                score = None if np.isnan(scores[row]) else float(scores[row])
                found.append(PrefilledMask(mask, iou, stability, score))
        return found

    def _predict(self, embedding: Embedding, boxes: np.ndarray) -> Prediction:
        """One mask for each box (§3: a box is not ambiguous), after the pass of refinement."""
        first = self.predictor.predict(embedding, boxes=boxes, multimask=False)
        if not self.config.refine:
            return first
        return self.predictor.predict(embedding, boxes=boxes, masks=first.logits, multimask=False)

    def _cleaned(self, one: PrefilledMask, height: int, width: int) -> PrefilledMask | None:
        config = self.config
        if config.min_mask_region_area == 0:
            return one
        mask = mask_ops.clean_up(one.mask, height, width, config.min_mask_region_area, config.rules)
        if mask is None:
            return None
        return PrefilledMask(mask, one.predicted_iou, one.stability_score, one.box_score)
