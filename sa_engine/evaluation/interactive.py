"""Prompt a model with simulated clicks on the masks of images, and measure what it makes of them (paper §7.1, §D.1).

An image is embedded once. Its masks go through the decoder in batches, all of a batch one click further at a time:

- 1 click: of the three masks, the one with the highest predicted IoU. The best of the three by true IoU is the
  *oracle*; it is reported only, and nothing follows from it.
- 2 clicks and more: all clicks so far and, as mask prompt, the low-resolution logits of the mask before: after the
  first click those of the mask with the highest predicted IoU. One mask comes out, the decoder's single-mask output.
- Each click is chosen by what is wrong with the mask before. A mask without an error is left as it is.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from sa_engine import rle
from sa_engine.errors import SaEngineError
from sa_engine.evaluation.clicks import Click, center_click, mask_iou, next_click, random_click
from sa_engine.masks import WindowMask
from sa_engine.modeling.sam import encoder_fingerprint
from sa_engine.predictor import Embedding, Predictor
from sa_engine.records import ImageRecord, MaskRecord

MASKS_PER_BATCH = {"cpu": 4}
DEFAULT_MASKS_PER_BATCH = 64
ORACLE, BOX = "oracle", "box"


class EvaluationError(SaEngineError):
    """What is to be evaluated is not there, or cannot be."""


@dataclass(frozen=True, kw_only=True)
class Protocol:
    """What is measured.

    Attributes:
        points: numbers of clicks after which the IoU is reported, ascending.
        first_point: "center" (farthest from the boundary) or "random" (any pixel of the mask).
        boxes: measure box prompts too.
        max_masks: masks per image, a random sample of them; None: all.
        seed: of the random choices; each depends on it and the image's or mask's id alone.
        masks_per_batch: masks decoded at once; None: chosen for the device. It changes nothing but rounding.
    """

    points: tuple[int, ...] = (1, 2, 3, 5, 9)
    first_point: str = "center"
    boxes: bool = False
    max_masks: int | None = None
    seed: int = 0
    masks_per_batch: int | None = None

    @property
    def metrics(self) -> tuple[str, ...]:
        """Names of what is measured: numbers of clicks, `oracle` after the first, `box`."""
        clicks = [str(number) for number in self.points]
        if 1 in self.points:
            clicks.insert(1, ORACLE)
        return (*clicks, *([BOX] if self.boxes else []))


@dataclass(frozen=True)
class ImageScores:
    """What was measured on the M masks of an image, at least one.

    Attributes:
        image_id: of its record.
        source_path: of its record.
        mask_ids: M.
        areas: (M,) pixels of the true masks, in the released image.
        iou: by `Protocol.metrics`, (M,) float64.
    """

    image_id: int
    source_path: str | None
    mask_ids: tuple[int, ...]
    areas: np.ndarray
    iou: dict[str, np.ndarray]


@dataclass(frozen=True)
class Evaluation:
    """A model's scores on a data set: of every image that has masks."""

    protocol: Protocol
    images: tuple[ImageScores, ...]

    @property
    def masks(self) -> int:
        return sum(len(image.areas) for image in self.images)

    def mean(self, metric: str) -> float:
        """Mean IoU over all masks."""
        return float(np.concatenate([image.iou[metric] for image in self.images]).mean())


def evaluate_model(
    predictor: Predictor,
    images: Iterable[tuple[ImageRecord, np.ndarray]],
    protocol: Protocol,
    progress: Callable[[], object] | None = None,
) -> Evaluation:
    """Measure a model on images whose masks are the truth.

    Args:
        predictor: of the model.
        images: records with their released images, (H, W, 3) uint8 RGB; those without masks are passed over.
        protocol: what to measure.
        progress: called after every image.

    Raises:
        EvaluationError: an image of another size than its record says, a mask without pixels, no mask at all, or a
            model whose embeddings are not finite.
    """
    return evaluate_models([predictor], images, protocol, progress)[0]


