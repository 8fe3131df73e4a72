"""The interactive simulation's prompts, step by step, on masks whose answer is known (paper §A)."""

import numpy as np
import pytest

from sa_engine.modeling.prompt_encoder import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    PADDING,
    TOP_LEFT,
)
from sa_engine.training.prompts import (
    PromptRules,
    Prompts,
    error_point,
    mask_only_places,
    noisy_box,
    random_point,
)

SIZE = (96, 128)
LARGE = (768, 1024)


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def rectangle(x0: int, y0: int, x1: int, y1: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """A mask whose inclusive corners are given."""
    mask = np.zeros(size, dtype=bool)
    mask[y0 : y1 + 1, x0 : x1 + 1] = True
    return mask


def test_a_mask_has_eleven_steps_in_the_paper() -> None:
    assert PromptRules().steps == 11
    assert PromptRules(corrections=1, mask_only_steps=1).steps == 3


def test_first_prompts_are_points_and_boxes_at_equal_odds() -> None:
    prompts = Prompts([rectangle(10, 10, 19, 19)] * 4000, PromptRules(), rng())
    boxes = sum(box is not None for box in prompts.boxes)
    assert 1850 < boxes < 2150  # five standard deviations
    assert [len(points) for points in prompts.points] == [int(box is None) for box in prompts.boxes]
    assert all(
        box is None
        for box in Prompts([rectangle(0, 0, 9, 9)] * 50, PromptRules(box_odds=0), rng()).boxes
    )
    assert all(
        box is not None
        for box in Prompts([rectangle(0, 0, 9, 9)] * 50, PromptRules(box_odds=1), rng()).boxes
    )


def test_first_points_are_uniform_in_the_mask() -> None:
    mask = rectangle(10, 20, 13, 21) | rectangle(100, 60, 103, 61)
    points = [random_point(mask, generator) for generator in [rng()] for _ in range(8000)]
    counts = np.unique(points, axis=0, return_counts=True)
    assert len(counts[0]) == mask.sum() == 16
    assert all(mask[int(y), int(x)] for x, y in counts[0])
    assert counts[1].min() > 380 and counts[1].max() < 620  # 500 each, five standard deviations


def test_box_noise_is_a_tenth_of_the_side_and_at_most_twenty_pixels() -> None:
    small, rules, generator = rectangle(400, 300, 479, 339, LARGE), PromptRules(), rng()
    exact = np.array([400, 300, 479, 339])
    moved = np.array([noisy_box(small, rules, generator) for _ in range(2000)]) - exact
    assert np.abs(moved.mean(axis=0)).max() < 0.8
    np.testing.assert_allclose(moved.std(axis=0), [8, 4, 8, 4], rtol=0.1)  # of 80 and 40 pixels

    large = rectangle(200, 200, 799, 599, LARGE)
    moved = np.array([noisy_box(large, rules, generator) for _ in range(400)]) - [
        200,
        200,
        799,
        599,
    ]
    assert np.abs(moved).max() == pytest.approx(20)
    assert (np.abs(moved) > 19.99).mean() > 0.5  # a standard deviation of 60 and 40 pixels, cut


def test_a_noisy_box_stays_in_the_image_and_is_not_turned_over() -> None:
    generator = rng()
    for mask in (
        rectangle(0, 0, 127, 95),
        rectangle(126, 94, 127, 95),
        rectangle(5, 5, 5, 5),
    ):
        boxes = np.array(
            [noisy_box(mask, PromptRules(box_noise=1.0), generator) for _ in range(500)]
        )
        assert (
            (boxes >= 0).all()
            and (boxes[:, [0, 2]] <= 127).all()
            and (boxes[:, [1, 3]] <= 95).all()
        )
        assert (boxes[:, :2] <= boxes[:, 2:]).all()


def test_without_noise_a_box_is_the_masks() -> None:
    box = noisy_box(rectangle(3, 4, 50, 60), PromptRules(box_noise=0), rng())
    assert box.tolist() == [3, 4, 50, 60]


def test_corrections_come_from_the_error_region_with_its_label() -> None:
    mask, predicted = rectangle(20, 20, 59, 59), rectangle(40, 20, 79, 59)
    points = [error_point(mask, predicted, generator) for generator in [rng()] for _ in range(4000)]
    for x, y, label in points:
        assert (mask ^ predicted)[int(y), int(x)]
        assert label == (FOREGROUND if mask[int(y), int(x)] else BACKGROUND)
    missed = np.mean([label == FOREGROUND for _, _, label in points])
    assert 0.45 < missed < 0.55  # both regions have as many pixels


def test_larger_errors_are_drawn_more_often() -> None:
    mask, predicted = rectangle(0, 0, 49, 49), rectangle(0, 0, 49, 24) | rectangle(100, 0, 104, 49)
    labels = [
        error_point(mask, predicted, generator)[2] for generator in [rng()] for _ in range(3000)
    ]
    assert 0.80 < np.mean(np.array(labels) == FOREGROUND) < 0.866  # 1,250 of 1,500 pixels


def test_without_an_error_a_correction_is_a_point_of_the_mask() -> None:
    mask = rectangle(10, 10, 12, 12)
    x, y, label = error_point(mask, mask.copy(), rng())
    assert mask[int(y), int(x)] and label == FOREGROUND


def test_two_steps_bring_no_point_one_between_and_one_at_the_end() -> None:
    generator, places = rng(), []
    for _ in range(800):
        steps = mask_only_places(PromptRules(), generator)
        assert len(steps) == 10 and sum(steps) == 8 and steps[-1] is False
        places.append(steps.index(False))
    counts = np.bincount(places, minlength=8)
    assert len(counts) == 8 and counts.min() > 60  # any place before a correction, 100 each


@pytest.mark.parametrize(("corrections", "mask_only", "expected"), [
    (8, 1, [True] * 8 + [False]),
    (1, 2, [False, True, False]),
    (0, 2, [False, False]),
    (0, 0, []),
    (2, 0, [True, True]),
])  # fmt: skip
def test_fewer_steps_keep_the_order(corrections: int, mask_only: int, expected: list[bool]) -> None:
    rules = PromptRules(corrections=corrections, mask_only_steps=mask_only)
    assert mask_only_places(rules, rng()) == expected
    assert len(expected) + 1 == rules.steps


def test_points_and_boxes_are_encoded_side_by_side() -> None:
    masks = [rectangle(10, 10, 19, 19), rectangle(30, 30, 49, 79)]
    prompts = Prompts(masks, PromptRules(box_odds=0), rng())
    prompts.boxes[1] = np.array([30, 30, 49, 79], dtype=np.float32)
    prompts.points[1], prompts.labels[1] = [], []
    points, labels = prompts.encoded()
    assert points.shape == (2, 2, 2) and points.dtype == labels.dtype == np.float32
    assert labels.tolist() == [[FOREGROUND, PADDING], [TOP_LEFT, BOTTOM_RIGHT]]
    assert points[1].tolist() == [[30, 30], [49, 79]]
    for row, mask in enumerate(masks):
        prompts.correct(row, mask, np.zeros_like(mask))
    points, labels = prompts.encoded()
    assert labels.tolist() == [
        [FOREGROUND, FOREGROUND, PADDING],
        [FOREGROUND, TOP_LEFT, BOTTOM_RIGHT],
    ]


def test_a_box_is_answered_by_three_masks_or_by_one() -> None:
    masks = [rectangle(0, 0, 9, 9)] * 20
    assert Prompts(masks, PromptRules(), rng()).multimask.all()
    prompts = Prompts(masks, PromptRules(box_multimask=False), rng())
    assert prompts.multimask.tolist() == [box is None for box in prompts.boxes]
    assert 0 < prompts.multimask.sum() < 20
