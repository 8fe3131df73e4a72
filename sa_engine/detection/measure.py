"""How good a detector's boxes are: average recall of the best 100 (paper §7.3, §D.3; `evaluation/proposals.py`)."""

from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from pathlib import Path

import numpy as np
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
from sa_engine.training.group import Group
from sa_engine.training.sam import encode
from sa_engine.training.validation import MEAN

PROPOSALS = 100
Images = Iterable[tuple[ImageRecord, np.ndarray]]


def embedder(sam: Sam | None, precision: str) -> Callable[[np.ndarray], Tensor | None]:
    """What gives the embedding (1, 256, 64, 64) of a (H, W, 3) uint8 RGB image; of no SAM, none."""
    if sam is None:
        return lambda image: None

    def embed(image: np.ndarray) -> Tensor:
        pixels = resize_image(image, *input_size(image.shape[0], image.shape[1], sam.image_size))
        sam.eval()
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
    """A fixed sample of validation images, each worker's share of them in its memory.

    Args:
        sets: by name, images with their masks.
        images: of each set, at most.
        group: of the workers, which share the work.
        embed: see `embedder`; an image is embedded once.
    """

    def __init__(
        self,
        sets: Sequence[tuple[str, Images]],
        images: int,
        group: Group,
        embed: Callable[[np.ndarray], Tensor | None],
    ) -> None:
        self._group, self._embed = group, embed
        self._sets = [
            (name, list(islice(islice(found, images), group.rank, None, group.size)))
            for name, found in sets
        ]
        self._features: dict[tuple[str, int], Tensor | None] = {}

    def measure(self, model: BoxDetector) -> dict[str, float]:
        """AR@100 by data set, each mask counting the same, and the mean over data sets; leaves it in eval mode."""
        detector = Detector(model)
        sums: list[float] = []
        for name, images in self._sets:
            found = [self._recall(detector, name, *one) for one in images]
            sums += [sum(one for one, _ in found), float(sum(count for _, count in found))]
        totals = np.array(self._group.sum(sums)).reshape(-1, 2)
        recalls = totals[:, 0] / totals[:, 1]
        names = [name for name, _ in self._sets]
        return {**dict(zip(names, recalls.tolist(), strict=True)), MEAN: float(recalls.mean())}

    def _recall(
        self, detector: Detector, name: str, record: ImageRecord, image: np.ndarray
    ) -> tuple[float, int]:
        """Masks found, averaged over IoUs, and how many there are."""
        key = (name, record.image_id)
        if key not in self._features:
            self._features[key] = self._embed(image)
        proposals = Proposals(*detector.detect(image, self._features[key]))
        recall = image_recall(record, proposals, "boxes", PROPOSALS)
        return float(recall.sums(ALL, [PROPOSALS])[0]), len(record.masks)