def evaluate_models(
    predictors: Sequence[Predictor],
    images: Iterable[tuple[ImageRecord, np.ndarray]],
    protocol: Protocol,
    progress: Callable[[], object] | None = None,
    seconds: list[float] | None = None,
) -> list[Evaluation]:
    """Measure several models on the same images, each read once; models with the same image encoder share embeddings.

    Args:
        predictors: of the models, of one precision.
        images, protocol, progress: as for :func:`evaluate_model`; progress is called for every model.
        seconds: to which each model's are added, as many; an embedding's go to the first model that needs it.

    Raises:
        EvaluationError: as :func:`evaluate_model`.
    """
    encoders = [encoder_fingerprint(one.sam) for one in predictors]
    found: list[list[ImageScores]] = [[] for _ in predictors]
    spent = [0.0] * len(predictors) if seconds is None else seconds
    for record, image in images:
        embeddings: dict[str, Embedding] = {}
        for index, (predictor, encoder) in enumerate(zip(predictors, encoders, strict=True)):
            started = time.monotonic()
            if record.masks:
                embedding = _embedding(predictor, record, image, embeddings.get(encoder))
                embeddings.setdefault(encoder, embedding)
                found[index].append(evaluate_image(predictor, record, image, protocol, embedding))
            spent[index] += time.monotonic() - started
            if progress is not None:
                progress()
    if not found[0]:
        raise EvaluationError("there are no masks to evaluate with: no image has any")
    return [Evaluation(protocol, tuple(one)) for one in found]


def evaluate_image(
    predictor: Predictor,
    record: ImageRecord,
    image: np.ndarray,
    protocol: Protocol,
    embedding: Embedding | None = None,
) -> ImageScores:
    """Measure a model on the masks of one image, as :func:`evaluate_model` does; it may be embedded already."""
    if image.shape[:2] != (record.height, record.width):
        raise EvaluationError(
            f"image {record.image_id} is {image.shape[1]}x{image.shape[0]} pixels, and its masks are "
            f"of {record.width}x{record.height}: `sa-engine verify` says what is damaged"
        )
    if embedding is None:
        embedding = _embedding(predictor, record, image, None)
    masks = _sample(record, protocol)
    truths = [_truth(mask) for mask in masks]
    firsts = [
        _first_click(mask, truth, protocol) for mask, truth in zip(masks, truths, strict=True)
    ]
    device = predictor.sam.device.type
    size = protocol.masks_per_batch or MASKS_PER_BATCH.get(device, DEFAULT_MASKS_PER_BATCH)
    iou = {metric: np.zeros(len(masks)) for metric in protocol.metrics}
    for start in range(0, len(masks), size):
        batch = slice(start, start + size)
        scores = _follow_clicks(predictor, embedding, truths[batch], firsts[batch], protocol)
        if protocol.boxes:
            scores[BOX] = _prompt_boxes(predictor, embedding, truths[batch])
        for metric, values in iou.items():
            values[batch] = scores[metric]
    return ImageScores(
        record.image_id,
        record.source_path,
        tuple(mask.id for mask in masks),
        np.array([mask.area for mask in masks]),
        iou,
    )


def _embedding(
    predictor: Predictor, record: ImageRecord, image: np.ndarray, known: Embedding | None
) -> Embedding:
    """A model's embedding of an image, from that of a model with the same encoder if there is one."""
    if known is not None:
        return predictor.wrap(known.features, known.size, known.input_size)
    try:
        return predictor.embed(image)
    except FloatingPointError as error:
        raise EvaluationError(f"image {record.image_id}: {error}") from None


def _sample(record: ImageRecord, protocol: Protocol) -> Sequence[MaskRecord]:
    """The masks to be measured, in the order of the record."""
    if protocol.max_masks is None or len(record.masks) <= protocol.max_masks:
        return record.masks
    rng = np.random.default_rng((protocol.seed, record.image_id))
    chosen = rng.choice(len(record.masks), protocol.max_masks, replace=False)
    return [record.masks[index] for index in sorted(chosen)]


