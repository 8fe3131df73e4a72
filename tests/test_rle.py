"""RLE against pycocotools."""

from collections.abc import Iterator

import numpy as np
import pytest
from pycocotools import mask as coco

from sa_engine import rle

FRAME = (37, 53)


def whole(window: np.ndarray, top: int, left: int) -> np.ndarray:
    mask = np.zeros(FRAME, dtype=bool)
    mask[top : top + window.shape[0], left : left + window.shape[1]] = window
    return mask


@pytest.mark.parametrize(
    ("top", "left", "height", "width"),
    [(0, 0, 37, 53), (5, 7, 10, 20), (0, 0, 1, 1), (36, 52, 1, 1), (0, 50, 37, 3), (30, 0, 7, 2)],
)
@pytest.mark.parametrize("share", [0.0, 0.3, 0.9, 1.0])
def test_a_window_encodes_like_the_whole_mask(
    top: int, left: int, height: int, width: int, share: float
) -> None:
    """Also where runs meet the first or the last pixel, and for empty and full windows."""
    window = np.random.default_rng(0).random((height, width)) < share
    mask = whole(window, top, left)
    expected = coco.encode(np.asfortranarray(mask.astype(np.uint8)))
    found = rle.encode_window(window, top, left, *FRAME)
    assert found["counts"] == expected["counts"].decode()
    assert found["size"] == list(FRAME)
    assert np.array_equal(rle.decode(found), mask)
    assert rle.area(found) == mask.sum()
    assert rle.encode(mask) == found


def bands(photo: np.ndarray) -> list[np.ndarray]:
    """Masks with many runs: where a photo is of one of six brightnesses."""
    band = photo.mean(axis=2) * 6 // 256
    return [band == number for number in range(6)]


def masks_of_every_kind(photos: list[np.ndarray]) -> Iterator[np.ndarray]:
    random = np.random.default_rng(0)
    for share in (0.01, 0.2, 0.5, 0.99):
        yield random.random(FRAME) < share
    for number in (0, 36, 37, 37 * 53 - 1):  # single pixels, in corners too
        flat = np.zeros(37 * 53, dtype=bool)
        flat[number] = True
        yield flat.reshape(53, 37).T
        yield ~flat.reshape(53, 37).T
    yield np.ones(FRAME, dtype=bool)
    yield np.zeros(FRAME, dtype=bool)
    yield np.ones((1, 1), dtype=bool)
    for photo in photos:
        yield from bands(photo)
    column = np.zeros((70_000, 3), dtype=bool)  # runs longer than 2 ** 15 and than 2 ** 16
    column[33_000:, 0] = column[:69_999, 1] = column[69_999:, 2] = True
    yield column
    yield np.arange(4_000_000).reshape(2000, 2000) >= 3_000_000


def expand(runs: np.ndarray, height: int, width: int) -> np.ndarray:
    ones = np.arange(len(runs)) % 2 == 1
    return np.repeat(ones, runs).reshape(width, height).T


def test_runs_and_extent_are_those_of_the_pixels(photos: list[np.ndarray]) -> None:
    for mask in masks_of_every_kind(photos):
        height, width = mask.shape
        encoded = coco.encode(np.asfortranarray(mask))
        runs = rle.runs({"size": [height, width], "counts": encoded["counts"].decode()})
        assert runs.dtype == np.int64
        assert np.array_equal(expand(runs, height, width), mask)
        assert runs[1::2].sum() == mask.sum() == coco.area(encoded)
        found = rle.extent(runs, height)
        if not mask.any():
            assert found is None
            continue
        rows, columns = np.nonzero(mask)
        assert found == (columns.min(), rows.min(), columns.max(), rows.max())
        x, y, box_width, box_height = coco.toBbox(encoded)
        assert found == (x, y, x + box_width - 1, y + box_height - 1)


@pytest.mark.parametrize("runs", [[0, 0, 0, 3, 0, 3], [2, 0, 1, 1, 0, 1, 1], [3, 2, 1, 0], [6, 0]])
def test_runs_of_no_pixels_are_fine(runs: list[int]) -> None:
    encoded = coco.frPyObjects({"size": [2, 3], "counts": runs}, 2, 3)
    found = rle.runs({"size": [2, 3], "counts": encoded["counts"].decode()})
    assert found.tolist() == runs
    pixels = expand(found, 2, 3)
    assert np.array_equal(pixels, coco.decode(encoded))
    rows, columns = np.nonzero(pixels)
    expected = (columns.min(), rows.min(), columns.max(), rows.max()) if len(rows) else None
    assert rle.extent(found, 2) == expected


