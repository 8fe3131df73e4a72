"""Embed an image once, prompt it many times."""

import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sa_engine.errors import SaEngineError
from sa_engine.images import resize_image
from sa_engine.modeling.folded import FoldedDecoder, SharedImage
from sa_engine.modeling.mask_decoder import Attended
from sa_engine.modeling.sam import Sam, input_size
from sa_engine.upsampling import Upsampler, cached_upsampler

Prompt = np.ndarray | Tensor

# On a CPU a few prompts' image tokens stay in cache (4 MB each in fp32, 2 in bf16); a GPU wants many at once.
_PROMPTS_AT_ONCE = {("cpu", "fp32"): 4, ("cpu", "bf16"): 8}
_DEFAULT_PROMPTS_AT_ONCE = 64


@dataclass(frozen=True)
class Embedding:
    """An embedded image; prompts and masks are in the frame of its ``size``."""

    features: Tensor  # (1, 256, 64, 64)
    size: tuple[int, int]  # (height, width) of the image that prompts refer to
    input_size: tuple[int, int]  # (height, width) of its pixels inside the padded model input
    shared: SharedImage  # the decoder's part that is the same for all prompts without a mask


class Prediction(NamedTuple):
    """Masks for B prompts, M each."""

    logits: Tensor  # (B, M, 256, 256) float32 at low resolution; a mask prompt for the next round
    iou: Tensor  # (B, M) float32 predicted IoU


