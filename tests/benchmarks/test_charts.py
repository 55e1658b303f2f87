from __future__ import annotations

import xml.etree.ElementTree as ElementTree
from itertools import combinations

import numpy as np
import pytest

from benchmarks.charts import PLOT, Box, Point, Scale, curve, front, log_ticks, pareto, place_labels, stacked_bar, ticks
from benchmarks.charts import Part as BarPart


def point(x: float, y: float, label: str = "p", kept: bool = True) -> Point:
    return Point(label, x, x * 1.1, y, "fp32", kept=kept)


def test_the_front_holds_what_nothing_beats() -> None:
    best = [point(1, 0.3), point(2, 0.4), point(5, 0.6)]
    beaten = [point(2, 0.35), point(3, 0.4), point(6, 0.5)]
    assert front([*beaten, *best]) == best


def test_a_refused_point_is_not_on_the_front() -> None:
    assert front([point(1, 0.9, kept=False), point(2, 0.4)]) == [point(2, 0.4)]


@pytest.mark.parametrize("seed", range(10))
def test_labels_of_a_crowd_do_not_overlap_and_stay_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = [(float(x), float(y)) for x, y in zip(rng.uniform(150, 800, 9), rng.uniform(60, 340, 9), strict=True)]
    boxes = place_labels([f"student int8-{i}" for i in range(9)], places, [x + 30 for x, _ in places], [], PLOT)
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))
    assert all(b.left >= PLOT.left and b.right <= PLOT.right and b.top >= PLOT.top for b in boxes)


def test_equal_points_get_different_places() -> None:
    boxes = place_labels(["first", "second", "third"], [(300.0, 200.0)] * 3, [320.0] * 3, [], PLOT)
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))


@pytest.mark.parametrize(
    "points",
    [
        [point(5, 0.5), point(6, 0.5)],
        [point(5, 0.0), point(5, 0.0)],
        [point(0.4, 0.1), point(900, 0.9)],
        [point(1e-3, 1.0), point(1e-3, 0.999999)],
    ],
)
def test_a_picture_is_well_formed_at_the_extremes(points: list[Point]) -> None:
    assert ElementTree.fromstring(pareto(points)).tag == "svg"
    assert "nan" not in pareto(points)


def test_less_than_two_points_are_no_picture() -> None:
    assert pareto([]) == pareto([point(1, 0.5)]) == ""


def test_text_in_a_picture_is_escaped() -> None:
    assert ElementTree.fromstring(pareto([point(1, 0.5, label="<a> & b"), point(2, 0.6)])) is not None


def test_ticks_are_round_and_inside() -> None:
    assert ticks(0.0, 1.0, 5) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert log_ticks(3, 120) == [5, 10, 20, 50, 100]
    assert log_ticks(6, 34) == [10, 15, 20, 25, 30]


def test_scales_map_their_ends() -> None:
    assert Scale(1, 100, 0, 10, log=True)(10) == pytest.approx(5)
    assert Scale(0, 4, 10, 0)(1) == pytest.approx(7.5)


def test_bars_and_curves_are_well_formed() -> None:
    bar = ElementTree.fromstring(stacked_bar([BarPart("a", 1.0), BarPart("b", 3.0)], 8.0, "t"))
    assert [float(piece.get("x", "")) for piece in bar] == [0.0, 77.5]
    for points in ([(0.0, 1.0)], [(0.0, 1.0), (1.0, 1.0)], [(0.0, 3.0), (1.0, 2.0), (9.0, 1.0)]):
        assert ElementTree.fromstring(curve(points, "loss", "t", marked=1.0)).tag == "svg"


def test_boxes_that_only_touch_do_not_overlap() -> None:
    assert Box(0, 0, 1, 1).overlap(Box(1, 0, 2, 1)) == 0
    assert Box(0, 0, 2, 2).overlap(Box(1, 1, 3, 3)) == 1
