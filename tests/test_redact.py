"""Redaction: what changes, what does not, and what is left for those who want it back."""

from collections.abc import Sequence
from pathlib import Path
from typing import cast, get_args

import cv2
import numpy as np
import pytest
import skimage.data
from skimage.feature import Cascade
from test_detectors import annotated_photos

from sa_engine.config import BlurConfig
from sa_engine.privacy.redact import Box, Method, coverage, grow, redact, redacted_area
from sa_engine.privacy.redactor import Redactor
from sa_engine.privacy.selftest import known_face

METHODS = get_args(Method)
# (height, width): fewer pixels than cells, sides that cells do not divide, thin, and whole pictures.
SIZES = [(1, 1), (1, 2), (3, 40), (40, 3), (5, 5), (7, 11), (8, 8), (64, 48), (101, 99), (300, 2)]

# A found photo: its pixels, its annotated faces (N, 4) XYXY, the grown boxes of what was found.
Found = tuple[np.ndarray, np.ndarray, list[Box]]


@pytest.fixture(scope="module")
def redactor() -> Redactor:
    """With the detectors and thresholds that a run has by default."""
    return Redactor(BlurConfig(images="x", out="y"), 2, "cpu")


@pytest.fixture(scope="module")
def found_portrait(redactor: Redactor) -> Found:
    image, box = known_face()
    return image, box[None], [region.box for region in redactor.find(image)]


@pytest.fixture(scope="module")
def found_groups(redactor: Redactor, shared_data: Path) -> list[Found]:
    """Every other one of the group photos."""
    photos = annotated_photos(shared_data / "faces" / "group_photos")[::2]
    return [(image, boxes, [r.box for r in redactor.find(image)]) for image, boxes in photos]


def colours(pixels: np.ndarray) -> np.ndarray:
    """(H, W, 3) -> (N, 3), each colour once."""
    return np.unique(pixels.reshape(-1, 3), axis=0)


def grey(image: np.ndarray) -> np.ndarray:
    return cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(float)


def inside(image: np.ndarray, box: Box) -> np.ndarray:
    x0, y0, x1, y1 = box
    return image[y0:y1, x0:x1]


def cell_numbers(box: Box) -> np.ndarray:
    """Of each pixel of a box, which of the mosaic's cells it lies in: (height, width)."""
    x0, y0, x1, y1 = box
    height, width = y1 - y0, x1 - x0
    rows = np.arange(height) * min(5, height) // height
    columns = np.arange(width) * min(5, width) // width
    return rows[:, None] * 5 + columns[None]


# --- growing --------------------------------------------------------------------------------------


def test_a_box_grows_by_a_share_of_its_own_size() -> None:
    box = (100, 100, 200, 150)
    assert grow(box, "face", 1000, 1000) == (80, 90, 220, 160)
    assert grow(box, "plate", 1000, 1000) == (70, 92, 230, 158)
    assert grow(box, "manual", 1000, 1000) == box


def test_plates_grow_more_sideways_than_upwards() -> None:
    for size in (20, 333.3, 700):
        x0, y0, x1, y1 = grow((1000, 1000, 1000 + size, 1000 + size), "plate", 3000, 3000)
        assert 1000 - x0 > 1000 - y0 > 0
        assert x1 - (1000 + size) > y1 - (1000 + size) > 0


@pytest.mark.parametrize(
    ("kind", "sideways", "upright"), [("face", 0.2, 0.2), ("plate", 0.3, 0.15), ("manual", 0, 0)]
)
def test_a_grown_box_is_rounded_outwards(kind: str, sideways: float, upright: float) -> None:
    """It holds all of what it was before rounding, and no whole row or column more."""
    rng = np.random.default_rng(5)
    for _ in range(300):
        low, size = rng.uniform(200, 400, 2), rng.uniform(8, 300, 2)
        exact_low = low - size * (sideways, upright)
        exact_high = low + size * (1 + sideways, 1 + upright)
        found = np.array(grow((*low, *(low + size)), kind, 1000, 1000))
        assert (found[:2] <= exact_low + 1e-9).all() and (found[2:] >= exact_high - 1e-9).all()
        assert (exact_low - found[:2] < 1).all() and (found[2:] - exact_high < 1).all()


