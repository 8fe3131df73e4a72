"""Predicted IoUs put back on a scale: their quartiles change, and nothing else does."""

import copy

import numpy as np
import pytest
import torch
from training import small_sam

from sa_engine.modeling.sam import Sam
from sa_engine.predictor import Predictor
from sa_engine.training.calibrate import Line, calibrate
from sa_engine.training.data import Sample


@pytest.fixture(scope="module")
def parent() -> Sam:
    return small_sam().eval()


@pytest.fixture
def tuned(parent: Sam) -> Sam:
    """Another model, whose predicted IoUs are lower and spread otherwise."""
    sam, generator = copy.deepcopy(parent), torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in sam.mask_decoder.parameters():
            parameter += 0.05 * parameter.std() * torch.randn(parameter.shape, generator=generator)
        last = sam.mask_decoder.iou_prediction_head.layers[-1]
        last.weight *= 0.3
        last.bias.copy_(0.3 * last.bias - 0.4)
    return sam


@pytest.fixture(scope="module")
def samples(parent: Sam, photos: list[np.ndarray]) -> list[Sample]:
    side, found = parent.image_size, []
    for number, photo in enumerate(photos[:3]):
        pixels = np.ascontiguousarray(photo[: side - 8 * number, :side])
        masks = np.zeros((2, *pixels.shape[:2]), bool)
        masks[0, 3:20, 5:30] = masks[1, 30:50, 30:40] = True
        found.append(Sample(0, number, pixels.shape[:2], pixels, masks))
    return found


def predicted(sam: Sam, samples: list[Sample]) -> tuple[np.ndarray, np.ndarray]:
    """IoUs of the three masks of grid points (N, 3), and of boxes (N,), by the predictor alone."""
    predictor, of_points, of_boxes = Predictor(sam), [], []
    for one in samples:
        assert one.pixels is not None
        embedding = predictor.embed(one.pixels)
        height, width = one.size
        for y in (np.arange(8) + 0.5) / 8 * height:
            for x in (np.arange(8) + 0.5) / 8 * width:
                found = predictor.predict(embedding, np.array([[[x, y]]]), np.ones((1, 1)))
                of_points.append(found.iou[0].numpy())
        for x0, y0, x1, y1 in ((5, 3, 29, 19), (30, 30, 39, 49)):
            box = np.array([[x0, y0, x1, y1]])
            of_boxes.append(float(predictor.predict(embedding, boxes=box, multimask=False).iou))
    return np.array(of_points), np.array(of_boxes)


def test_quartiles_become_the_parents_and_no_order_changes(
    parent: Sam, tuned: Sam, samples: list[Sample]
) -> None:
    before = copy.deepcopy(tuned)
    done = calibrate(tuned, parent, samples)
    assert done.multimask is not None and done.single is not None
    assert done.multimask.scale > 0 and done.multimask != Line(1.0, 0.0) != done.single
    now, old, wanted = (predicted(sam, samples) for sam in (tuned, before, parent))
    for part in (0, 1):
        quartiles = [np.quantile(values[part], [0.25, 0.75]) for values in (now, wanted, old)]
        np.testing.assert_allclose(quartiles[0], quartiles[1], atol=1e-4)
        assert np.abs(quartiles[2] - quartiles[1]).max() > 0.05
    assert np.array_equal(now[0].argsort(axis=1), old[0].argsort(axis=1))
    np.testing.assert_allclose(
        now[0], done.multimask.scale * old[0] + done.multimask.shift, atol=1e-4
    )
    changed = [
        name
        for name, value in tuned.state_dict().items()
        if not torch.equal(value, before.state_dict()[name])
    ]
    assert sorted(changed) == [
        f"mask_decoder.iou_prediction_head.layers.2.{name}" for name in ("bias", "weight")
    ]


def test_a_model_is_on_its_own_scale(parent: Sam, samples: list[Sample]) -> None:
    same = copy.deepcopy(parent)
    done = calibrate(same, parent, samples)
    assert done.multimask is not None and done.multimask.scale == pytest.approx(1)
    assert done.multimask.shift == pytest.approx(0, abs=1e-6)


def test_a_head_that_says_the_same_of_all_is_left_alone(
    parent: Sam, tuned: Sam, samples: list[Sample]
) -> None:
    last = tuned.mask_decoder.iou_prediction_head.layers[-1]
    with torch.no_grad():
        last.weight.zero_()
        last.bias.fill_(0.5)
    done = calibrate(tuned, parent, samples)
    assert done.multimask is None and done.single is None and (last.bias == 0.5).all()
