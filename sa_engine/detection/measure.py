"""How good a detector's boxes are: average recall of the best 100 (paper §7.3, §D.3; `evaluation/proposals.py`)."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sa_engine.detection.detector import Detector
from sa_engine.detection.files import load_detector, sees_embedding
from sa_engine.detection.model import BoxDetector
from sa_engine.evaluation.data import DataSet
from sa_engine.evaluation.proposals import ALL, ImageRecall, Proposals, image_recall
from sa_engine.images import resize_image
from sa_engine.modeling.sam import Sam, input_size, load_sam, select_device
from sa_engine.modeling.weights import resolve
from sa_engine.records import ImageRecord
from sa_engine.training.sam import encode
from sa_engine.training.validation import MEAN, ValidationImages

PROPOSALS = 100


def embedder(sam: Sam | None, precision: str) -> Callable[[np.ndarray], Tensor | None]:
    """What gives the embedding (1, 256, 64, 64) of a (H, W, 3) uint8 RGB image; of no SAM, none."""
    if sam is None:
        return lambda image: None
    sam.eval()

    @torch.no_grad()  # else every embedding would keep all that it was computed from: half a gigabyte
    def embed(image: np.ndarray) -> Tensor:
        pixels = resize_image(image, *input_size(image.shape[0], image.shape[1], sam.image_size))
        return encode(sam, pixels, precision)

    return embed


def detector_recall(
    data: DataSet,
    folder: Path,
    checkpoint: str,
    limit: int = 1000,
    done: Callable[[int], object] = lambda images: None,
) -> dict[int, ImageRecall]:
    """What a detector's boxes find of the truth, by image id.

    Args:
        data: the truth.
        folder: of the detector.
        checkpoint: the SAM whose embedding it sees.
        limit: proposals per image.
        done: called with the number of images that were added.

    Raises:
        SaEngineError: no such detector or model, or images that cannot be read.
    """
    device = select_device("auto")
    sam = load_sam(resolve(checkpoint), device) if sees_embedding(folder) else None
    detector, embed = Detector(load_detector(folder, sam)[0].to(device)), embedder(sam, "fp32")
    recalls = {}
    for record, image in data:
        proposals = Proposals(*detector.detect(image, embed(image)))
        recalls[record.image_id] = image_recall(record, proposals, "boxes", limit)
        done(1)
    return recalls


class Validation:
    """The validation of a detector on a sample of images.

    Args:
        images: to validate on.
        embed: see `embedder`; an image is embedded once.
    """

    def __init__(
        self, images: ValidationImages, embed: Callable[[np.ndarray], Tensor | None]
    ) -> None:
        self._images, self._embed = images, embed
        self._features: dict[tuple[str, int], Tensor | None] = {}

    def measure(self, model: BoxDetector) -> dict[str, float]:
        """AR@100 by data set, each mask counting the same, and the mean over data sets; leaves it in eval mode."""
        detector = Detector(model)

        def score(name: str, record: ImageRecord, image: np.ndarray) -> tuple[list[float], int]:
            key = (name, record.image_id)
            if key not in self._features:
                self._features[key] = self._embed(image)
            proposals = Proposals(*detector.detect(image, self._features[key]))
            recall = image_recall(record, proposals, "boxes", PROPOSALS)
            return [float(recall.sums(ALL, [PROPOSALS])[0])], len(record.masks)

        found = {name: float(recall) for name, (recall,) in self._images.means(1, score).items()}
        return {**found, MEAN: float(np.mean(list(found.values())))}
