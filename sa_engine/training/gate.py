"""The gate of a round: the new model must not be worse than its parent where a data engine would feel it.

Retraining can spoil what it did not look at: trained on boxes alone, a model forgets points; with predicted IoUs that
have drifted, automatic generation finds nothing above its threshold. So both models are measured on the same images:
after one click and with a box (paper §7.1), and by how many masks they find automatically (appendix B).
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from sa_engine.evaluation.data import DataSet
from sa_engine.evaluation.interactive import (
    BOX,
    Evaluation,
    EvaluationError,
    Protocol,
    evaluate_image,
)
from sa_engine.generator import MaskGenerator
from sa_engine.modeling.sam import Sam
from sa_engine.option_groups import MaskConfig
from sa_engine.predictor import Predictor
from sa_engine.rounds import MIOU, Verdict

_AUTOMATIC = "automatic masks per image"


@dataclass(frozen=True)
class DataFigures:
    """What was measured on the images of one data set.

    Attributes:
        name: of the data set.
        fingerprint: of it, as it was before images were drawn.
        images, masks: that were prompted for.
        miou_1pt: mean IoU after one click.
        miou_box: with a box.
        images_automatic: that masks were generated for.
        masks_per_image: generated, on average.
    """

    name: str
    fingerprint: str
    images: int
    masks: int
    miou_1pt: float
    miou_box: float
    images_automatic: int
    masks_per_image: float


@dataclass(frozen=True)
class GateFigures:
    """What was measured of a model; means over data sets, each counting the same."""

    data: tuple[DataFigures, ...]
    settings: dict[str, int]

    @property
    def miou_1pt(self) -> float:
        return float(np.mean([one.miou_1pt for one in self.data]))

    @property
    def miou_box(self) -> float:
        return float(np.mean([one.miou_box for one in self.data]))

    @property
    def masks_per_image(self) -> float:
        return float(np.mean([one.masks_per_image for one in self.data]))

    def to_dict(self) -> dict[str, Any]:
        """As plain JSON values."""
        return {
            MIOU: self.miou_1pt,
            "miou_box": self.miou_box,
            "masks_per_image": self.masks_per_image,
            "data": [asdict(one) for one in self.data],
            "settings": self.settings,
        }


def measure(
    sam: Sam,
    runs: Sequence[DataSet],
    *,
    images: int = 24,
    images_automatic: int = 8,
    max_masks: int = 16,
    points_per_side: int = 16,
    precision: str = "fp32",
    seed: int = 0,
) -> GateFigures:
    """Measure a model for `judge`.

    Args:
        sam: on the device to be used; it is put into eval mode, and each module back into its own.
        runs: data sets that it is not trained on, at least one.
        images: of each, a random sample; the same for every model.
        images_automatic: so many of these for automatic masks, by the paper's thresholds but without crops.
        max_masks: masks prompted for in each image, a random sample.
        points_per_side: of the grid for automatic masks.
        precision: of the model.
        seed: of the samples.

    Raises:
        EvaluationError: a data set whose images cannot be read or have no masks, or embeddings that are not finite.
    """
    modes = {module: module.training for module in sam.modules()}  # a frozen encoder's is its own
    predictor = Predictor(sam, precision)
    generator = MaskGenerator(
        predictor, MaskConfig(points_per_side=points_per_side, crop_n_layers=0)
    )
    protocol = Protocol(points=(1,), boxes=True, max_masks=max_masks, seed=seed)
    try:
        figures = tuple(
            _measure(generator, run, protocol, images, images_automatic) for run in runs
        )
    finally:
        for module, training in modes.items():
            module.training = training
    settings = {
        "images": images,
        "images_automatic": images_automatic,
        "max_masks": max_masks,
        "points_per_side": points_per_side,
        "seed": seed,
    }
    return GateFigures(figures, settings)


def _measure(
    generator: MaskGenerator, run: DataSet, protocol: Protocol, images: int, automatic: int
) -> DataFigures:
    # Drawn in random order, so that those for automatic masks are a random sample too.
    drawn = run.sample(images, protocol.seed)
    scores, found = [], []
    for record, image in replace(run, image_ids=tuple(sorted(drawn))):
        if record.masks:
            scores.append(evaluate_image(generator.predictor, record, image, protocol))
        if record.image_id in drawn[:automatic]:
            found.append(len(generator.generate(image)))
    if not scores:
        raise EvaluationError(f"the gate has nothing to measure on: {run.out} has no masks")
    evaluation = Evaluation(protocol, tuple(scores))
    return DataFigures(
        run.name,
        run.fingerprint,
        len(scores),
        evaluation.masks,
        evaluation.mean("1"),
        evaluation.mean(BOX),
        len(found),
        sum(found) / max(1, len(found)),
    )


def judge(
    before: GateFigures, after: GateFigures, miou_margin: float = 0.01, masks_margin: float = 0.10
) -> Verdict:
    """Whether a model may take its parent's place.

    Args:
        before: the parent's figures.
        after: the new model's, of the same images.
        miou_margin: by how much a mean IoU may fall: after one click, over all data sets and in each; with a box, over
            all.
        masks_margin: by what share the number of automatic masks may fall; nothing is asked if there were none before.

    Raises:
        ValueError: figures of different images.
    """
    if _measured(before) != _measured(after):
        raise ValueError("the figures before and after are not of the same images")
    ious = [("mean 1-point mIoU", before.miou_1pt, after.miou_1pt)]
    if len(before.data) > 1:
        ious += [
            (f"1-point mIoU on {old.name}", old.miou_1pt, new.miou_1pt)
            for old, new in zip(before.data, after.data, strict=True)
        ]
    ious.append(("box mIoU", before.miou_box, after.miou_box))
    falls = [
        f"{name} fell from {old:.3f} to {new:.3f}, by more than {miou_margin:g}"
        for name, old, new in ious
        if not new >= old - miou_margin
    ]
    old, new = before.masks_per_image, after.masks_per_image
    if new < old * (1 - masks_margin):
        falls.append(
            f"{_AUTOMATIC} fell from {old:.1f} to {new:.1f}, by more than {masks_margin:.0%}"
        )
    kept = [f"{name} {old:.3f} -> {new:.3f}" for name, old, new in ious]
    kept.append(f"{_AUTOMATIC} {old:.1f} -> {new:.1f}" + " (nothing to lose)" * (old == 0))
    return Verdict(
        promoted=not falls,
        reason="; ".join(falls or kept),
        before=before.to_dict(),
        after=after.to_dict(),
        margins={"miou": miou_margin, "masks": masks_margin},
    )


def _measured(figures: GateFigures) -> list[Any]:
    data = [(one.name, one.fingerprint, one.images, one.masks) for one in figures.data]
    return [*data, figures.settings]
