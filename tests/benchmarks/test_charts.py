from __future__ import annotations

import re
import sys
import xml.etree.ElementTree as ElementTree
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from benchmarks import charts, page
from benchmarks.charts import COLOURS, PLOT, Bar, Box, Point, curve, layers, pareto_front, place_labels
from runtime.errors import UnavailableError


def pareto(points: list[Point]) -> str:
    return charts.pareto(points, "frame to boxes")


def point(x: float, y: float, label: str = "p", kept: bool = True) -> Point:
    return Point(label, x, x * 1.1, y, "fp32", kept=kept)


def test_the_front_holds_what_nothing_beats() -> None:
    best = [point(1, 0.3), point(2, 0.4), point(5, 0.6)]
    beaten = [point(2, 0.35), point(3, 0.4), point(6, 0.5)]
    assert pareto_front([*beaten, *best]) == best


def test_a_refused_point_is_not_on_the_front() -> None:
    assert pareto_front([point(1, 0.9, kept=False), point(2, 0.4)]) == [point(2, 0.4)]


@pytest.mark.parametrize("seed", range(10))
def test_labels_of_a_crowd_do_not_overlap_and_stay_inside(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places = [(float(x), float(y)) for x, y in zip(rng.uniform(150, 800, 9), rng.uniform(60, 340, 9), strict=True)]
    boxes = place_labels([f"student int8-{i}" for i in range(9)], places, [x + 30 for x, _ in places], [], PLOT)
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))
    assert all(b.left >= PLOT.left and b.right <= PLOT.right and b.top <= PLOT.top for b in boxes)


def test_equal_points_get_different_places() -> None:
    boxes = place_labels(["first", "second", "third"], [(300.0, 200.0)] * 3, [320.0] * 3, [], PLOT)
    assert all(a.overlap(b) == 0 for a, b in combinations(boxes, 2))


EXTREMES = [
    [point(5, 0.5), point(6, 0.5)],
    [point(5, 0.0), point(5, 0.0)],
    [point(0.4, 0.1), point(900, 0.9)],
    [point(1e-3, 1.0), point(1e-3, 0.999999)],
]


@pytest.mark.parametrize("points", EXTREMES)
def test_a_chart_is_well_formed_at_the_extremes(points: list[Point]) -> None:
    chart = pareto(points)
    assert ElementTree.fromstring(chart).tag == "svg"
    assert "nan" not in chart
    assert len(ticks_of(chart, 0)) >= 2
    assert len(ticks_of(chart, 1)) >= 2


def ticks_of(chart: str, axis: int) -> list[str]:
    """The numbers on the x axis (0) or the y axis (1)."""
    group = ElementTree.fromstring(chart).findall(".//g[@class='axis']")[axis]
    return [text.text or "" for text in group.iter("text")][:-1]


def test_less_than_two_points_are_no_chart() -> None:
    assert pareto([]) == pareto([point(1, 0.5)]) == ""


def test_text_in_a_chart_is_escaped_and_is_no_formula() -> None:
    chart = ElementTree.fromstring(pareto([point(1, 0.5, label="<a> $b_c$ & d"), point(2, 0.6)]))
    assert "<a> $b_c$ & d" in [text.text for text in chart.iter("text")]


@pytest.mark.filterwarnings("error")
def test_a_label_may_hold_any_letters() -> None:
    label = "模型 🙂 #c0deff"
    chart = ElementTree.fromstring(pareto([point(1, 0.5, label=label), point(2, 0.6)]))
    assert label in [text.text for text in chart.iter("text")]


def test_ticks_are_round_and_inside() -> None:
    assert ticks_of(pareto([point(5, 0.0), point(6, 0.9)]), 1) == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert ticks_of(pareto([point(3, 0.5), point(90, 0.6)]), 0) == ["5", "10", "20", "50", "100"]
    assert ticks_of(pareto([point(7, 0.5), point(26, 0.6)]), 0) == ["10", "15", "20", "25", "30", "35"]


def test_a_chart_is_the_same_whatever_the_settings_of_matplotlib_are() -> None:
    import matplotlib

    points = [point(1, 0.5, "a"), point(8, 0.6, "b", kept=False)]
    before = pareto(points), curve([(0, 1), (1, 3)], "good", "t")
    with matplotlib.rc_context({"axes.facecolor": "red", "svg.fonttype": "path", "svg.hashsalt": "x", "font.size": 30}):
        assert (pareto(points), curve([(0, 1), (1, 3)], "good", "t")) == before


def test_a_chart_has_the_colours_of_the_page_and_no_other() -> None:
    charts = [pareto([*EXTREMES[2], point(3, 0.2, kept=False)]), curve([(0.0, 3.0), (1.0, 2.0)], "inference", "t")]
    style = (Path(page.__file__).parent / "style.html").read_text()
    assert all(style.count(f"--{name}:") == 2 for name in COLOURS)  # the light theme's and the dark theme's
    for chart in charts:
        colours = re.findall(r"(?:fill|stroke): ([^;\"]*)", chart)
        assert {colour for colour in colours if not re.fullmatch(r"none|var\(--[a-z0-9]+\)", colour)} == set()


def test_a_chart_links_to_nothing_and_has_no_ids() -> None:
    for chart in (pareto(EXTREMES[0]), curve([(0.0, 3.0), (1.0, 2.0)], "inference", "t")):
        assert not re.search(r"\bid=|href|url\(|xmlns|<defs|<style|<metadata|#", chart)


@pytest.mark.parametrize("points", [[(0.0, 1.0)], [(0.0, 1.0), (1.0, 1.0)], [(0.0, 3.0), (1.0, 2.0), (9.0, 1.0)]])
def test_curves_are_well_formed(points: list[tuple[float, float]]) -> None:
    assert ElementTree.fromstring(curve(points, "inference", "t", marked=1.0)).tag == "svg"


def test_without_matplotlib_the_error_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    with pytest.raises(UnavailableError, match="Package matplotlib is not installed") as raised:
        pareto(EXTREMES[0])
    assert str(raised.value).count("\n") == 0
    assert "pip install" in str(raised.value)


def test_boxes_that_only_touch_do_not_overlap() -> None:
    assert Box(0, 0, 1, 1).overlap(Box(1, 0, 2, 1)) == 0
    assert Box(0, 0, 2, 2).overlap(Box(1, 1, 3, 3)) == 1


def test_bars_of_layers_are_named_and_the_smallest_are_joined() -> None:
    bars = [Bar(f"layer {i}", 1 / 40, is_int8=i > 1) for i in range(40)]
    chart = layers(bars)
    assert ElementTree.fromstring(chart).tag == "svg"
    assert "layer 23" in chart
    assert "layer 24" not in chart
    assert "others" in chart
    assert "others" not in layers(bars[:24])


def test_bars_of_layers_in_float_are_hollow() -> None:
    filled, hollow = (layers([Bar("1", 1.0, is_int8)]) for is_int8 in (True, False))
    assert "fill: var(--int8)" in filled
    assert "fill: var(--int8)" not in hollow
    assert "stroke: var(--int8)" in hollow
