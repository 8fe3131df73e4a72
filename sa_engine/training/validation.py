"""How good a model is in the middle of its training, on images that are not trained on."""

from collections.abc import Iterable, Sequence
from itertools import islice

import numpy as np
from torch import Tensor

from sa_engine.evaluation.interactive import BOX, ImageScores, Protocol, evaluate_image
from sa_engine.modeling.sam import Sam
from sa_engine.predictor import Predictor
from sa_engine.records import ImageRecord
from sa_engine.training.group import Group

Images = Iterable[tuple[ImageRecord, np.ndarray]]
MASKS_PER_IMAGE = 20
_PROTOCOL = Protocol(points=(1,), boxes=True, max_masks=MASKS_PER_IMAGE)
MEAN = "mean"


class Validation:
    """A fixed sample of validation images, each worker's share of them in its memory.

    Args:
        sets: by name, images with their masks.
        images: of each set, at most.
        group: of the workers, which share the work.
        frozen: the encoder never changes, so that an image is embedded once.
    """

    def __init__(
        self, sets: Sequence[tuple[str, Images]], images: int, group: Group, frozen: bool
    ) -> None:
        self._group, self._frozen = group, frozen
        self._sets = [
            (name, list(islice(islice(found, images), group.rank, None, group.size)))
            for name, found in sets
        ]
        self._features: dict[tuple[str, int], tuple[Tensor, tuple[int, int]]] = {}

    def measure(self, sam: Sam, precision: str) -> dict[str, float]:
        """Mean IoU after one click, by data set and in the mean over data sets; and of box prompts.

        The model is left in eval mode.
        """
        predictor = Predictor(sam, precision)
        sums: list[float] = []
        for name, images in self._sets:
            scores = [self._score(predictor, name, *one) for one in images]
            sums += [sum(float(one.iou[metric].sum()) for one in scores) for metric in ("1", BOX)]
            sums.append(float(sum(len(one.areas) for one in scores)))
        clicked, boxed, counts = np.array(self._group.sum(sums)).reshape(-1, 3).T
        points = clicked / counts
        found = {name: float(one) for (name, _), one in zip(self._sets, points, strict=True)}
        return {**found, MEAN: float(points.mean()), BOX: float((boxed / counts).mean())}

    def _score(
        self, predictor: Predictor, name: str, record: ImageRecord, image: np.ndarray
    ) -> ImageScores:
        key = (name, record.image_id)
        if key in self._features:
            features, input_size = self._features[key]
            embedding = predictor.wrap(features, image.shape[:2], input_size)
        else:
            embedding = predictor.embed(image)
            if self._frozen:  # the features alone: the rest is three times their size
                self._features[key] = embedding.features, embedding.input_size
        return evaluate_image(predictor, record, image, _PROTOCOL, embedding)
