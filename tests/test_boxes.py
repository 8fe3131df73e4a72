"""Boxes of a file, as workers have them."""

import math
import pickle

import numpy as np

from sa_engine.boxes import Boxes


def test_boxes_are_found_by_the_name_of_their_image() -> None:
    given = {
        "b.png": [[1, 2, 3, 4], [5, 6, 7, 8.5, 0.25]],
        "": [],
        "ä/b.png": [[0, 0, 9, 9, 1]],
        "\ud800": [],
    }
    boxes = pickle.loads(pickle.dumps(Boxes(given)))
    first, second = boxes.of("b.png").tolist()
    assert first[:4] == [1, 2, 3, 4] and math.isnan(first[4])
    assert second == [5, 6, 7, 8.5, 0.25]
    assert boxes.of("ä/b.png").tolist() == [[0, 0, 9, 9, 1]]
    for name in ("", "a.png", "b.pn", "b.pngs", "z", "ü"):
        assert boxes.of(name).shape == (0, 5)
    assert Boxes().of("b.png").shape == (0, 5)


def test_names_without_an_image_are_told_in_order() -> None:
    boxes = Boxes({name: [] for name in "dacb"})
    assert boxes.missing(["b", "e"]) == ["a", "c", "d"]


def test_a_box_takes_five_numbers_and_no_more() -> None:
    """It is what makes millions of them small enough for every worker."""
    sides = np.random.default_rng(0).random((20_000, 10, 4)).tolist()
    boxes = Boxes({f"{number:08}.jpg": rows for number, rows in enumerate(sides)})
    assert len(pickle.dumps(boxes)) < 200_000 * 5 * 8 + 20_000 * (12 + 16) + 1_000
