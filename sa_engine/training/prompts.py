"""Simulated interactive prompts (paper §A, "Training algorithm"): pure functions on masks.

An object is prompted several times. First with a point or a box, at equal odds; then with points drawn from what is
wrong with the mask before. Twice no point comes: once at a random place between the points, and at the end.

All coordinates are pixels of the model-input frame. Randomness comes from the generator that is given, one draw after
the other, object by object.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from sa_engine.modeling.prompt_encoder import (
    BACKGROUND,
    BOTTOM_RIGHT,
    FOREGROUND,
    PADDING,
    TOP_LEFT,
)


@dataclass(frozen=True, kw_only=True)
class PromptRules:
    """How objects are prompted while training; the defaults are the paper's.

    Attributes:
        box_odds: of a box as first prompt, rather than a point.
        box_noise: standard deviation of each side of a box, as a share of the box's width or height.
        max_box_noise: pixels that a side moves at most.
        corrections: points drawn from the error region, after the first prompt.
        mask_only_steps: steps without a new point: 1 at the end, 2 also at a random place before a correction.
        box_multimask: a box alone gets three masks, as a point does; else the single one. The paper gives three to
            "a single prompt"; its released tools take one for a box.
    """

    box_odds: float = 0.5
    box_noise: float = 0.1
    max_box_noise: float = 20.0
    corrections: int = 8
    mask_only_steps: int = 2
    box_multimask: bool = True

    @property
    def steps(self) -> int:
        """Times that an object is prompted; 11 in the paper."""
        return 1 + self.corrections + self.mask_only_steps


class Prompts:
    """The points and boxes that B objects were prompted with so far.

    Args:
        masks: B times (h, w) bool, none empty.
        rules: how to prompt.
        rng: of all draws.
    """

    def __init__(
        self, masks: Sequence[np.ndarray] | np.ndarray, rules: PromptRules, rng: np.random.Generator
    ) -> None:
        self.rules, self.rng = rules, rng
        self.boxes: list[np.ndarray | None] = []
        self.points: list[list[tuple[float, float]]] = []
        self.labels: list[list[int]] = []
        for mask in masks:
            if rng.random() < rules.box_odds:
                self.boxes.append(noisy_box(mask, rules, rng))
                self.points.append([])
                self.labels.append([])
            else:
                self.boxes.append(None)
                self.points.append([random_point(mask, rng)])
                self.labels.append([FOREGROUND])

    def correct(self, row: int, mask: np.ndarray, predicted: np.ndarray) -> None:
        """Give object ``row`` a point from the error region; from anywhere in the mask if there is no error.

        Args:
            row: of the B objects.
            mask: (h, w) bool, its truth.
            predicted: (h, w) bool, the mask before.
        """
        x, y, label = error_point(mask, predicted, self.rng)
        self.points[row].append((x, y))
        self.labels[row].append(label)

    @property
    def boxed(self) -> np.ndarray:
        """Which objects have a box: (B,) bool."""
        return np.array([box is not None for box in self.boxes])

    @property
    def multimask(self) -> np.ndarray:
        """Which of the B first prompts are answered with three masks: (B,) bool."""
        return ~self.boxed | self.rules.box_multimask

    def encoded(self) -> tuple[np.ndarray, np.ndarray]:
        """All prompts as the prompt encoder's points.

        A box is its two corners; where there is none stands one point of padding, as in the released models. Objects
        with a box have one point less than the others, so that all have the same number of tokens.

        Returns:
            Points (B, T, 2) and labels (B, T), float32: 0 and 1 for points, 2 and 3 for corners, -1 for padding.
        """
        points, labels = [], []
        for box, given, kinds in zip(self.boxes, self.points, self.labels, strict=True):
            if box is None:
                points.append([*given, (0.0, 0.0)])
                labels.append([*kinds, PADDING])
            else:
                points.append([*given, (box[0], box[1]), (box[2], box[3])])
                labels.append([*kinds, TOP_LEFT, BOTTOM_RIGHT])
        return np.array(points, dtype=np.float32), np.array(labels, dtype=np.float32)


def mask_only_places(rules: PromptRules, rng: np.random.Generator) -> list[bool]:
    """For every step after the first, whether a new point comes: the paper's ten, eight of them true."""
    steps = [True] * rules.corrections
    if rules.mask_only_steps > 1:
        steps.insert(int(rng.integers(max(1, rules.corrections))), False)
    return steps + [False] * (rules.mask_only_steps > 0)


def random_point(mask: np.ndarray, rng: np.random.Generator) -> tuple[float, float]:
    """The x and y of a pixel of a (h, w) bool mask, each equally likely."""
    pixels = np.flatnonzero(mask)
    y, x = divmod(int(pixels[rng.integers(len(pixels))]), mask.shape[1])
    return float(x), float(y)


def noisy_box(mask: np.ndarray, rules: PromptRules, rng: np.random.Generator) -> np.ndarray:
    """The XYXY box of a (h, w) bool mask, each side moved by noise; (4,) float32, inside the image, not turned over."""
    height, width = mask.shape
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    box = np.array([columns[0], rows[0], columns[-1], rows[-1]], dtype=np.float32)
    extent = np.tile(box[2:] - box[:2] + 1, 2)
    noise = rng.normal(0.0, rules.box_noise, 4) * extent
    moved = box + noise.clip(-rules.max_box_noise, rules.max_box_noise)
    moved = np.concatenate([np.minimum(moved[:2], moved[2:]), np.maximum(moved[:2], moved[2:])])
    return moved.clip(0, np.tile([width - 1, height - 1], 2)).astype(np.float32)


def error_point(
    mask: np.ndarray, predicted: np.ndarray, rng: np.random.Generator
) -> tuple[float, float, int]:
    """A pixel from what is wrong with a prediction, each equally likely.

    Args:
        mask: (h, w) bool, the truth.
        predicted: (h, w) bool.
        rng: of the draw.

    Returns:
        x, y, and its label: foreground where the prediction misses the mask, background where it is surplus. Without
        an error, a point of the mask.
    """
    wrong = mask ^ predicted
    x, y = random_point(wrong if wrong.any() else mask, rng)
    return x, y, FOREGROUND if mask[int(y), int(x)] else BACKGROUND