@pytest.mark.parametrize(
    ("size", "counts", "message"),
    [
        ([2, 3], "", "runs are 0 pixels long, expected 6"),
        ([2, 3], "5", "runs are 5 pixels long, expected 6"),
        ([2, 3], "33", None),
        ([2, 3], "331", "runs are 7 pixels long, expected 6"),
        ([2, 3], "7", "a run of 7 pixels, expected 0 to 6"),
        ([2, 3], "O7", "a run of -1 pixels"),
        ([2, 3], "141K", "a run of -1 pixels"),  # 4 - 5
        ([2, 3], "141O", "runs are 9 pixels long, expected 6"),  # 1, 4, 1, 4 - 1
        ([2, 3], "33P", "end within a number"),
        ([2, 3], "3p", "a character outside of"),
        ([2, 3], "3 3", "a character outside of"),
        ([2, 3], "3\x003", "a character outside of"),
        ([2, 3], "3\x7f", "a character outside of"),
        ([2, 3], "3é", "'ascii' codec can't encode"),
        ([2, 3], "PPPPPPP0", "a number of 8 characters"),
        ([2, 3], "0" + "ooooooO" * 50, "a run of .* pixels"),
        ([2, 3], "o" * 100_000 + "0", "a number of 100001 characters"),
        ([0, 3], "", None),
        ([2, 3, 1], "33", "its size is"),
        ([-2, -3], "33", "its size is"),
        ([2.0, 3], "33", "its size is"),
        ([True, 6], "33", "its size is"),
    ],
)
def test_counts_that_are_no_runs_are_refused(size: list, counts: str, message: str | None) -> None:
    if message is None:
        assert rle.runs({"size": size, "counts": counts}).sum() == size[0] * size[1]
        return
    with pytest.raises(ValueError, match=message):
        rle.runs({"size": size, "counts": counts})


def test_runs_are_refused_before_their_sum_overflows() -> None:
    counts = "PPPPPP8" * 200_000  # 2 ** 33, then ever more by differences of 2 ** 33
    with pytest.raises(ValueError, match="a run of 858993459200000 pixels, expected 0 to 10000"):
        rle.runs({"size": [100, 100], "counts": counts})


def test_what_is_accepted_is_what_pycocotools_decodes(small_photo: np.ndarray) -> None:
    """Counts with damaged characters are refused, or are runs on which both agree."""
    random = np.random.default_rng(0)
    codes = np.frombuffer(rle.encode(bands(small_photo)[3])["counts"].encode(), np.uint8)
    accepted = 0
    for _ in range(3000):
        damaged = codes.copy()
        places = random.integers(len(codes), size=random.integers(1, 4))
        damaged[places] = random.integers(48, 112, size=len(places))
        found: rle.RLE = {"size": [96, 128], "counts": damaged.tobytes().decode()}
        try:
            runs = rle.runs(found)
        except ValueError:
            continue
        accepted += 1
        assert np.array_equal(expand(runs, 96, 128), rle.decode(found))
    assert accepted > 5


def test_iou_of_every_pair() -> None:
    full, half = np.ones(FRAME, dtype=bool), whole(np.ones((37, 26), dtype=bool), 0, 0)
    first, second = [rle.encode(full), rle.encode(half)], [rle.encode(half)]
    assert rle.iou(first, second).round(6).tolist() == [[round(26 / 53, 6)], [1.0]]
    assert rle.iou([], second).shape == (0, 1)


@pytest.mark.parametrize("share", [0.0, 0.02, 0.5, 1.0])
@pytest.mark.parametrize("seed", range(5))
def test_a_decoded_window_is_what_the_mask_has(share: float, seed: int) -> None:
    """Also where a run reaches from one column into the next."""
    rng = np.random.default_rng(seed)
    top, left = rng.integers(20), rng.integers(30)
    mask = whole(rng.random((rng.integers(1, 17), rng.integers(1, 23))) < share, top, left)
    found = rle.decode_window(rle.encode(mask))
    if not mask.any():
        assert found is None
        return
    assert found is not None
    window, y, x = found
    assert np.array_equal(whole(window, y, x), mask)
    assert all(window.any(axis=axis)[[0, -1]].all() for axis in (0, 1)), "nothing around it"
