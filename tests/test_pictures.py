"""Pictures of real runs, with brightness bands in place of a model's masks."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from small_stage import SmallConfig, SmallStage, SmallWorker, mask_record, small_config

from sa_engine import runner
from sa_engine.images import decode_image, resize_image
from sa_engine.pictures import draw_masks, mask_colours, show
from sa_engine.plan import PlannedImage
from sa_engine.records import MaskRecord, mask_id
from sa_engine.storage import RunError

GAP = 8


def mask(pixels: np.ndarray, index: int = 0) -> MaskRecord:
    """A record of a (H, W) bool mask."""
    return mask_record(mask_id(1, index), pixels)


class HalfSizeWorker(SmallWorker):
    """Releases photos at half their size; those as high as wide without masks."""

    def prepare(self, item: PlannedImage, data: bytes) -> Any:
        image = decode_image(data)
        return resize_image(image, image.shape[0] // 2, image.shape[1] // 2), "0" * 64

    def process(self, item: PlannedImage, prepared: Any) -> Any:
        image, sha256, bands = super().process(item, prepared)
        return image, sha256, bands if image.shape[0] != image.shape[1] else []


class HalfSizeStage(SmallStage):
    """A stage whose released images differ from the photos, as those of most photos do."""

    def make_worker(self, config: SmallConfig) -> HalfSizeWorker:
        return HalfSizeWorker(config)


@pytest.fixture
def config(tmp_path: Path, photo_folder: Path) -> SmallConfig:
    """Options of a run over four photos: the first square, the others wider than high."""
    return small_config(photo_folder, tmp_path / "out")


def finish(config: SmallConfig) -> Path:
    """Run to the end; return the run's folder."""
    assert runner.run(HalfSizeStage(), config, dict).ok == 4
    return Path(config.out)


def read(path: Path) -> np.ndarray:
    """Pixels of a picture."""
    return decode_image(path.read_bytes()).astype(int)


def test_colours_are_distinct_and_do_not_depend_on_their_number() -> None:
    colours = mask_colours(300)
    assert colours.shape == (300, 3) and colours.dtype == np.uint8
    assert len(np.unique(colours, axis=0)) == 300
    np.testing.assert_array_equal(mask_colours(7), colours[:7])
    steps = np.abs(np.diff(colours.astype(int), axis=0)).sum(axis=1)
    assert steps.min() > 150
    assert len(mask_colours(0)) == 0


def test_small_masks_lie_over_large_ones(small_photo: np.ndarray) -> None:
    height, width = small_photo.shape[:2]
    large, small = np.zeros((2, height, width), bool)
    large[10:80, 10:100] = True
    small[30:60, 40:70] = True
    masks = [mask(small, 0), mask(large, 1)]
    drawn = draw_masks(small_photo, masks).astype(int)
    np.testing.assert_array_equal(drawn, draw_masks(small_photo, masks[::-1]))
    tint = drawn - drawn.mean(axis=2, keepdims=True)
    inside, around, outside = tint[35:55, 45:65], tint[15:25, 15:95], tint[85:, 105:]
    colours = mask_colours(2).astype(int)
    for pixels, colour in ((around, colours[0]), (inside, colours[1])):
        assert np.abs(pixels - (colour - colour.mean()) * 0.55).max() < 3
    assert not outside.any()


def test_outline_is_brighter_than_its_fill(small_photo: np.ndarray) -> None:
    pixels = np.zeros(small_photo.shape[:2], bool)
    pixels[20:70, 30:90] = True
    drawn = draw_masks(small_photo, [mask(pixels)]).sum(axis=2)
    assert drawn[20, 35:85].mean() > drawn[24:28, 35:85].mean() + 60


def test_no_mask_leaves_a_dark_grey_picture(small_photo: np.ndarray) -> None:
    drawn = draw_masks(small_photo, [])
    assert (drawn == drawn[..., :1]).all()
    assert drawn.mean() < 0.5 * small_photo.mean()


