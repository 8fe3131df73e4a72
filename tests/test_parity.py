"""Our masks against the reference implementations' masks, pooled over real photos.

``make test`` runs small grids, ``make parity`` the full size: 32x32 points, and the paper's 21 crops with clean-up
against the golden files that ``tests/parity/make_golden.py`` stored.
"""

import gzip
import json
from dataclasses import asdict, replace
from functools import reduce
from operator import add
from typing import Any

import numpy as np
import pytest
import segment_anything
import torch
from parity.make_golden import GOLDEN, OPTIONS
from parity.matching import Match, match
from parity.reference import load_reference, photo, reference_masks

from sa_engine.generator import MaskGenerator
from sa_engine.modeling.sam import Sam, build_sam, load_sam, model_fingerprint
from sa_engine.modeling.weights import resolve
from sa_engine.option_groups import MaskConfig
from sa_engine.options import load_config
from sa_engine.predictor import Predictor

LEAST_SHARE = 0.99
SMALL_PHOTOS = ("chelsea", "coffee", "rocket", "astronaut", "hubble_deep_field")
# What configs/parity.yaml writes down; a test below keeps the two equal.
REFERENCE = MaskConfig(
    crop_n_layers=0,
    crop_n_points_downscale_factor=1,
    max_mask_coverage=None,
    min_mask_region_area=0,
    short_side=None,
    rules="reference",
)


@pytest.fixture(scope="module")
def sam() -> Sam:
    return load_sam(resolve("vit_t"))


@pytest.fixture(scope="module")
def reference() -> torch.nn.Module:
    return load_reference("vit_t")[0]


def reference_options(config: MaskConfig) -> dict[str, Any]:
    """The same options under the reference's names."""
    names = (
        "points_per_side pred_iou_thresh stability_score_thresh stability_score_offset "
        "box_nms_thresh crop_n_layers crop_nms_thresh crop_overlap_ratio "
        "crop_n_points_downscale_factor min_mask_region_area"
    )
    return {name: getattr(config, name) for name in names.split()}


def compare(sam: Sam, theirs: list[dict[str, Any]], name: str, config: MaskConfig) -> Match:
    ours = [asdict(mask) for mask in MaskGenerator(Predictor(sam), config).generate(photo(name))]
    limits = {
        "pred_iou": config.pred_iou_thresh,
        "stability": config.stability_score_thresh,
        "nms": config.box_nms_thresh,
    }
    return match(name, ours, theirs, limits)


def assert_equal_sets(matches: list[Match], least_masks: int) -> None:
    pooled = reduce(add, matches)
    print(f"\npooled over {len(matches)} photos: {pooled}")
    assert pooled.theirs >= least_masks, pooled
    assert pooled.matched >= LEAST_SHARE * pooled.theirs, pooled
    assert pooled.matched >= LEAST_SHARE * pooled.ours, pooled


def test_parity_config_is_the_reference() -> None:
    """configs/parity.yaml, and through it the reference's own defaults."""
    from inspect import signature
    from pathlib import Path

    from sa_engine.config import AutoConfig

    path = Path(__file__).parents[1] / "configs" / "parity.yaml"
    config = load_config(AutoConfig, path, [], {"images": "a", "out": "b"})
    assert {name: getattr(config, name) for name in asdict(REFERENCE)} == asdict(REFERENCE)
    defaults = signature(segment_anything.SamAutomaticMaskGenerator).parameters
    for name, value in reference_options(REFERENCE).items():
        assert defaults[name].default == value, name


def test_small_grids(sam: Sam, reference: torch.nn.Module) -> None:
    """8x8 points, five photos, thresholds lowered so that the grid yields many masks."""
    config = replace(
        REFERENCE, points_per_side=8, pred_iou_thresh=0.75, stability_score_thresh=0.88
    )
    assert_equal_sets(
        [
            compare(
                sam,
                reference_masks(reference, photo(name), **reference_options(config)),
                name,
                config,
            )
            for name in SMALL_PHOTOS
        ],
        least_masks=60,
    )


