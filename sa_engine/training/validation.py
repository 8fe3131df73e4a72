"""How good a model is in the middle of its training, on images that are not trained on."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
from torch import Tensor

from sa_engine.evaluation.data import DataSet
from sa_engine.evaluation.interactive import BOX, ImageScores, Protocol, evaluate_image
from sa_engine.modeling.sam import Sam
from sa_engine.predictor import Predictor
from sa_engine.records import ImageRecord
from sa_engine.training.group import Group

MASKS_PER_IMAGE = 20
_PROTOCOL = Protocol(points=(1,), boxes=True, max_masks=MASKS_PER_IMAGE)
MEAN = "mean"


class ValidationImages:
    """A sample of images, each worker's share of them in its memory.

    It is random, as photos in the order of their names may be sorted by scene, and always the same for the same sets.

    Args:
        sets: images with their masks, by different names.
        images: of each set, at most.
        group: of the workers, which share the work.
    """

    def __init__(self, sets: Sequence[DataSet], images: int, group: Group) -> None:
        self._group = group
        self._sets = []
        for one in sets:
            own = sorted(one.sample(images))[group.rank :: group.size]
            self._sets.append((one.name, list(replace(one, image_ids=tuple(own)))))

    def means(
        self,
        kinds: int,
        score: Callable[[str, ImageRecord, np.ndarray], tuple[Sequence[float], int]],
    ) -> dict[str, np.ndarray]:
        """Mean scores, (kinds,), over the masks of every set, of all workers' images.

        Args:
            kinds: of scores.
            score: gives of an image the sums of its masks' scores, and how many masks there are; it is called with
                the name of the set.
        """
        sums: list[float] = []
        for name, images in self._sets:
            found = [score(name, *one) for one in images]
            own = np.array([[*scores, count] for scores, count in found]).reshape(-1, kinds + 1)
            sums += own.sum(axis=0).tolist()  # zeros where this worker has no image of the set
        rows = np.array(self._group.sum(sums)).reshape(-1, kinds + 1)
        return {name: row[:-1] / row[-1] for (name, _), row in zip(self._sets, rows, strict=True)}


class Validation:
    """The validation of SAM on a sample of images.

    Args:
        images: to validate on.
        frozen: the encoder never changes, so that an image is embedded once.
    """

    def __init__(self, images: ValidationImages, frozen: bool) -> None:
        self._images, self._frozen = images, frozen
        self._features: dict[tuple[str, int], tuple[Tensor, tuple[int, int]]] = {}

    def measure(self, sam: Sam, precision: str) -> dict[str, float]:
        """Mean IoU after one click, by data set and in the mean over data sets; and of box prompts.

        The model is left in eval mode.
        """
        predictor = Predictor(sam, precision)

        def score(name: str, record: ImageRecord, image: np.ndarray) -> tuple[list[float], int]:
            found = self._score(predictor, name, record, image)
            return [float(found.iou[metric].sum()) for metric in ("1", BOX)], len(found.areas)

        found = self._images.means(2, score)
        points, boxed = np.array(list(found.values())).T
        named = dict(zip(found, points.tolist(), strict=True))
        return {**named, MEAN: float(points.mean()), BOX: float(boxed.mean())}

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
