"""Fully automatic mask generation (paper §4 and appendix B): a grid of points on the image and its crops, then filters.

Everything is measured in the *released frame*: the image scaled down to ``short_side`` (1500 px in SA-1B, None for the
original size). Only the pixels of zoomed-in crops come from the original, which is the one use of its resolution.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sa_engine import masks as mask_ops
from sa_engine import rle
from sa_engine.filters import passes, passes_iou
from sa_engine.grids import Crop, crops, layer_grid
from sa_engine.images import fit_short_side, resize_image, resize_region
from sa_engine.masks import WindowMask
from sa_engine.modeling.mask_decoder import Attended
from sa_engine.modeling.sam import input_size
from sa_engine.option_groups import MaskConfig
from sa_engine.predictor import Embedding, Predictor
from sa_engine.upsampling import Measures, Upsampler

# Crops embedded at once: one keeps all of a CPU's cores busy.
CROPS_PER_BATCH = {"cpu": 1}
DEFAULT_CROPS_PER_BATCH = 8

# Like the built-in map over inputs that do not depend on each other, results in order.
Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterator[Any]]


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
    """A confident, stable mask of one crop, kept as low-resolution logits until NMS has chosen."""

    box: tuple[int, int, int, int]  # XYXY inclusive, in pixels of the crop
    logits: Tensor  # those that the pixels in the box depend on
    predicted_iou: float
    stability_score: float
    point: tuple[float, float]  # x, y in the released frame


@dataclass(frozen=True)
class Found:
    """A mask that was best in its crop, with its pixels."""

    mask: WindowMask  # in the released frame
    candidate: Candidate
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
        self.points_per_batch = config.points_per_batch or predictor.prompts_at_once
        self.crops_per_batch = CROPS_PER_BATCH.get(device, DEFAULT_CROPS_PER_BATCH)

    @torch.inference_mode()
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
        found: list[Found] = []
        layers, overlap = self.config.crop_n_layers, self.config.crop_overlap_ratio
        image_crops = crops(height, width, layers, overlap)
        with _side_by_side(self.predictor.sam.device) as each:
            for start in range(0, len(image_crops), self.crops_per_batch):
                some = image_crops[start : start + self.crops_per_batch]
                for crop, embedding in zip(some, self._embed(image, released, some), strict=True):
                    found += self._process_crop(embedding, crop, height, width, each)
        if len(image_crops) > 1:
            found = self._nms_across_crops(found)
        if self.config.min_mask_region_area > 0:
            found = self._clean_up(found, height, width)
        return [_generated(one, height, width) for one in found]

    def _embed(
        self, image: np.ndarray, released: np.ndarray, some: Sequence[Crop]
    ) -> list[Embedding]:
        """Embed crops of the released frame; zoomed-in crops take their pixels from the original."""
        pixels = []
        for crop in some:
            source = released if crop.layer == 0 else image
            scale_y = source.shape[0] / released.shape[0]
            scale_x = source.shape[1] / released.shape[1]
            x0, y0, x1, y1 = crop.box
            box = (x0 * scale_x, y0 * scale_y, x1 * scale_x, y1 * scale_y)
            size = input_size(*crop.size, self.predictor.sam.image_size)
            pixels.append(resize_region(source, box, *size))
        return self.predictor.embed_pixels(pixels, [crop.size for crop in some])

    def _process_crop(
        self, embedding: Embedding, crop: Crop, height: int, width: int, each: Map
    ) -> list[Found]:
        """Prompt one crop with its grid, filter, and remove duplicates by box NMS ranked by predicted IoU."""
        factor = self.config.crop_n_points_downscale_factor
        grid = layer_grid(self.config.points_per_side, crop.layer, factor)
        points = grid * np.array(crop.size[::-1])

        def process(start: int) -> list[Candidate]:
            batch = points[start : start + self.points_per_batch]
            return self._process_batch(embedding, batch, crop, height, width)

        batches = each(process, range(0, len(points), self.points_per_batch))
        candidates = [candidate for batch in batches for candidate in batch]
        ranking = np.argsort([-c.predicted_iou for c in candidates], kind="stable")
        kept = mask_ops.greedy_nms([c.box for c in candidates], ranking, self.config.box_nms_thresh)
        upsampler = self.predictor.upsampler(embedding)

        def render(i: int) -> Found | None:
            return _rendered(candidates[i], upsampler, crop)

        return [one for one in each(render, kept) if one is not None]

    def _process_batch(
        self, embedding: Embedding, points: np.ndarray, crop: Crop, height: int, width: int
    ) -> list[Candidate]:
        """Decode a batch of points; masks are computed only for prompts that pass the predicted-IoU filter."""
        predictor, decoder = self.predictor, self.predictor.decoder
        with predictor.inference():
            labels = np.ones((len(points), 1))
            attended = predictor.attend(embedding, points=points[:, None], labels=labels)
            predicted_iou = decoder.predict_iou(attended)[:, 1:].float()
            wanted = passes_iou(predicted_iou, self.config)
            prompts = wanted.any(dim=1).nonzero()[:, 0]
            if not len(prompts):
                return []
            if len(prompts) < len(points):
                attended = Attended(*(part[prompts] for part in attended))
            logits = decoder.predict_masks(attended, slice(1, None)).float()[wanted[prompts]]
        upsampler = predictor.upsampler(embedding)
        seen = upsampler.measure(logits, self.config.stability_score_offset)
        kept = self._passes(seen, crop, height, width).nonzero()[:, 0]
        # To the host all at once: a GPU is waited for once a batch, not once a mask.
        measured = [seen.boxes[kept], seen.stability[kept], predicted_iou[wanted][kept]]
        rows = wanted.nonzero()[:, 0][kept].tolist()
        x0, y0, _, _ = crop.box
        candidates = []
        for i, row, box, stability, score in zip(
            kept.tolist(), rows, *(values.tolist() for values in measured), strict=True
        ):
            x, y = points[row]
            part = logits[i][upsampler.window(box)].clone()
            point = (float(x + x0), float(y + y0))
            candidates.append(Candidate(tuple(box), part, score, stability, point))
        return candidates

    def _passes(self, seen: Measures, crop: Crop, height: int, width: int) -> Tensor:
        """Which of N masks are stable, do not cover the image, and are not cut at an inner crop edge: (N,) bool."""
        x0, y0, _, _ = crop.box
        boxes = seen.boxes + torch.tensor((x0, y0, x0, y0), device=seen.boxes.device)
        tolerance = self.config.crop_edge_tolerance
        cut = mask_ops.touches_crop_edge(boxes, crop.box, height, width, tolerance)
        return passes(seen, self.config, height, width) & ~cut

    def _nms_across_crops(self, found: list[Found]) -> list[Found]:
        """Box NMS over all crops, from most to least zoomed in; then by predicted IoU, then in order of crops.

        The reference ranks by the crop's area instead, and leaves ties in order of crops.
        """
        if self.config.rules == "reference":
            keys = [np.array([one.crop.size[0] * one.crop.size[1] for one in found])]
        else:
            scores = np.array([-one.candidate.predicted_iou for one in found])
            keys = [scores, np.array([-one.crop.layer for one in found])]
        return _nms(found, np.lexsort(keys), self.config.crop_nms_thresh)

    def _clean_up(self, found: list[Found], height: int, width: int) -> list[Found]:
        """Remove small components and fill small holes; area and box follow, the scores stay as predicted."""
        min_area, rules = self.config.min_mask_region_area, self.config.rules
        cleaned, changed = [], []
        for one in found:
            mask = mask_ops.clean_up(one.mask, height, width, min_area, rules)
            if mask is not None:
                cleaned.append(replace(one, mask=mask))
                changed.append(mask is not one.mask)
        if rules == "reference":  # the released code runs NMS once more, untouched masks first
            threshold = max(self.config.box_nms_thresh, self.config.crop_nms_thresh)
            cleaned = _nms(cleaned, np.argsort(changed, kind="stable"), threshold)
        return cleaned


@contextmanager
def _side_by_side(device: torch.device) -> Iterator[Map]:
    """``map`` over independent inputs.

    On a CPU every core takes one of its own: what a batch of prompts multiplies is too small to share between cores.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield map
        return
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        # Inference mode belongs to a thread.
        yield lambda function, inputs: pool.map(torch.inference_mode()(function), inputs)