class Predictor:
    """Prompting SAM. Keeps no state between calls, so that embeddings may be kept, shared and mixed.

    Args:
        sam: the model, on the device to be used; its weights must not change afterwards.
        precision: ``fp32``, or ``bf16`` for autocast arithmetic (not exact).
        compile: run the image encoder through ``torch.compile``: a minute at the first image, then a little faster.

    Raises:
        SaEngineError: ``compile`` on a CPU without a C++ compiler.
    """

    def __init__(self, sam: Sam, precision: str = "fp32", compile: bool = False) -> None:
        self.sam = sam.eval()
        self.precision = precision
        self.encoder: Callable[[Tensor], Tensor] = sam.image_encoder
        if compile:
            _check_compiler(sam.device)
            self.encoder = torch.compile(sam.image_encoder)
        with torch.inference_mode():
            positions = sam.prompt_encoder.dense_positions()
            if precision == "bf16":
                positions = positions.bfloat16()
            self.decoder = FoldedDecoder(sam.mask_decoder, positions)
            self.no_mask = sam.prompt_encoder.no_mask()

    @property
    def prompts_at_once(self) -> int:
        """How many prompts are best decoded in one batch."""
        key = (self.sam.device.type, self.precision)
        return _PROMPTS_AT_ONCE.get(key, _DEFAULT_PROMPTS_AT_ONCE)

    @contextmanager
    def inference(self) -> Iterator[None]:
        """Inference mode in the wanted precision."""
        autocast = torch.autocast(
            self.sam.device.type, torch.bfloat16, enabled=self.precision == "bf16"
        )
        with torch.inference_mode(), autocast:
            yield

    def embed(self, image: np.ndarray) -> Embedding:
        """Embed a (H, W, 3) uint8 RGB image."""
        height, width = image.shape[:2]
        pixels = resize_image(image, *input_size(height, width, self.sam.image_size))
        return self.embed_pixels([pixels], [(height, width)])[0]

    def embed_pixels(
        self, pixels: Sequence[np.ndarray], sizes: Sequence[tuple[int, int]]
    ) -> list[Embedding]:
        """Embed images already scaled to the model input, in one batch.

        Args:
            pixels: (h, w, 3) uint8 RGB arrays whose sizes are ``input_size`` of the entry in ``sizes``.
            sizes: (height, width) of the frame that prompts and masks will use.

        Raises:
            FloatingPointError: the embedding is not finite, so every mask would silently be missing.
        """
        with self.inference():
            images = [self._to_device(torch.from_numpy(p)).permute(2, 0, 1) for p in pixels]
            batch = torch.stack([self.sam.preprocess(image) for image in images])
            features = self.encoder(batch).float()
            if not features.isfinite().all():
                raise FloatingPointError(
                    f"the image encoder gave values that are not finite in {self.precision}: "
                    "the checkpoint is damaged, or needs --precision fp32"
                )
            return [
                self.wrap(one, size, (p.shape[0], p.shape[1]))
                for one, p, size in zip(features.split(1), pixels, sizes, strict=True)
            ]

    def wrap(
        self, features: Tensor, size: tuple[int, int], input_size: tuple[int, int]
    ) -> Embedding:
        """An embedding of this model's from its (1, 256, 64, 64) features; the sizes are `Embedding`'s."""
        with self.inference():
            shared = self.decoder.share(features, self.no_mask)
        return Embedding(features, size, input_size, shared)

    def predict(
        self,
        embedding: Embedding,
        points: Prompt | None = None,
        labels: Prompt | None = None,
        boxes: Prompt | None = None,
        masks: Prompt | None = None,
        multimask: bool = True,
    ) -> Prediction:
        """Masks for B prompts; see :meth:`attend` for the arguments.

        Args:
            multimask: three masks for an ambiguous prompt (one point), else the single mask (§3).
        """
        with self.inference():
            attended = self.attend(embedding, points, labels, boxes, masks)
            wanted = _outputs(multimask)
            logits = self.decoder.predict_masks(attended, wanted)
            iou = self.decoder.predict_iou(attended)[:, wanted]
        return Prediction(logits.float(), iou.float())

    def predict_iou(
        self,
        embedding: Embedding,
        points: Prompt | None = None,
        labels: Prompt | None = None,
        boxes: Prompt | None = None,
        multimask: bool = True,
    ) -> Tensor:
        """The predicted IoUs of :meth:`predict` alone, (B, M) float32: in half of the time."""
        with self.inference():
            attended = self.attend(embedding, points, labels, boxes)
            return self.decoder.predict_iou(attended)[:, _outputs(multimask)].float()

    def attend(
        self,
        embedding: Embedding,
        points: Prompt | None = None,
        labels: Prompt | None = None,
        boxes: Prompt | None = None,
        masks: Prompt | None = None,
    ) -> Attended:
        """Run the decoder's transformer for B prompts; masks and predicted IoU follow from its result.

        Args:
            embedding: of one image.
            points: (B, N, 2) x, y in pixels of ``embedding.size``.
            labels: (B, N) 1 foreground, 0 background, -1 padding.
            boxes: (B, 4) XYXY in pixels of ``embedding.size``.
            masks: (B, 1, 256, 256) logits of a previous prediction.

        Raises:
            ValueError: no prompt, points without labels, or different numbers of prompts.
        """
        given = [p for p in (points, labels, boxes, masks) if p is not None]
        if not given or (points is None) != (labels is None):
            raise ValueError("a prompt needs points with labels, boxes or masks")
        if len({len(p) for p in given}) > 1:
            raise ValueError(f"prompts differ in number: {[len(p) for p in given]}")
        with self.inference():
            tokens, dense = self.sam.prompt_encoder(
                self._to_input(points, embedding),
                self._to_tensor(labels),
                self._to_input(boxes, embedding),
                self._to_tensor(masks),
            )
            shared = embedding.shared
            if masks is not None:
                shared = self.decoder.share(embedding.features, dense)
            return self.decoder.attend(shared, tokens)

    def upsample(self, logits: Tensor, embedding: Embedding) -> Tensor:
        """Bring (N, M, 256, 256) logits to the image's size: (N, M, height, width).

        Twice bilinear, by way of the padded model input, as the released model does: the mask edges depend on it.
        """
        side = self.sam.image_size
        height, width = embedding.input_size
        logits = F.interpolate(logits, (side, side), mode="bilinear", align_corners=False)
        logits = logits[..., :height, :width]
        return F.interpolate(logits, embedding.size, mode="bilinear", align_corners=False)

    def upsampler(self, embedding: Embedding) -> Upsampler:
        """What measures and renders masks of this image without upsampling them whole."""
        low_size, image_size = self.sam.prompt_encoder.mask_size, self.sam.image_size
        return cached_upsampler(
            low_size, image_size, embedding.input_size, embedding.size, self.sam.device
        )

    def _to_device(self, values: Tensor) -> Tensor:
        """Copy to the model's device; to a GPU without waiting for it."""
        if self.sam.device.type == "cuda" and values.device.type == "cpu":
            values = values.pin_memory()
        return values.to(self.sam.device, non_blocking=True)

    def _to_tensor(self, values: Prompt | None) -> Tensor | None:
        if values is None:
            return None
        return self._to_device(torch.as_tensor(values, dtype=torch.float32))

    def _to_input(self, coordinates: Prompt | None, embedding: Embedding) -> Tensor | None:
        """Points (B, N, 2) or boxes (B, 4) from pixels of the image to pixels of the model input."""
        tensor = self._to_tensor(coordinates)
        if tensor is None:
            return None
        (height, width), (input_height, input_width) = embedding.size, embedding.input_size
        scale = torch.tensor([input_width / width, input_height / height], device=tensor.device)
        return (tensor.unflatten(-1, (-1, 2)) * scale).reshape(tensor.shape)


def _outputs(multimask: bool) -> slice:
    """Which of the decoder's four outputs are meant."""
    return slice(1, None) if multimask else slice(0, 1)


def _check_compiler(device: torch.device) -> None:
    """Raise SaEngineError where every image would fail, one by one, for want of a compiler."""
    compilers = (os.environ.get("CXX", "g++"), "clang++")
    if device.type == "cpu" and not any(shutil.which(name) for name in compilers):
        raise SaEngineError(
            "compile = true needs a C++ compiler on a CPU, and none of "
            f"{', '.join(compilers)} is there: install g++, or leave compile out"
        )