@pytest.mark.parametrize("kind", ["face", "plate", "manual"])
@pytest.mark.parametrize("size", [(0, 0), (0.3, 0.3), (1, 1), (3, 40), (40, 3), (7.9, 7.9)])
def test_a_grown_box_has_at_least_eight_pixels_a_side(kind: str, size: tuple[float, float]) -> None:
    for corner in (50.0, 50.4, 50.5, 50.9):
        x0, y0, x1, y1 = grow((corner, corner, corner + size[0], corner + size[1]), kind, 200, 200)
        assert x1 - x0 >= 8 and y1 - y0 >= 8
        assert x0 <= corner and x1 >= corner + size[0]
        assert y0 <= corner and y1 >= corner + size[1]
        # No more than that: what grows for its kind is a third of 40, on either side.
        assert x1 - x0 <= 10 + 1.6 * size[0] and y1 - y0 <= 10 + 1.6 * size[1]


@pytest.mark.parametrize("kind", ["face", "plate", "manual"])
def test_a_grown_box_ends_at_the_borders(kind: str) -> None:
    height, width = 90, 160
    assert grow((-10, -20, 170, 95), kind, height, width) == (0, 0, width, height)
    left, top, right, bottom = grow((-3, -3, 20, 20), kind, height, width)
    assert (left, top) == (0, 0) and right >= 20 and bottom >= 20
    left, top, right, bottom = grow((150, 80, 160, 90), kind, height, width)
    assert (right, bottom) == (width, height) and left <= 150 and top <= 80
    assert grow((0, 0, 1, 1), kind, 1, 1) == (0, 0, 1, 1)


@pytest.mark.parametrize("kind", ["face", "plate", "manual"])
@pytest.mark.parametrize(
    "box",
    [(-50, 40, -20, 60), (40, -50, 60, -20), (130, 40, 150, 60), (40, 130, 60, 150)],
    ids=["left", "above", "right", "below"],
)
def test_a_box_outside_of_the_picture_covers_nothing(kind: str, box: Box) -> None:
    x0, y0, x1, y1 = grown = grow(box, kind, 100, 100)
    assert 0 <= x0 <= x1 <= 100 and 0 <= y0 <= y1 <= 100
    assert not redacted_area([grown], 100, 100).any()


# --- redacting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
def test_a_mosaic_has_at_most_25_colours(photos: list[np.ndarray], size: tuple[int, int]) -> None:
    height, width = size
    photo = photos[2]  # the cat's fur: hardly two pixels are equal
    for x0, y0 in ((0, 0), (83, 0), (11, 300 - height), (451 - width, 300 - height)):
        box = (x0, y0, x0 + width, y0 + height)
        before, after = inside(photo, box), inside(redact(photo, [box], "mosaic"), box)
        assert len(colours(after)) <= min(5, height) * min(5, width)
        # Its colours are those that were there, not one for all.
        assert np.abs(after.mean((0, 1)) - before.mean((0, 1))).max() < 3
        assert len(colours(after)) > 15 or height * width < 200 or min(size) < 5


def test_each_cell_of_a_mosaic_is_one_colour_the_mean_of_its_pixels(
    photos: list[np.ndarray],
) -> None:
    box = (100, 50, 100 + 5 * 18, 50 + 5 * 23)
    before = inside(photos[0], box).reshape(5, 23, 5, 18, 3)
    after = inside(redact(photos[0], [box], "mosaic"), box).reshape(5, 23, 5, 18, 3)
    assert (after == after[:, :1, :, :1]).all()
    assert np.abs(after[:, 0, :, 0] - before.mean((1, 3))).max() <= 0.51


def test_a_mosaic_of_a_whole_photo_has_25_colours(photos: list[np.ndarray]) -> None:
    for photo in photos:
        height, width = photo.shape[:2]
        assert len(colours(redact(photo, [(0, 0, width, height)], "mosaic"))) <= 25


