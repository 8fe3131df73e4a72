"""Mask functions against the released code, on real and on random masks."""

import cv2
import numpy as np
import pytest
import torch
from segment_anything.utils import amg
from torchvision.ops import batched_nms

from sa_engine import masks


def blobs(seed: int, height: int = 90, width: int = 120, blur: int = 7) -> np.ndarray:
    """A random mask of many components and holes of many sizes."""
    noise = np.random.default_rng(seed).random((height, width)).astype(np.float32)
    return cv2.GaussianBlur(noise, (blur, blur), 0) > 0.5


def packed(mask: np.ndarray) -> masks.WindowMask:
    found = masks.WindowMask.of(mask, 0, 0)
    assert found is not None
    return found


def unpacked(mask: masks.WindowMask, height: int, width: int) -> np.ndarray:
    whole = np.zeros((height, width), dtype=bool)
    x0, y0, x1, y1 = mask.box
    whole[y0 : y1 + 1, x0 : x1 + 1] = mask.window
    return whole


def test_a_window_is_packed_to_what_is_set() -> None:
    """The box is that of the pixels, wherever the window was cut; nothing set is no mask."""
    mask = np.zeros((30, 50), dtype=bool)
    mask[4:9, 7:20] = True
    found = masks.WindowMask.of(mask[2:, 3:], 2, 3)
    assert found is not None and found.box == (7, 4, 19, 8)
    assert np.array_equal(unpacked(found, 30, 50), mask)
    assert masks.WindowMask.of(np.zeros((3, 3), dtype=bool), 0, 0) is None


@pytest.mark.parametrize("crop", [(0, 0, 100, 80), (60, 40, 160, 120), (0, 40, 90, 120)])
def test_crop_edge_equals_the_reference(crop: tuple[int, int, int, int]) -> None:
    """A box near a crop's edge goes, unless that edge is also the image's."""
    x0, y0, x1, y1 = crop
    generator = torch.Generator().manual_seed(2)
    corners = torch.rand(400, 2, 2, generator=generator).sort(dim=1).values
    local = (corners * torch.tensor([x1 - x0, y1 - y0])).long().flatten(1)
    expected = amg.is_box_near_crop_edge(local, list(crop), [0, 0, 160, 120])
    found = masks.touches_crop_edge(
        local + torch.tensor([x0, y0, x0, y0]), crop, height=120, width=160, tolerance=20
    )
    assert torch.equal(found, expected)
    assert 0 < expected.sum() < 400


def test_nms_equals_torchvision_and_breaks_ties_by_the_given_order() -> None:
    rng = np.random.default_rng(3)
    start = rng.integers(0, 60, (300, 2))
    boxes = np.hstack([start, start + rng.integers(0, 40, (300, 2))])
    scores = rng.permutation(300)
    expected = batched_nms(
        torch.tensor(boxes).float(), torch.tensor(scores).float(), torch.zeros(300), 0.7
    )
    kept = masks.greedy_nms(boxes, np.argsort(-scores, kind="stable"), 0.7)
    assert kept == expected.tolist()
    assert 0 < len(kept) < 300
    same = np.repeat(boxes[:1], 4, axis=0)
    assert masks.greedy_nms(same, np.array([2, 0, 3, 1]), 0.7) == [2]


@pytest.mark.parametrize("seed", range(20))
def test_clean_up_by_the_reference_rules(seed: int) -> None:
    """Working inside the box gives what the released code finds on the whole image."""
    mask = blobs(seed, blur=3 + 4 * (seed % 4))
    if seed % 2:
        mask[:, :40] = mask[70:] = False  # the mask's box ends inside the image
    holes, _ = amg.remove_small_regions(mask, 100, "holes")
    expected, _ = amg.remove_small_regions(holes, 100, "islands")
    found = masks.clean_up(packed(mask), *mask.shape, 100, "reference")
    assert found is not None
    assert np.array_equal(unpacked(found, *mask.shape), expected)
    assert not np.array_equal(expected, mask)


def test_clean_up_by_the_paper() -> None:
    """Components first, then holes; a mask of small components only is removed whole."""
    mask = np.zeros((100, 100), dtype=bool)
    mask[10:50, 10:50] = True
    mask[20:29, 20:29] = False  # a hole of 81 px is filled
    mask[32:44, 20:32] = False  # a hole of 144 px stays
    mask[60:69, 60:69] = True  # a component of 81 px goes
    found = masks.clean_up(packed(mask), 100, 100, 100, "paper")
    assert found is not None
    expected = mask.copy()
    expected[20:29, 20:29] = True
    expected[60:69, 60:69] = False
    assert np.array_equal(unpacked(found, 100, 100), expected)
    assert found.box == (10, 10, 49, 49)
    small = np.zeros((100, 100), dtype=bool)
    small[5:14, 5:14] = small[40:48, 40:48] = True
    assert masks.clean_up(packed(small), 100, 100, 100, "paper") is None
    kept = masks.clean_up(packed(small), 100, 100, 100, "reference")
    assert kept is not None and kept.box == (5, 5, 13, 13)


def test_clean_up_returns_a_clean_mask_as_it_is() -> None:
    mask = packed(np.pad(np.ones((20, 20), dtype=bool), 5))
    assert masks.clean_up(mask, 30, 30, 100, "paper") is mask


def test_clean_up_knows_what_lies_outside_the_box() -> None:
    """Background outside the mask's box is no small hole, however thin the mask."""
    line = np.zeros((40, 300), dtype=bool)
    line[20, 50:250] = True
    mask = packed(line)
    assert masks.clean_up(mask, *line.shape, 100, "paper") is mask
    corner = np.zeros((40, 300), dtype=bool)
    corner[:, 5:30] = True  # 5 x 40 = 200 px to the left of it
    assert masks.clean_up(packed(corner), *corner.shape, 100, "paper").box == (5, 0, 29, 39)
    corner = np.zeros((40, 300), dtype=bool)
    corner[:, 2:30] = True  # 80 px: a hole to the released code too
    assert masks.clean_up(packed(corner), *corner.shape, 100, "paper").box == (0, 0, 29, 39)
