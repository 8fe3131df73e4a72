"""Grids and crops against the released code and the released data."""

import numpy as np
import pytest
from segment_anything.utils import amg

from sa_engine.grids import crops, layer_grid, point_grid

OVERLAP = 512 / 1500


@pytest.mark.parametrize("side", [1, 8, 13, 32])
def test_point_grid_equals_the_reference(side: int) -> None:
    assert np.allclose(point_grid(side), amg.build_point_grid(side), atol=1e-15)


@pytest.mark.parametrize(("points", "layers", "factor"), [(32, 2, 2), (32, 3, 1), (24, 2, 3)])
def test_layer_grids_equal_the_reference(points: int, layers: int, factor: int) -> None:
    expected = amg.build_all_layer_point_grids(points, layers, factor)
    for layer, grid in enumerate(expected):
        assert np.allclose(layer_grid(points, layer, factor), grid, atol=1e-15)


@pytest.mark.parametrize("size", [(1500, 2248), (1500, 2250), (427, 640), (999, 333), (64, 64)])
@pytest.mark.parametrize("layers", [0, 1, 2, 3])
def test_crops_equal_the_reference(size: tuple[int, int], layers: int) -> None:
    boxes, indices = amg.generate_crop_boxes(size, layers, OVERLAP)
    found = crops(*size, layers, OVERLAP)
    assert [list(crop.box) for crop in found] == boxes
    assert [crop.layer for crop in found] == indices


def test_crops_hold_a_box_of_the_released_sa1b() -> None:
    """Image 1010 of SA-1B (2248x1500) has a mask with this crop_box, XYWH."""
    boxes = [crop.box for crop in crops(1500, 2248, 2, OVERLAP)]
    assert (996, 622, 996 + 754, 622 + 567) in boxes


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (1, 500), (5, 5)])
def test_tiny_images_have_no_empty_crop(size: tuple[int, int]) -> None:
    """The released code fails here; we leave the empty crops out."""
    found = crops(*size, 2, OVERLAP)
    assert found[0].box == (0, 0, size[1], size[0])
    assert all(min(crop.size) > 0 for crop in found)
