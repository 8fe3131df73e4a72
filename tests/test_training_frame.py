"""Where a training sees an image and its masks: whole or jittered, in the model-input frame."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from training import Masks, make_run, share

from sa_engine import rle
from sa_engine.images import decode_image, resize_image
from sa_engine.modeling.sam import input_size
from sa_engine.reader import iter_records, read_image
from sa_engine.training.data import TrainingData
from sa_engine.training.frame import Frame


def disc(height: int, width: int, y: float, x: float, radius: float) -> np.ndarray:
    rows, columns = np.indices((height, width)) + 0.5
    return np.hypot(rows - y * height, columns - x * width) < radius


def painted(folder: Path, height: int, width: int) -> tuple[Path, Callable[..., Masks]]:
    """Pictures in which the mask is what is white, on black."""
    (folder / "painted").mkdir()
    size = min(height, width)
    masks = {
        "a.png": disc(height, width, 0.4, 0.3, size / 5),
        "b.png": disc(height, width, 0.7, 0.8, size / 7),
        "c.png": disc(height, width, 0.05, 0.6, size / 4),
    }
    for name, mask in masks.items():
        Image.fromarray(mask.astype(np.uint8) * 255).save(folder / "painted" / name)
    return folder / "painted", lambda key, height, width: [("automatic", masks[key])]


@pytest.mark.parametrize(("height", "width"), [(450, 600), (700, 500)])
def test_jitter_keeps_masks_on_their_objects(height: int, width: int, tmp_path: Path) -> None:
    folder, draw = painted(tmp_path, height, width)
    data = TrainingData.open([make_run(folder, tmp_path / "out", draw)])
    scales, lost, cropped, compared = [], 0, 0, 0
    for seed in range(90):
        found = data.load(seed % 3, np.random.default_rng(seed), image_size=256, jitter=(0.1, 2.0))
        if found is None:
            lost += 1
            continue
        h, w = found.size
        assert found.pixels is not None and found.pixels.shape == (h, w, 3)
        assert found.masks.shape == (1, h, w) and max(h, w) <= 256
        cropped += h == w == 256
        scales.append(max(h, w) / 256)
        (mask,), seen = found.masks, found.pixels[..., 0] > 127
        assert 0 < mask.sum() <= 0.9 * h * w
        assert (mask ^ seen).sum() <= 0.25 * np.sqrt(mask.sum()) + 2, (
            "but single pixels of its edge"
        )
        if mask.sum() > 100:
            offset = np.argwhere(mask).mean(axis=0) - np.argwhere(seen).mean(axis=0)
            assert np.abs(offset).max() < 0.1
            compared += 1
    assert min(scales) < 0.3 and cropped > 3 and lost > 0 and compared > 40


def test_the_scale_of_the_jitter_is_uniform_and_crops_lie_anywhere() -> None:
    rng = np.random.default_rng(0)
    frames = [Frame.jittered(600, 800, 1024, (0.1, 2.0), rng) for _ in range(2000)]
    scales = np.array([frame.scaled[1] / 1024 for frame in frames])
    quartiles = np.quantile(scales, (0, 0.25, 0.5, 0.75, 1))
    assert np.allclose(quartiles, (0.1, 0.575, 1.05, 1.525, 2), atol=0.06)
    for frame in frames:
        assert frame.scaled == input_size(600, 800, frame.scaled[1])
        assert frame.size == tuple(min(side, 1024) for side in frame.scaled)
        assert all(0 <= c <= a - b for c, a, b in zip(frame.corner, frame.scaled, frame.size, strict=True))  # fmt: skip
    large = [frame for frame in frames if frame.scaled[1] > 1900]
    lefts = np.array([frame.corner[1] / (frame.scaled[1] - 1024) for frame in large])
    assert lefts.min() < 0.1 and lefts.max() > 0.9 and abs(lefts.mean() - 0.5) < 0.1


def test_a_mask_that_fills_what_is_seen_is_dropped(many: Path, tmp_path: Path) -> None:
    def draw(key: str, height: int, width: int) -> Masks:
        return [("automatic", share(height, width, of=0.8))]

    data = TrainingData.open([make_run(many, tmp_path / "out", draw)])
    rngs = map(np.random.default_rng, range(40))
    ends = [data.load(0, rng, image_size=64, jitter=(2.0, 2.0)) for rng in rngs]
    covered = [one.masks[0].mean() for one in ends if one is not None]
    assert 0 < len(covered) < 40
    assert max(covered) <= 0.9


@pytest.mark.parametrize("photo", range(4))
def test_an_image_is_what_a_predictor_sees(
    photo: int, photos: list[np.ndarray], tmp_path: Path
) -> None:
    (tmp_path / "one").mkdir()
    Image.fromarray(photos[photo]).save(tmp_path / "one" / "a.png")

    def draw(key: str, height: int, width: int) -> Masks:
        dot = np.zeros((height, width), bool)
        dot[height // 3, width // 2] = True
        return [("manual", disc(height, width, 0.5, 0.6, height / 3)), ("manual", dot)]

    out = make_run(tmp_path / "one", tmp_path / "out", draw)
    data = TrainingData.open([out])
    released = decode_image(read_image(out, 1))
    (record,) = iter_records(out)
    for image_size in (1024, 200):  # larger and smaller than the photo
        found = data.load(0, np.random.default_rng(0), image_size=image_size)
        assert found is not None and found.pixels is not None
        h, w = input_size(*released.shape[:2], image_size)
        assert found.size == (h, w)
        assert np.array_equal(found.pixels, resize_image(released, h, w))
        how = cv2.INTER_LINEAR if image_size == 1024 else cv2.INTER_AREA
        truth = rle.decode(record.masks[0].segmentation).astype(np.float32)
        expected = cv2.resize(truth, (w, h), interpolation=how)
        differ = (expected >= 0.5) != found.masks[0]
        assert differ.sum() <= 2 and np.abs(expected[differ] - 0.5).max(initial=0) < 1e-5
        # One pixel of the photo is never nothing.
        (row, column), *more = np.argwhere(found.masks[1])
        assert (image_size == 1024) == bool(more)
        scale = h / record.height
        assert abs(row - record.height // 3 * scale) <= 2 * max(1, scale)
        assert abs(column - record.width // 2 * scale) <= 2 * max(1, scale)
    bare = data.load(0, np.random.default_rng(0), image_size=200, pixels=False)
    assert bare is not None and bare.pixels is None
    assert np.array_equal(bare.masks, found.masks)
    with pytest.raises(ValueError, match="cannot be jittered"):
        data.load(0, np.random.default_rng(0), jitter=(0.1, 2), pixels=False)
