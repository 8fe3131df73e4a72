"""Measuring and rendering masks against the released model's upsampling and the released code's scores."""

import pytest
import torch
import torch.nn.functional as F
from segment_anything.utils import amg

from sa_engine.modeling.sam import input_size
from sa_engine.upsampling import Upsampler

CPU = torch.device("cpu")
SIZES = [(1500, 2250), (300, 451), (90, 120), (1100, 250), (1, 1), (3, 2000), (64, 64)]


def smooth_logits(count: int) -> torch.Tensor:
    """Logits with the smoothness of a mask decoder's: blobs of every size, some touching the border."""
    generator = torch.Generator().manual_seed(count)
    layers = [
        F.interpolate(torch.randn(count, 1, n, n, generator=generator), (256, 256), mode="bicubic")
        for n in (3, 9, 40)
    ]
    logits = 6 * layers[0] + 4 * layers[1] + 2 * layers[2] - 4
    logits[-1] = -9  # one empty mask
    return logits[:, 0]


def released_upsampling(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    height, width = input_size(*size, 1024)
    full = F.interpolate(logits[None], (1024, 1024), mode="bilinear", align_corners=False)
    return F.interpolate(full[..., :height, :width], size, mode="bilinear", align_corners=False)[0]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("offset", [1.0, 0.25])
def test_measures_equal_the_reference(size: tuple[int, int], offset: float) -> None:
    """Area, stability and box, to the pixels whose logit is within rounding of a threshold."""
    logits = smooth_logits(7)
    full = released_upsampling(logits, size)
    masks = full > 0
    seen = Upsampler(256, 1024, input_size(*size, 1024), size, CPU).measure(logits, offset)
    doubtful = sum(((full - t).abs() < 1e-4).sum(dim=(1, 2)) for t in (-offset, 0.0, offset))
    assert ((seen.areas - masks.sum(dim=(1, 2))).abs() <= doubtful).all()
    expected = amg.calculate_stability_score(full, 0.0, offset)
    empty = expected.isnan()
    assert torch.equal(seen.stability.isnan(), empty)
    assert torch.allclose(seen.stability[~empty], expected[~empty], atol=1e-4)
    present = (seen.areas > 0) & (doubtful == 0) if min(size) < 10 else seen.areas > 0
    assert torch.equal(seen.boxes[present], amg.batched_mask_to_box(masks)[present])
    assert seen.areas[-1] == 0
    if min(size) > 60:
        assert present.sum() >= 5


@pytest.mark.parametrize("size", SIZES)
def test_rendered_pixels_equal_the_reference(size: tuple[int, int]) -> None:
    """Inside its box, from the few logits that matter there, a mask is what full upsampling gives."""
    logits = smooth_logits(5)
    full = released_upsampling(logits, size)
    upsampler = Upsampler(256, 1024, input_size(*size, 1024), size, CPU)
    seen = upsampler.measure(logits, 1.0)
    for i in seen.areas.nonzero()[:, 0].tolist():
        x0, y0, x1, y1 = box = tuple(seen.boxes[i].tolist())
        pixels = upsampler.render(logits[i][upsampler.window(box)], box)
        region = full[i, y0 : y1 + 1, x0 : x1 + 1]
        differs = pixels != (region > 0)
        assert (region[differs].abs() < 1e-4).all()
        assert abs(int(pixels.sum()) - int(seen.areas[i])) <= (region.abs() < 1e-4).sum()


def test_cells_are_few_and_hold_every_pixel() -> None:
    upsampler = Upsampler(256, 1024, (683, 1024), (1500, 2250), CPU)
    assert upsampler.pixels.sum() == 1500 * 2250
    assert upsampler.pixels.numel() < 1500 * 2250 / 60