def test_show_puts_each_photo_beside_its_masks(config: SmallConfig, tmp_path: Path) -> None:
    out = finish(config)
    paths = show(out, tmp_path / "pictures")
    assert [path.name for path in paths] == [
        *(f"sa_{n}.jpg" for n in (1, 2, 3, 4)),
        "contact_sheet.jpg",
    ]
    for n, name in enumerate(("astronaut", "chelsea", "coffee", "more/rocket"), start=1):
        photo = decode_image(Path(config.images, f"{name}.jpg").read_bytes())
        height, width = photo.shape[0] // 2, photo.shape[1] // 2
        pair = read(paths[n - 1])
        assert pair.shape == (height, 2 * width + GAP, 3)
        difference = pair[:, :width] - resize_image(photo, height, width)
        assert np.abs(difference).mean() < 6
        colourful = np.ptp(pair[:, -width:], axis=2) > 40
        assert colourful.mean() > 0.5 if width > height else not colourful.any()
    sheet = read(paths[-1])
    assert sheet.shape[1] > 1600 and sheet.max() > 200


def test_show_draws_the_same_bytes_again(config: SmallConfig, tmp_path: Path) -> None:
    out = finish(config)
    first = [path.read_bytes() for path in show(out, tmp_path / "a")]
    assert first == [path.read_bytes() for path in show(out, tmp_path / "b")]
    assert first == [path.read_bytes() for path in show(out, tmp_path / "a")]


@pytest.mark.parametrize(
    ("ids", "count", "expected"),
    [((), 2, [1, 3]), ((), 1, [1]), ((), 99, [1, 2, 3, 4]), ((3,), 2, [3]), ((4, 2, 2), 1, [2, 4])],
)
def test_choice_of_images(
    config: SmallConfig, tmp_path: Path, ids: tuple[int, ...], count: int, expected: list[int]
) -> None:
    *paths, sheet = show(finish(config), tmp_path / "pictures", ids, count)
    assert [path.name for path in paths] == [f"sa_{n}.jpg" for n in expected]
    assert sheet.exists()


@pytest.mark.parametrize("changed", [{"write_images": False}, {"formats": ("parquet",)}])
def test_without_released_pictures_the_photo_is_read(
    config: SmallConfig, tmp_path: Path, changed: dict[str, Any]
) -> None:
    photo = Path(config.images, "coffee.jpg")
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees
    turned = Image.open(photo).transpose(Image.Transpose.ROTATE_90)
    turned.save(photo, quality=95, exif=exif)
    with_pictures = show(finish(config), tmp_path / "with")
    masks_only = dataclasses.replace(config, out=str(tmp_path / "masks"), **changed)
    without = show(finish(masks_only), tmp_path / "without")
    for a, b in zip(with_pictures[:-1], without[:-1], strict=True):
        assert np.abs(read(a) - read(b)).mean() < 6
    photo.unlink()
    with pytest.raises(RunError, match=r"image 3: .* its photo .*coffee\.jpg cannot be read"):
        show(Path(masks_only.out), tmp_path / "gone")


def test_errors_name_what_is_missing(config: SmallConfig, tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"nowhere is not the output of a run: .*run\.json"):
        show(tmp_path / "nowhere", tmp_path / "pictures")
    out = finish(config)
    with pytest.raises(RunError, match="no masks of image 7, 9: not planned, not done, or failed"):
        show(out, tmp_path / "pictures", ids=(9, 1, 7))
    assert not (tmp_path / "pictures").exists()
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(RunError, match=r"cannot write .*file/sa_1\.jpg"):
        show(out, tmp_path / "file")
    for marker in out.glob("sa_*.json"):
        marker.unlink()
    with pytest.raises(RunError, match="no finished image to show yet"):
        show(out, tmp_path / "pictures")


def test_finished_shards_of_an_unfinished_run(config: SmallConfig, tmp_path: Path) -> None:
    out = finish(config)
    shutil.move(out / "sa_000000.json", tmp_path / "marker.json")
    assert [path.stem for path in show(out, tmp_path / "pictures")[:-1]] == ["sa_3", "sa_4"]