def test_crops_and_clean_up(sam: Sam, reference: torch.nn.Module) -> None:
    """2x2 crops, NMS across them, small components and holes removed, NMS again."""
    config = replace(
        REFERENCE,
        points_per_side=8,
        crop_n_layers=1,
        crop_n_points_downscale_factor=2,
        min_mask_region_area=100,
        pred_iou_thresh=0.7,
        stability_score_thresh=0.85,
    )
    theirs = reference_masks(reference, photo("astronaut"), **reference_options(config))
    assert_equal_sets([compare(sam, theirs, "astronaut", config)], least_masks=15)


def random_vit_b() -> tuple[Sam, torch.nn.Module]:
    """Meta's ViT-B and ours with the same random weights, scaled so that prompts lead to different masks."""
    torch.manual_seed(0)
    ours = build_sam("vit_b")
    for name, parameter in ours.named_parameters():
        if "rel_pos" in name or "pos_embed" in name:
            torch.nn.init.normal_(parameter, std=0.02)
        if "mask_decoder" in name and parameter.ndim > 1:
            parameter.data.mul_(2.5)
    reference = segment_anything.sam_model_registry["vit_b"]()
    reference.load_state_dict(ours.state_dict())
    return ours, reference.eval()


def assert_vit_b_equal(points_per_side: int, least_masks: int) -> None:
    """Thresholds lowered and NMS off: random masks all cover the image's box."""
    ours, model = random_vit_b()
    config = replace(
        REFERENCE,
        points_per_side=points_per_side,
        pred_iou_thresh=0.05,
        stability_score_thresh=0.3,
        box_nms_thresh=1.0,
    )
    generator = segment_anything.SamAutomaticMaskGenerator(
        model, output_mode="coco_rle", **reference_options(config)
    )
    theirs = generator.generate(photo("chelsea"))
    assert_equal_sets([compare(ours, theirs, "chelsea", config)], least_masks)


def test_vit_b_small() -> None:
    assert_vit_b_equal(points_per_side=3, least_masks=8)


@pytest.mark.parity_full
def test_vit_b_full() -> None:
    assert_vit_b_equal(points_per_side=16, least_masks=200)


@pytest.mark.parity_full
def test_reference_defaults(sam: Sam, reference: torch.nn.Module) -> None:
    """configs/parity.yaml: 32x32 points, no crops, no clean-up, live against the reference."""
    theirs = {name: reference_masks(reference, photo(name)) for name in SMALL_PHOTOS[:4]}
    assert_equal_sets([compare(sam, theirs[name], name, REFERENCE) for name in theirs], 40)


@pytest.mark.parity_full
def test_paper_setting_against_golden(sam: Sam) -> None:
    """32x32 points, 2x2 and 4x4 crops, clean-up: at least 300 reference masks on at least five photos."""
    config = replace(REFERENCE, **OPTIONS)
    goldens = [json.loads(gzip.decompress(path.read_bytes())) for path in sorted(GOLDEN.iterdir())]
    assert len(goldens) >= 5
    matches = []
    for golden in goldens:
        assert golden["options"] == OPTIONS
        assert golden["model_fingerprint"] == model_fingerprint(sam), "stored with other weights"
        matches.append(compare(sam, golden["masks"], golden["photo"], config))
    assert_equal_sets(matches, least_masks=300)


def test_golden_masks_decode() -> None:
    """The stored masks are real: sizes of their photos, areas as stated, none empty."""
    from sa_engine import rle

    for path in GOLDEN.iterdir():
        golden = json.loads(gzip.decompress(path.read_bytes()))
        size = list(photo(golden["photo"]).shape[:2])
        assert golden["masks"]
        for mask in golden["masks"]:
            assert mask["segmentation"]["size"] == size
            assert rle.area(mask["segmentation"]) == mask["area"] > 0
            assert np.isfinite(mask["predicted_iou"])