@pytest.mark.parametrize("size", SIZES)
def test_solid_is_one_colour_whatever_was_there(
    photos: list[np.ndarray], size: tuple[int, int]
) -> None:
    box = (30, 20, 30 + size[1], min(300, 20 + size[0]))
    fillings = [inside(redact(photo, [box], "solid"), box) for photo in photos]
    assert len(colours(np.concatenate(fillings))) == 1


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("soft_edge", [0, 9])
def test_the_input_is_not_changed(photos: list[np.ndarray], method: Method, soft_edge: int) -> None:
    photo = photos[1].copy()
    redacted = redact(photo, [(10, 20, 90, 95), (50, 60, 150, 130)], method, soft_edge)
    assert np.array_equal(photo, photos[1])
    assert not np.shares_memory(redacted, photo)
    assert not np.array_equal(redacted, photo)


@pytest.mark.parametrize("method", METHODS)
def test_nothing_changes_outside_of_the_boxes_and_all_of_it_inside(
    photos: list[np.ndarray], method: Method
) -> None:
    photo = photos[0]
    height, width = photo.shape[:2]
    boxes = [(0, 0, 33, 21), (200, 100, 277, 190), (250, 150, 300, 204), (480, 470, width, height)]
    area = redacted_area(boxes, height, width)
    redacted = redact(photo, boxes, method)
    assert np.array_equal(redacted[~area], photo[~area])
    # A mean may by chance be what was there.
    assert (redacted[area] != photo[area]).any(axis=1).mean() > 0.9


@pytest.mark.parametrize("method", METHODS)
def test_a_box_without_pixels_changes_nothing(photos: list[np.ndarray], method: Method) -> None:
    for box in ((5, 5, 5, 30), (5, 5, 30, 5), (0, 0, -15, -15), (9, 9, 3, 3)):
        assert np.array_equal(redact(photos[0], [box], method, 4), photos[0])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("soft_edge", [1, 7, 40])
@pytest.mark.parametrize(
    "box",
    [(200, 90, 271, 177), (0, 0, 50, 60), (440, 3, 451, 300), (0, 0, 451, 300), (9, 9, 10, 10)],
)
def test_a_soft_edge_fades_outside_of_the_box_only(
    photos: list[np.ndarray], method: Method, soft_edge: int, box: Box
) -> None:
    """What is inside is what it is without; outside, nothing changes that is further off."""
    photo = photos[2]
    height, width = photo.shape[:2]
    hard, soft = (redact(photo, [box], method, edge) for edge in (0, soft_edge))
    assert np.array_equal(inside(soft, box), inside(hard, box))
    x0, y0, x1, y1 = box
    y, x = np.mgrid[:height, :width]
    across = np.maximum(np.maximum(x0 - x, x - (x1 - 1)), 0)
    upright = np.maximum(np.maximum(y0 - y, y - (y1 - 1)), 0)
    distance = np.maximum(across, upright)
    assert np.array_equal(soft[distance > soft_edge], photo[distance > soft_edge])
    if soft_edge > 1 and box != (0, 0, width, height):
        changed = (soft != photo).any(axis=2)
        assert changed[(distance > 0) & (distance <= soft_edge)].mean() > 0.5


def test_a_soft_edge_goes_from_the_filling_to_the_photo() -> None:
    """White around a black box: brighter with every pixel, by equal steps."""
    white = np.full((100, 100, 3), 255, np.uint8)
    faded = redact(white, [(40, 40, 60, 60)], "solid", 9)
    for line in (faded[50, 59:71, 0], faded[50, 29:41, 0][::-1], faded[59:71, 50, 1]):
        assert np.abs(line - 25.5 * np.arange(12).clip(0, 10)).max() <= 1


# --- overlaps -------------------------------------------------------------------------------------


def shuffled_within_cells(
    image: np.ndarray, box: Box, only: np.ndarray | None = None, seed: int = 0
) -> np.ndarray:
    """The same picture, the pixels of each cell of a box in another order: the same means.

    `only` says which pixels of the picture may be moved, (H, W) bool.
    """
    result = image.copy()
    rng = np.random.default_rng(seed)
    part = inside(result, box)
    movable = np.ones(part.shape[:2], bool) if only is None else inside(only, box)
    numbers = cell_numbers(box)
    for number in range(25):
        cell = (numbers == number) & movable
        part[cell] = rng.permutation(part[cell])
    return result


