"""A trained detector at work: boxes of a photo, from its SAM embedding or its pixels."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sa_engine.detection.model import BoxDetector
from sa_engine.images import resize_image
from sa_engine.modeling.sam import PIXEL_MEAN, PIXEL_STD, input_size


class Detector:
    """Boxes of photos.

    Args:
        model: on the device to be used.
    """

    def __init__(self, model: BoxDetector) -> None:
        self.model = model.eval()
        self.device = next(model.parameters()).device

    @property
    def takes_embedding(self) -> bool:
        """Whether it sees SAM's embedding, and not the pixels."""
        return self.model.takes_embedding

    @torch.inference_mode()
    def detect(
        self, image: np.ndarray, features: Tensor | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Boxes of a (H, W, 3) uint8 RGB image.

        Args:
            image: the image.
            features: (1, 256, 64, 64), its embedding, for a detector that sees that.

        Returns:
            (N, 4) float64 XYXY in the image's pixels and (N,) float64 scores, the highest first.
        """
        size = input_size(image.shape[0], image.shape[1], self.model.image_size)
        if self.takes_embedding:
            assert features is not None
            inputs = features.to(self.device).float()
        else:
            inputs = model_input(resize_image(image, *size), self.model.image_size).to(self.device)
        (found,) = self.model.detect(inputs, [size])
        scale = np.array(image.shape[1::-1]) / size[::-1]
        boxes = found.boxes.cpu().numpy().astype(np.float64) * np.tile(scale, 2)
        return boxes, found.scores.cpu().numpy().astype(np.float64)


def model_input(pixels: np.ndarray, image_size: int) -> Tensor:
    """(1, 3, S, S) normalised values of (h, w, 3) uint8 RGB pixels, padded right and below."""
    mean, std = (torch.tensor(values).reshape(-1, 1, 1) for values in (PIXEL_MEAN, PIXEL_STD))
    normed = (torch.from_numpy(pixels).permute(2, 0, 1) - mean) / std
    height, width = pixels.shape[:2]
    return F.pad(normed, (0, image_size - width, 0, image_size - height))[None]