def _truth(mask: MaskRecord) -> WindowMask:
    truth = WindowMask.of(rle.decode(mask.segmentation), 0, 0)
    if truth is None:
        raise EvaluationError(
            f"mask {mask.id} has no pixel: nothing can be clicked; `sa-engine verify` finds such masks"
        )
    return truth


def _first_click(mask: MaskRecord, truth: WindowMask, protocol: Protocol) -> Click:
    if protocol.first_point == "center":
        return center_click(truth)
    return random_click(truth, np.random.default_rng((protocol.seed, mask.id)))


def _follow_clicks(
    predictor: Predictor,
    embedding: Embedding,
    truths: Sequence[WindowMask],
    firsts: Sequence[Click],
    protocol: Protocol,
) -> dict[str, np.ndarray]:
    """IoU of B masks after each wanted number of clicks, and of the oracle: (B,) each."""
    clicks = [[first] for first in firsts]
    prediction = predictor.predict(embedding, *_points(clicks), multimask=True)
    rendered = _render(predictor, embedding, prediction.logits)
    three = np.array([[mask_iou(truth, mask) for mask in masks]
                      for truth, masks in zip(truths, rendered, strict=True)])  # fmt: skip
    best = prediction.iou.cpu().numpy().argmax(axis=1)
    rows = np.arange(len(truths))
    masks = [rendered[row][token] for row, token in zip(rows, best, strict=True)]
    logits = prediction.logits[rows, best][:, None]
    iou = three[rows, best]
    scores = {"1": iou.copy(), ORACLE: three.max(axis=1)}
    for number in range(2, max(protocol.points) + 1):
        wrong = []
        for row, (truth, mask) in enumerate(zip(truths, masks, strict=True)):
            click = next_click(truth, mask)
            if click is not None:
                clicks[row].append(click)
                wrong.append(row)
        if wrong:
            logits[wrong] = predictor.predict(
                embedding,
                *_points([clicks[row] for row in wrong]),
                masks=logits[wrong],
                multimask=False,
            ).logits
            rendered = _render(predictor, embedding, logits[wrong])
            for row, (mask,) in zip(wrong, rendered, strict=True):
                masks[row], iou[row] = mask, mask_iou(truths[row], mask)
        scores[str(number)] = iou.copy()
    return scores


def _prompt_boxes(
    predictor: Predictor, embedding: Embedding, truths: Sequence[WindowMask]
) -> np.ndarray:
    """IoU of B masks prompted with their boxes, XYXY from first to last pixel, single-mask output: (B,)."""
    boxes = np.array([truth.box for truth in truths], dtype=np.float32)
    logits = predictor.predict(embedding, boxes=boxes, multimask=False).logits
    rendered = _render(predictor, embedding, logits)
    return np.array(
        [mask_iou(truth, mask) for truth, (mask,) in zip(truths, rendered, strict=True)]
    )


def _points(clicks: Sequence[Sequence[Click]]) -> tuple[np.ndarray, np.ndarray]:
    """Clicks of B masks, N each, as points (B, N, 2) and labels (B, N)."""
    values = np.array(clicks, dtype=np.float32)
    return values[..., :2], values[..., 2]


def _render(
    predictor: Predictor, embedding: Embedding, logits: Tensor
) -> list[list[WindowMask | None]]:
    """The B times M masks of (B, M, 256, 256) logits at the image's size; None where one is empty."""
    upsampler = predictor.upsampler(embedding)
    flat = logits.flatten(0, 1)
    measured = upsampler.measure(flat, 0.0)
    found: list[WindowMask | None] = []
    for one, area, box in zip(flat, measured.areas.tolist(), measured.boxes.tolist(), strict=True):
        if not area:
            found.append(None)
            continue
        x0, y0, _, _ = box
        window = upsampler.render(one[upsampler.window(box)], box).cpu().numpy()
        found.append(WindowMask.of(window, y0, x0))
    count = logits.shape[1]
    return [found[start : start + count] for start in range(0, len(found), count)]
