"""The gate, with the real model: as it is, and spoiled in the ways that a retraining can spoil it."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image
from torch import Tensor, nn

from sa_engine.cli import main
from sa_engine.evaluation.data import DataSet, open_data
from sa_engine.generator import MaskGenerator
from sa_engine.modeling.sam import Sam, load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.option_groups import MaskConfig
from sa_engine.predictor import Predictor
from sa_engine.training.gate import DataFigures, GateFigures, judge, measure

PHOTOS = ("astronaut.png", "coffee.png")
MASKS = 3


class Remembering(nn.Module):
    """The real image encoder, which no test changes; each image goes through it once."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder
        self.seen: dict[bytes, Tensor] = {}

    def forward(self, x: Tensor) -> Tensor:
        key = hashlib.sha256(x.numpy()).digest()
        if key not in self.seen:
            self.seen[key] = self.encoder(x)
        return self.seen[key]


@pytest.fixture(scope="module")
def encoder() -> Remembering:
    return Remembering(load_sam(resolve("vit_t")).image_encoder).eval()


@pytest.fixture
def sam(encoder: Remembering) -> Sam:
    """A model of each test's own, to be spoiled."""
    sam = load_sam(resolve("vit_t"))
    sam.image_encoder = encoder
    return sam


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, photo_files: list[Path]) -> list[DataSet]:
    """Two photos of three masks each: what the model finds in them, so that it is good at it."""
    folder = tmp_path_factory.mktemp("gate")
    (folder / "photos").mkdir()
    config = MaskConfig(points_per_side=4, crop_n_layers=0)
    generator = MaskGenerator(Predictor(load_sam(resolve("vit_t"))), config)
    images, annotations = [], []
    for number, name in enumerate(PHOTOS):
        photo = np.array(Image.open(photo_files[number]).convert("RGB"))
        assert photo_files[number].name == name
        Image.fromarray(photo).save(folder / "photos" / name)
        height, width = photo.shape[:2]
        images.append({"id": number, "file_name": name, "height": height, "width": width})
        for mask in generator.generate(photo)[:MASKS]:
            annotations.append(
                {
                    "id": len(annotations),
                    "image_id": number,
                    "segmentation": mask.segmentation,
                }
            )
    (folder / "coco.json").write_text(json.dumps({"images": images, "annotations": annotations}))
    result = CliRunner().invoke(
        main,
        ["ingest", f"--images={folder / 'photos'}", f"--annotations={folder / 'coco.json'}",
         f"--out={folder / 'shards'}", "--local"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    return [open_data(folder / "shards", "shards")]


def figures(sam: Sam, runs: list[DataSet]) -> GateFigures:
    return measure(sam, runs, images=1, images_automatic=1, points_per_side=4)


@pytest.fixture(scope="module")
def before(runs: list[DataSet], encoder: Remembering) -> GateFigures:
    sam = load_sam(resolve("vit_t"))
    sam.image_encoder = encoder
    return figures(sam, runs)


def test_the_model_itself_is_promoted(sam: Sam, runs: list[DataSet], before: GateFigures) -> None:
    (data,) = before.data
    assert (data.images, data.masks, data.images_automatic) == (1, MASKS, 1)
    assert data.miou_box > 0.8 and data.miou_1pt > 0.7 and data.masks_per_image >= MASKS
    sam.mask_decoder.train()  # as when the image encoder is frozen
    again = figures(sam, runs)
    assert again == before
    assert sam.mask_decoder.transformer.training and not sam.image_encoder.training
    verdict = judge(before, again, miou_margin=0, masks_margin=0)
    assert verdict.promoted
    assert f"mean 1-point mIoU {data.miou_1pt:.3f} -> {data.miou_1pt:.3f}" in verdict.reason
    json.dumps(asdict(verdict), allow_nan=False)


def lower_the_predicted_iou(sam: Sam) -> None:
    sam.mask_decoder.iou_prediction_head.layers[-1].bias -= 0.5


def spoil_the_mask_tokens(sam: Sam) -> None:
    tokens = sam.mask_decoder.mask_tokens.weight
    tokens += torch.randn(tokens.shape, generator=torch.manual_seed(0)) * 2 * tokens.std()


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lower_the_predicted_iou, "automatic masks per image fell from"),
        (spoil_the_mask_tokens, "mean 1-point mIoU fell from"),
    ],
)
def test_spoiled_models_are_refused(
    spoil: Callable[[Sam], None], words: str, sam: Sam, runs: list[DataSet], before: GateFigures
) -> None:
    with torch.no_grad():
        spoil(sam)
    after = figures(sam, runs)
    verdict = judge(before, after)
    assert not verdict.promoted
    assert words in verdict.reason
    if (
        spoil is lower_the_predicted_iou
    ):  # all are lower by the same: one click's choice is the same
        assert verdict.reason.startswith(words) and after.masks_per_image == 0
        assert after.miou_1pt == before.miou_1pt