FIRST = (100, 60, 180, 150)
OVERLAPPING = [(140, 100, 240, 200), (60, 90, 130, 120), (110, 70, 160, 135), (80, 40, 200, 190)]


@pytest.mark.parametrize("second", OVERLAPPING)
@pytest.mark.parametrize("soft_edge", [0, 12])
def test_of_a_redacted_box_the_next_one_sees_means_only(
    photos: list[np.ndarray], second: Box, soft_edge: int
) -> None:
    """Photos that differ within the first one's cells are the same when two boxes are redacted."""
    photo = photos[2]
    other = shuffled_within_cells(photo, FIRST)
    assert (other != photo).any(axis=2).sum() > 5000
    redacted = [redact(image, [FIRST, second], "mosaic", soft_edge) for image in (photo, other)]
    assert np.array_equal(*redacted)
    # That is the order's doing: the other way round the second box sees the pixels themselves.
    redacted = [redact(image, [second, FIRST], "mosaic", soft_edge) for image in (photo, other)]
    assert not np.array_equal(*redacted)


@pytest.mark.parametrize("second", OVERLAPPING)
def test_of_overlapping_boxes_nothing_is_left_but_means(
    photos: list[np.ndarray], second: Box
) -> None:
    """Nor does the rest of the second box matter, beyond its own cells' means."""
    photo = photos[2]
    outside_first = ~redacted_area([FIRST], *photo.shape[:2])
    other = shuffled_within_cells(photo, FIRST)
    other = shuffled_within_cells(other, second, only=outside_first)
    area = redacted_area([FIRST, second], *photo.shape[:2])
    assert np.array_equal(other[~area], photo[~area])
    assert (other != photo).any(axis=2).sum() > 5000
    redacted = [redact(image, [FIRST, second], "mosaic") for image in (photo, other)]
    assert np.array_equal(*redacted)


def test_overlapping_mosaics_have_no_more_colours_than_cells(photos: list[np.ndarray]) -> None:
    boxes = [(100, 60, 180, 150), (141, 103, 240, 199), (60, 90, 130, 121), (110, 71, 163, 135)]
    area = redacted_area(boxes, *photos[2].shape[:2])
    assert len(np.unique(redact(photos[2], boxes, "mosaic")[area], axis=0)) <= 25 * len(boxes)


def test_a_soft_edge_leaves_other_boxes_as_they_are(photos: list[np.ndarray]) -> None:
    boxes = [(100, 60, 180, 150), (185, 70, 240, 140)]
    hard, soft = (redact(photos[2], boxes, "mosaic", edge) for edge in (0, 12))
    area = redacted_area(boxes, *photos[2].shape[:2])
    assert np.array_equal(hard[area], soft[area])


# --- coverage -------------------------------------------------------------------------------------


def test_the_redacted_area_is_all_boxes_together() -> None:
    area = redacted_area([(2, 1, 5, 3), (4, 2, 8, 6)], 10, 12)
    assert area.shape == (10, 12) and area.sum() == 3 * 2 + 4 * 4 - 1
    assert area[1:3, 2:5].all() and area[2:6, 4:8].all()
    assert not redacted_area([], 10, 12).any()


def test_coverage_is_the_covered_share() -> None:
    covered = redacted_area([(20, 10, 60, 40)], 100, 100)
    assert coverage((20, 10, 60, 40), covered) == 1
    assert coverage((30, 20, 40, 30), covered) == 1
    assert coverage((60, 10, 80, 40), covered) == 0
    assert coverage((40, 10, 80, 40), covered) == 0.5
    assert coverage((0, 0, 100, 100), covered) == 0.12


