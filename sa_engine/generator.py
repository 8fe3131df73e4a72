"""Fully automatic mask generation (paper §4 and appendix B): a grid of points on the image and its crops, then filters.

Everything is measured in the *released frame*: the image scaled down to ``short_side`` (1500 px in SA-1B, None for the
original size). Only the pixels of zoomed-in crops come from the original, which is the one use of its resolution.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from sa_engine import masks as mask_ops
from sa_engine import rle
from sa_engine.config import MaskConfig
from sa_engine.grids import Crop, crops, layer_grid
from sa_engine.images import fit_short_side, resize_image, resize_region
from sa_engine.masks import WindowMask
from sa_engine.modeling.mask_decoder import Attended
from sa_engine.modeling.sam import input_size
from sa_engine.predictor import Embedding, Predictor

# On a CPU two prompts' image tokens (4 MB each) stay in cache; a GPU wants many at once.
POINTS_PER_BATCH = {"cpu": 2}
DEFAULT_POINTS_PER_BATCH = 64
# Pixels of full-size logits held at once while thresholding.
PIXELS_AT_ONCE = 8_000_000


@dataclass(frozen=True)
class GeneratedMask:
    """One mask in the released frame; the fields of an SA-1B annotation."""

    segmentation: rle.RLE
    area: int  # pixels
    bbox: tuple[float, float, float, float]  # XYWH, width = xmax - xmin as in SA-1B
    predicted_iou: float
    stability_score: float
    point_coords: tuple[float, float]  # x, y of the point that prompted it
    crop_box: tuple[float, float, float, float]  # XYWH


@dataclass(frozen=True)
class Candidate:
    """A mask that passed the filters so far."""

    mask: WindowMask  # in the released frame
    area: int
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]
    crop: Crop


class MaskGenerator:
    """Masks for everything in an image.

    Args:
        predictor: the model.
        config: numbers and rules; the defaults are the paper's, ``configs/parity.yaml`` the released code's.
    """

    def __init__(self, predictor: Predictor, config: MaskConfig) -> None:
        self.predictor = predictor
        self.config = config
        device = predictor.sam.device.type
        default_batch = POINTS_PER_BATCH.get(device, DEFAULT_POINTS_PER_BATCH)
        self.points_per_batch = config.points_per_batch or default_batch

    def generate(
        self, image: np.ndarray, released: np.ndarray | None = None
    ) -> list[GeneratedMask]:
        """Masks of a (H, W, 3) uint8 RGB image, most to least preferred; empty when none survives.

        Args:
            image: the original pixels, upright.
            released: the same image at its released size, if the caller has it already.
        """
        if released is None:
            size = fit_short_side(image.shape[0], image.shape[1], self.config.short_side)
            released = resize_image(image, *size)
        height, width = released.shape[:2]
        found: list[Candidate] = []
        layers, overlap = self.config.crop_n_layers, self.config.crop_overlap_ratio
        image_crops = crops(height, width, layers, overlap)
        for crop in image_crops:
            embedding = self._embed_crop(image, released, crop)
            found += self._process_crop(embedding, crop, height, width)
        if len(image_crops) > 1:
            found = self._nms_across_crops(found)
        if self.config.min_mask_region_area > 0:
            found = self._clean_up(found, height, width)
        return [_generated(candidate, height, width) for candidate in found]

    def _embed_crop(self, image: np.ndarray, released: np.ndarray, crop: Crop) -> Embedding:
        """Embed a crop of the released frame; zoomed-in crops take their pixels from the original."""
        size = input_size(*crop.size, self.predictor.sam.image_size)
        source = released if crop.layer == 0 else image
        scale_y = source.shape[0] / released.shape[0]
        scale_x = source.shape[1] / released.shape[1]
        x0, y0, x1, y1 = crop.box
        box = (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y)
        pixels = resize_region(source, box, *size)
        return self.predictor.embed_pixels([pixels], [crop.size])[0]

    def _process_crop(
        self, embedding: Embedding, crop: Crop, height: int, width: int
    ) -> list[Candidate]:
        """Prompt one crop with its grid, filter, and remove duplicates by box NMS ranked by predicted IoU."""
        factor = self.config.crop_n_points_downscale_factor
        grid = layer_grid(self.config.points_per_side, crop.layer, factor)
        points = grid * np.array(crop.size[::-1])
        found = []
        for start in range(0, len(points), self.points_per_batch):
            batch = points[start : start + self.points_per_batch]
            found += self._process_batch(embedding, batch, crop, height, width)
        ranking = np.array([-c.predicted_iou for c in found])
        return _nms(found, np.argsort(ranking, kind="stable"), self.config.box_nms_thresh)

    def _process_batch(
        self, embedding: Embedding, points: np.ndarray, crop: Crop, height: int, width: int
    ) -> list[Candidate]:
        """Decode a batch of points; masks are computed only for prompts that pass the predicted-IoU filter."""
        predictor, decoder = self.predictor, self.predictor.decoder
        with predictor.inference():
            labels = np.ones((len(points), 1))
            attended = predictor.attend(embedding, points=points[:, None], labels=labels)
            predicted_iou = decoder.predict_iou(attended)[:, 1:].float()
            wanted = self._passes_iou(predicted_iou)
            prompts = wanted.any(dim=1).nonzero()[:, 0]
            if not len(prompts):
                return []
            kept = Attended(*(part[prompts] for part in attended))
            logits = decoder.predict_masks(kept, slice(1, None)).float()[wanted[prompts]]
            scores = predicted_iou[wanted].tolist()
            rows = wanted.nonzero()[:, 0].tolist()
            found = []
            for i, mask, area, stability in self._filtered(logits, embedding, crop, height, width):
                x, y = points[rows[i]]
                point = (float(x + crop.box[0]), float(y + crop.box[1]))
                found.append(Candidate(mask, area, scores[i], stability, point, crop))
        return found

    def _passes_iou(self, predicted_iou: Tensor) -> Tensor:
        threshold = self.config.pred_iou_thresh
        if threshold == 0:
            return torch.ones_like(predicted_iou, dtype=torch.bool)
        strict = self.config.rules == "reference"
        return predicted_iou > threshold if strict else predicted_iou >= threshold

    def _filtered(
        self, logits: Tensor, embedding: Embedding, crop: Crop, height: int, width: int
    ) -> Iterator[tuple[int, WindowMask, int, float]]:
        """Of (N, 256, 256) logits: index, mask, area and stability of those that are stable, partial and uncut."""
        config, (x0, y0, _, _) = self.config, crop.box
        at_once = max(1, PIXELS_AT_ONCE // (crop.size[0] * crop.size[1]))
        for start in range(0, len(logits), at_once):
            full = self.predictor.upsample(logits[None, start : start + at_once], embedding)[0]
            seen = mask_ops.threshold(full, config.stability_score_offset)
            keep = seen.areas > 0
            if config.stability_score_thresh > 0:
                keep &= seen.stability >= config.stability_score_thresh
            if config.max_mask_coverage is not None:
                keep &= seen.areas < config.max_mask_coverage * height * width
            boxes = seen.boxes + torch.tensor((x0, y0, x0, y0), device=full.device)
            keep &= ~mask_ops.touches_crop_edge(
                boxes, crop.box, height, width, config.crop_edge_tolerance
            )
            for i in keep.nonzero()[:, 0].tolist():
                left, top, right, bottom = seen.boxes[i].tolist()
                window = seen.masks[i, top : bottom + 1, left : right + 1].cpu().numpy()
                mask = WindowMask.of(window, top + y0, left + x0)
                yield start + i, mask, int(seen.areas[i]), float(seen.stability[i])

    def _nms_across_crops(self, found: list[Candidate]) -> list[Candidate]:
        """Box NMS over all crops, from most to least zoomed in; then by predicted IoU, then in order of crops.

        The reference ranks by the crop's area instead, and leaves ties in order of crops.
        """
        if self.config.rules == "reference":
            keys = [np.array([c.crop.size[0] * c.crop.size[1] for c in found])]
        else:
            keys = [
                np.array([-c.predicted_iou for c in found]),
                np.array([-c.crop.layer for c in found]),
            ]
        return _nms(found, np.lexsort(keys), self.config.crop_nms_thresh)

    def _clean_up(self, found: list[Candidate], height: int, width: int) -> list[Candidate]:
        """Remove small components and fill small holes; area and box follow, the scores stay as predicted."""
        min_area, rules = self.config.min_mask_region_area, self.config.rules
        cleaned, changed = [], []
        for candidate in found:
            mask = mask_ops.clean_up(candidate.mask, height, width, min_area, rules)
            if mask is not None:
                changed.append(mask is not candidate.mask)
                area = int(np.count_nonzero(mask.window)) if changed[-1] else candidate.area
                cleaned.append(replace(candidate, mask=mask, area=area))
        if rules == "reference":  # the released code runs NMS once more, untouched masks first
            threshold = max(self.config.box_nms_thresh, self.config.crop_nms_thresh)
            cleaned = _nms(cleaned, np.argsort(changed, kind="stable"), threshold)
        return cleaned


def _nms(found: list[Candidate], order: np.ndarray, threshold: float) -> list[Candidate]:
    if not found:
        return []
    boxes = np.array([c.mask.box for c in found])
    return [found[i] for i in mask_ops.greedy_nms(boxes, order, threshold)]


def _generated(candidate: Candidate, height: int, width: int) -> GeneratedMask:
    mask, (x0, y0, x1, y1) = candidate.mask, candidate.mask.box
    left, top, right, bottom = candidate.crop.box
    return GeneratedMask(
        segmentation=rle.encode_window(mask.window, mask.top, mask.left, height, width),
        area=candidate.area,
        bbox=(float(x0), float(y0), float(x1 - x0), float(y1 - y0)),
        predicted_iou=candidate.predicted_iou,
        stability_score=candidate.stability_score,
        point_coords=candidate.point,
        crop_box=(float(left), float(top), float(right - left), float(bottom - top)),
    )