def test_samples_depend_on_the_seed_alone(sam: Sam, runs: list[DataSet]) -> None:
    some = {"images": 1, "images_automatic": 0, "max_masks": 1}
    first, second, again = (measure(sam, runs, seed=seed, **some) for seed in (0, 3, 0))
    assert first.data[0].masks == second.data[0].masks == 1
    assert first.miou_1pt != second.miou_1pt and again == first
    with pytest.raises(ValueError, match="not of the same images"):
        judge(first, second)


def made_up(*rows: tuple[float, float, float]) -> GateFigures:
    """Figures of data sets: IoU after a click, with a box, automatic masks per image."""
    data = (DataFigures(f"set{i}", "f", 24, 300, *row[:2], 8, row[2]) for i, row in enumerate(rows))
    return GateFigures(tuple(data), {"seed": 0})


@pytest.mark.parametrize(
    ("after", "reason"),
    [
        ([(0.60, 0.80, 20), (0.70, 0.80, 40)], None),
        ([(0.595, 0.795, 18), (0.695, 0.795, 36)], None),
        ([(0.90, 0.90, 90), (0.90, 0.90, 90)], None),
        ([(0.58, 0.80, 20), (0.90, 0.80, 40)], "1-point mIoU on set0 fell from 0.600 to 0.580, by more than 0.01"),
        ([(0.60, 0.80, 20), (0.60, 0.80, 40)],
         "mean 1-point mIoU fell from 0.650 to 0.600, by more than 0.01; "
         "1-point mIoU on set1 fell from 0.700 to 0.600, by more than 0.01"),
        ([(0.60, 0.70, 20), (0.70, 0.80, 40)], "box mIoU fell from 0.800 to 0.750, by more than 0.01"),
        ([(0.60, 0.80, 13), (0.70, 0.80, 40)],
         "automatic masks per image fell from 30.0 to 26.5, by more than 10%"),
        ([(np.nan, 0.80, 20), (0.70, 0.80, 40)],
         "mean 1-point mIoU fell from 0.650 to nan, by more than 0.01; "
         "1-point mIoU on set0 fell from 0.600 to nan, by more than 0.01"),
    ],
)  # fmt: skip
def test_margins(after: list[tuple[float, float, float]], reason: str | None) -> None:
    verdict = judge(made_up((0.60, 0.80, 20), (0.70, 0.80, 40)), made_up(*after))
    assert verdict.promoted == (reason is None)
    if reason is not None:
        assert verdict.reason == reason


def test_a_parent_without_automatic_masks_has_none_to_lose() -> None:
    nothing = made_up((0.6, 0.8, 0))
    assert judge(nothing, nothing).promoted
    assert judge(nothing, made_up((0.6, 0.8, 5))).reason.endswith("0.0 -> 5.0 (nothing to lose)")
    other = GateFigures((replace(nothing.data[0], fingerprint="g"),), nothing.settings)
    with pytest.raises(ValueError, match="not of the same images"):
        judge(nothing, other)