def test_coverage_of_a_box_with_fractions_is_that_of_its_nearest_pixels() -> None:
    covered = redacted_area([(20, 10, 60, 40)], 100, 100)
    assert coverage((19.6, 9.6, 60.4, 40.4), covered) == 1
    assert coverage((19.4, 10, 60, 40), covered) == pytest.approx(40 / 41)
    rng = np.random.default_rng(1)
    shares = []
    for _ in range(300):
        low = rng.uniform(0, 50, 2)
        size = rng.uniform(6, 45, 2)
        high = low + size
        overlap = np.minimum(high, (60, 40)) - np.maximum(low, (20, 10))
        exact = overlap.clip(0).prod() / size.prod()
        found = coverage((*low, *high), covered)
        assert abs(found - exact) <= (1 / size).sum()  # half a pixel at each side
        shares.append(exact)
    assert np.ptp(shares) > 0.9


def test_coverage_counts_only_what_lies_in_the_picture() -> None:
    covered = redacted_area([(0, 0, 10, 10)], 50, 40)
    assert coverage((-30, -30, 10, 10), covered) == 1
    assert coverage((-30, -30, 20, 10), covered) == 0.5
    covered = redacted_area([(30, 40, 40, 50)], 50, 40)
    assert coverage((30, 40, 90, 90), covered) == 1
    assert coverage((20, 40, 90, 90), covered) == 0.5
    assert coverage((40, 10, 60, 20), np.zeros((50, 40), bool)) == 1
    assert coverage((10, 50, 20, 70), np.zeros((50, 40), bool)) == 1


def test_coverage_of_a_box_left_of_or_above_the_picture_is_that_of_nothing() -> None:
    nothing = np.zeros((50, 40), bool)
    assert coverage((-20, 10, -5, 20), nothing) == 1
    assert coverage((10, -20, 20, -5), nothing) == 1


def test_coverage_of_a_tiny_box_is_that_of_a_pixel() -> None:
    covered = redacted_area([(20, 10, 21, 11)], 50, 40)
    assert coverage((20, 10, 21, 11), covered) == 1
    assert coverage((20.1, 10.1, 20.4, 10.4), covered) == 1
    assert coverage((20.2, 10.2, 20.2, 10.2), covered) == 1
    assert coverage((21.1, 10.1, 21.4, 10.4), covered) == 0
    assert coverage((19.1, 10.1, 19.4, 10.4), covered) == 0


def test_coverage_of_a_tiny_box_is_that_of_the_pixel_it_touches() -> None:
    covered = redacted_area([(20, 10, 21, 11)], 50, 40)
    assert coverage((20.6, 10.6, 20.9, 10.9), covered) == 1
    assert coverage((39.6, 10, 39.9, 11), covered) == 0  # in the last column


# --- attacks --------------------------------------------------------------------------------------


def away_from_edges(image: np.ndarray, boxes: Sequence[Box]) -> np.ndarray:
    """Redacted pixels whose neighbours, up to two pixels off, are of the same cell: (H, W) bool.

    Where boxes overlap, the last one decides, as in `redact`.
    """
    cells = np.zeros(image.shape[:2], np.float32)
    for index, box in enumerate(boxes):
        inside(cells, box)[:] = 1 + 25 * index + cell_numbers(box)
    around = np.ones((5, 5), np.uint8)
    return (cells > 0) & (cv2.erode(cells, around) == cv2.dilate(cells, around))


def assert_no_detail_is_left(found: Found, method: Method) -> None:
    """What changes faster than from cell to cell is gone: edges, whose sum in the photo is not 0."""
    image, faces, boxes = found
    chosen = away_from_edges(image, boxes)
    before, after = (
        cv2.Laplacian(grey(one), cv2.CV_64F) for one in (image, redact(image, boxes, method))
    )
    for x0, y0, x1, y1 in faces.astype(int):
        face = (slice(y0, y1), slice(x0, x1))
        if y1 - y0 < 24:
            continue  # its cells are smaller than what is left out at their borders
        assert chosen[face].mean() > 0.1
        assert np.square(before[face][chosen[face]]).mean() > 1
        assert np.square(after[face][chosen[face]]).mean() < 1e-12


@pytest.mark.parametrize("method", ["mosaic", "solid"])
def test_no_detail_is_left_of_a_portrait(found_portrait: Found, method: Method) -> None:
    assert_no_detail_is_left(found_portrait, method)