def _nms(found: list[Found], order: np.ndarray, threshold: float) -> list[Found]:
    return [found[i] for i in mask_ops.greedy_nms([f.mask.box for f in found], order, threshold)]


def _rendered(candidate: Candidate, upsampler: Upsampler, crop: Crop) -> Found | None:
    """The candidate's pixels, moved from the crop to the released frame.

    Rounding differs from when it was measured: a pixel of the box's edge may be gone, or a one-pixel mask.
    """
    left, top, _, _ = candidate.box
    pixels = upsampler.render(candidate.logits, candidate.box).cpu().numpy()
    mask = WindowMask.of(pixels, top + crop.box[1], left + crop.box[0])
    return None if mask is None else Found(mask, candidate, crop)


def _generated(one: Found, height: int, width: int) -> GeneratedMask:
    window, (x0, y0, x1, y1) = one.mask.window, one.mask.box
    left, top, right, bottom = one.crop.box
    return GeneratedMask(
        segmentation=rle.encode_window(window, y0, x0, height, width),
        area=int(np.count_nonzero(window)),
        bbox=(float(x0), float(y0), float(x1 - x0), float(y1 - y0)),
        predicted_iou=one.candidate.predicted_iou,
        stability_score=one.candidate.stability_score,
        point_coords=one.candidate.point,
        crop_box=(float(left), float(top), float(right - left), float(bottom - top)),
    )
