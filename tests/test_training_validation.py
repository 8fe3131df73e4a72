"""Validation against the evaluation that users run: the same model, images and masks give the same numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from training import make_run, quarters

from sa_engine.evaluation.data import open_data
from sa_engine.evaluation.interactive import Protocol, evaluate_model
from sa_engine.modeling.sam import load_sam
from sa_engine.modeling.weights import resolve
from sa_engine.predictor import Predictor
from sa_engine.training.group import Group
from sa_engine.training.validation import Validation, ValidationImages


@pytest.mark.parametrize("frozen", [False, True])
def test_validation_measures_what_evaluate_does(
    frozen: bool, photos: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        Image.fromarray(photos[number]).reduce(4).save(tmp_path / "photos" / f"{number}.png")
    data = open_data(make_run(tmp_path / "photos", tmp_path / "run", quarters), "run")
    sam = load_sam(resolve("vit_t"))
    validation = Validation(ValidationImages([data], 2, Group()), frozen)
    found = [validation.measure(sam, "fp32") for _ in range(2)]
    assert found[0] == found[1]
    two = replace(data, image_ids=tuple(sorted(data.sample(2))))
    expected = evaluate_model(Predictor(sam), two, Protocol(points=(1,), boxes=True))
    assert found[0]["run"] == found[0]["mean"] == pytest.approx(expected.mean("1"), abs=1e-9)
    assert found[0]["box"] == pytest.approx(expected.mean("box"), abs=1e-9)
    # Another model, another number: nothing but the encoder's output is kept.
    sam.mask_decoder.mask_tokens.weight.data += 0.1
    assert validation.measure(sam, "fp32") != found[0]