@pytest.mark.parametrize("method", ["mosaic", "solid"])
def test_no_detail_is_left_of_faces_in_groups(found_groups: list[Found], method: Method) -> None:
    for found in found_groups:
        assert_no_detail_is_left(found, method)


def sharpened(blurred: np.ndarray, sigma: float) -> np.ndarray:
    """Undo a Gaussian blur of known width, by least squares with a little damping (Tikhonov)."""
    kernel = cv2.getGaussianKernel(round(6 * sigma + 1) | 1, sigma)
    (u, s, v), (p, t, q) = (
        np.linalg.svd(
            cv2.sepFilter2D(np.eye(length), -1, np.ones(1), kernel, borderType=cv2.BORDER_REPLICATE)
        )
        for length in blurred.shape
    )
    gain = np.outer(s, t)
    return v.T @ (u.T @ (blurred - blurred.mean()) @ p * gain / (gain**2 + 1e-5)) @ q


def test_a_gaussian_gives_back_what_a_mosaic_does_not(found_portrait: Found) -> None:
    """That is why it comes with a warning: who knows its width gets a face sharper than it was shown."""
    image, (face,), boxes = found_portrait
    box = next(one for one in boxes if coverage(face, redacted_area([one], *image.shape[:2])) == 1)
    original = grey(inside(image, box))
    height, width = original.shape
    sigma = max(height, width) / 8

    def unexplained(guess: np.ndarray) -> float:
        """Share of the original's variance that a guess does not explain, at best contrast."""
        return 1 - np.corrcoef(guess.ravel(), original.ravel())[0, 1] ** 2

    blurred, mosaic = (
        grey(inside(redact(image, [box], method), box))
        for method in cast(tuple[Method, ...], ("gaussian", "mosaic"))
    )
    # The best of a mosaic is what lies smoothly between its cells' middles.
    means = cv2.resize(mosaic, (5, 5), interpolation=cv2.INTER_AREA)
    smooth = cv2.resize(means, (width, height), interpolation=cv2.INTER_CUBIC)
    best_of_mosaic = min(unexplained(mosaic), unexplained(smooth))
    assert unexplained(sharpened(blurred, sigma)) < 0.75 * unexplained(blurred)
    assert unexplained(sharpened(blurred, sigma)) < 0.75 * best_of_mosaic
    assert best_of_mosaic > 0.4


@pytest.fixture(scope="module")
def second_detector() -> Cascade:
    """Viola and Jones' kind of detector, trained by others on other faces: compares means of blocks."""
    return Cascade(skimage.data.lbp_frontal_face_cascade_filename())


def seen_faces(cascade: Cascade, image: np.ndarray, faces: np.ndarray) -> int:
    """In how many annotated boxes the cascade sees a face's middle."""
    least, most = faces[:, 3] - faces[:, 1], min(image.shape[:2])
    found = cascade.detect_multi_scale(
        image,
        scale_factor=1.2,
        step_ratio=1,
        min_size=(max(24, int(least.min() * 0.6)),) * 2,
        max_size=(min(most, int(least.max() * 2)),) * 2,
    )
    middles = [(one["c"] + one["width"] / 2, one["r"] + one["height"] / 2) for one in found]
    return sum(any(x0 <= x <= x1 and y0 <= y <= y1 for x, y in middles) for x0, y0, x1, y1 in faces)


@pytest.mark.parametrize("method", ["mosaic", "solid"])
def test_another_detector_sees_no_face_in_a_redacted_portrait(
    second_detector: Cascade, found_portrait: Found, method: Method
) -> None:
    image, faces, boxes = found_portrait
    assert seen_faces(second_detector, image, faces) == 1
    assert seen_faces(second_detector, redact(image, boxes, method), faces) == 0


def test_another_detector_sees_no_face_in_redacted_groups(
    second_detector: Cascade, found_groups: list[Found]
) -> None:
    seen = []
    for image, faces, boxes in found_groups:
        seen.append((seen_faces(second_detector, image, faces), len(faces)))
        for method in cast(tuple[Method, ...], ("mosaic", "solid")):
            assert seen_faces(second_detector, redact(image, boxes, method), faces) == 0
    assert all(2 * ours >= faces for ours, faces in seen), seen
