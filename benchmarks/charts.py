"""Charts of a report as SVG text, drawn by matplotlib: equal input gives equal bytes.

The page sets the colours: each is a CSS variable of style.html, so a chart follows the light and the dark theme. Text
stays text, in the font of the page. Axes carry the class `axis`: their ticks are the only numbers of a page that are
not in the report.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import Any, NamedTuple

from benchmarks.packages import optional

STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "edgestill",
    "font.size": 12.5,
    "axes.spines.left": False,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.spines.bottom": False,
    "axes.axisbelow": True,
    "path.simplify": False,
}
COLOURS = (
    *("paper", "ink", "soft", "faint", "line", "accent", "good"),
    *("fp32", "fp16", "int8", "other", "preprocess", "inference", "postprocess"),
)
"""CSS variables of style.html."""


def colour(name: str) -> str:
    """A colour that matplotlib can draw, in place of a CSS variable; `_svg` replaces it by the variable."""
    return f"#c0de{COLOURS.index(name):02x}"


def _axes(size_wh: tuple[float, float], plot: Box) -> tuple[Any, Any]:
    """A figure of this size, in units of the SVG, and its axes in the rectangle `plot`."""
    width, height = size_wh
    figure = optional("matplotlib.figure", "matplotlib").Figure((width / 72, height / 72), dpi=72)
    figure.patch.set_visible(False)
    place = (plot.left / width, plot.bottom / height, plot.width / width, plot.height / height)
    return figure, figure.add_axes(place, facecolor="none")


def _svg(figure: Any, title: str) -> str:
    """The figure for use in a page: classes (gid "class:NAME") instead of ids, no links, only the page's colours."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the page's font is the reader's, and may have it
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    body = buffer.getvalue().partition("<svg")[2].partition(">")[2]
    for pattern, text in (
        (r"<(metadata|defs)>.*?</\1>|<!--.*?-->|\s*\n\s*", ""),
        (r' id="class:([^"]*)"', r' class="\1"'),
        (r' id="matplotlib\.axis_\d+"', ' class="axis" aria-hidden="true"'),
        (r' id="[^"]*"| clip-path="[^"]*"', ""),
        (r"font-family: [^;]*; ", ""),
        (r"font: ([\d.]+px) [^;]*", r"font-size: \1"),
    ):
        body = re.sub(pattern, text, body, flags=re.DOTALL)
    for name in COLOURS:
        body = body.replace(colour(name), f"var(--{name})")
    width, height = (72 * side for side in figure.get_size_inches())
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(title, quote=True)}">{body}'


def _drawing() -> Any:
    """A context in which matplotlib's settings are those of this module, whatever the user's are."""
    return optional("matplotlib.style", "matplotlib").context(["default", STYLE])


# ------------------------------------------------------------------------------------------------------------- Pareto


class Box(NamedTuple):
    """A rectangle; y grows upwards."""

    left: float
    bottom: float
    right: float
    top: float

    @property
    def width(self) -> float:
        return self.right - self.left

    @property
    def height(self) -> float:
        return self.top - self.bottom

    def overlap(self, other: Box) -> float:
        """Shared area."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.top, other.top) - max(self.bottom, other.bottom)
        return max(width, 0.0) * max(height, 0.0)


class Point(NamedTuple):
    """One measured file: `x` its p50 and `x_high` the tail of its latency (ms), `y` its mAP."""

    label: str
    x: float
    x_high: float
    y: float
    kind: str
    """Name of the colour."""
    teacher: bool = False
    kept: bool = True


CHART_WH = (936, 428)
PLOT = Box(76, 56, 918, 410)
MARK = 7.0
"""Radius of a mark."""
LETTER = 7.8
"""Width of an average letter of a bold 12.5 px label in DejaVu Sans, the widest of the usual fonts."""
LINE = 16.0
"""Height of a label."""
LOG_FROM = 4.0
"""A latency axis is logarithmic from this ratio of its ends."""
FEWEST_POINTS = 2
FEWEST_TICKS = 3
ROUND = (1, 2, 5, 10)
"""Steps between ticks, times a power of ten."""


def pareto(points: Sequence[Point], span: str) -> str:
    """Scatter of mAP over latency, with the front of files that no kept file beats in both; "" below two points.

    `span` says what a latency covers.
    """
    if len(points) < FEWEST_POINTS:
        return ""
    with _drawing():
        figure, axes = _axes(CHART_WH, PLOT)
        _scales(axes, points, span)
        best = pareto_front(points)
        axes.plot([p.x for p in best], [p.y for p in best], color=colour("accent"), linewidth=2, linestyle=(0, (1, 2)))
        for point in points:
            _draw(axes, point)
        _write_labels(figure, axes, points, best)
        return _svg(figure, "Accuracy against latency of every measured file")


def pareto_front(points: Sequence[Point]) -> list[Point]:
    """The kept points that no kept point beats in latency and accuracy at once, from fast to accurate."""
    ordered = sorted((point for point in points if point.kept), key=lambda point: (point.x, -point.y))
    best, chosen = -math.inf, []
    for point in ordered:
        if point.y > best:
            best = point.y
            chosen.append(point)
    return chosen


def _scales(axes: Any, points: Sequence[Point], span: str) -> None:
    ticker = optional("matplotlib.ticker", "matplotlib")
    low, high = min(point.x for point in points), max(point.x_high for point in points)
    is_log = high / low > LOG_FROM
    room = 0.15 * (high - low) or 0.1 * high
    axes.set_xscale("log" if is_log else "linear")
    axes.set_xlim(*((low / 1.25, high * 1.25) if is_log else (max(low - room, 0.0), high + room)))
    axes.xaxis.set_major_locator(ticker.MaxNLocator(8, steps=ROUND))
    if is_log:
        left, right = axes.get_xlim()
        decades = ticker.LogLocator(subs=(1, 2, 5)).tick_values(left, right)
        if sum(left <= tick <= right for tick in decades) >= FEWEST_TICKS:
            axes.xaxis.set_major_locator(ticker.FixedLocator(decades))
        axes.xaxis.set_minor_locator(ticker.NullLocator())
    low, high = min(point.y for point in points), max(point.y for point in points)
    room = max(0.18 * (high - low), 0.01)
    axes.set_ylim(max(low - room, 0.0), high + room)
    axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=ROUND))
    for axis, text in ((axes.xaxis, "{x:g}"), (axes.yaxis, "{x:.3g}")):
        axis.set_major_formatter(ticker.StrMethodFormatter(text))
    axes.grid(color=colour("line"), linewidth=1)
    axes.tick_params(left=False, bottom=False, pad=9, labelcolor=colour("faint"))
    scale = ", logarithmic" if is_log else ""
    axes.set_xlabel(f"Latency, {span} (ms{scale}) → slower", color=colour("soft"), labelpad=10)
    axes.set_ylabel("mAP50-95 → better", color=colour("soft"), labelpad=12)


def _draw(axes: Any, point: Point) -> None:
    """The mark, and a whisker to the tail if the whisker is longer than the mark."""
    own, at = colour(point.kind), axes.transData.transform
    if at((point.x_high, 0))[0] - at((point.x, 0))[0] > MARK:
        whisker = {"arrowstyle": "|-|,widthA=0,widthB=4", "mutation_scale": 1, "shrinkA": 0, "shrinkB": 0}
        line = {"color": own, "linewidth": 1.75, "alpha": 0.75}
        axes.annotate("", (point.x_high, point.y), (point.x, point.y), arrowprops=whisker | line, zorder=3)
    fill, edge = (own, colour("paper")) if point.kept else (colour("paper"), own)
    look = {"facecolor": fill, "edgecolor": edge, "linewidth": 2, "zorder": 4}
    _mark(axes, (point.x, point.y), MARK, is_diamond=point.teacher, **look)


def _mark(axes: Any, place: tuple[float, float], radius: float, *, is_diamond: bool = False, **look: Any) -> None:
    """A patch: matplotlib's markers and collections become links in SVG."""
    patches, transforms = (optional(f"matplotlib.{name}", "matplotlib") for name in ("patches", "transforms"))
    centre, pixels = tuple(axes.transData.transform(place)), transforms.IdentityTransform()
    shape = patches.RegularPolygon(centre, 4, radius=radius + 1) if is_diamond else patches.Circle(centre, radius)
    shape.set(transform=pixels, **look)
    axes.add_artist(shape)


def _write_labels(figure: Any, axes: Any, points: Sequence[Point], best: Sequence[Point]) -> None:
    def places(pairs: Iterable[tuple[float, float]]) -> list[tuple[float, float]]:
        return [tuple(axes.transData.transform(pair)) for pair in pairs]

    marks, tails = places((p.x, p.y) for p in points), [x for x, _ in places((p.x_high, p.y) for p in points)]
    crossed = _line_obstacles(places((p.x, p.y) for p in best))
    boxes = place_labels([point.label for point in points], marks, tails, crossed, PLOT)
    for point, box, mark, tail in zip(points, boxes, marks, tails, strict=True):
        middle = ((box.left + box.right) / 2, (box.bottom + box.top) / 2)
        near = (min(max(mark[0], box.left), box.right), min(max(mark[1], box.bottom), box.top))
        if math.dist((min(max(near[0], mark[0]), tail), mark[1]), near) > 3 * MARK:
            line = {"arrowstyle": "-", "color": colour("faint"), "shrinkA": 0, "shrinkB": 0}
            axes.annotate("", mark, near, "figure pixels", "figure pixels", arrowprops=line, zorder=2)
        text = {"ha": "center", "va": "center_baseline", "gid": "class:label", "parse_math": False, "zorder": 5}
        figure.text(middle[0] / CHART_WH[0], middle[1] / CHART_WH[1], point.label, color=colour("ink"), **text)


def _line_obstacles(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along a line: labels must not cover them."""
    steps = [(a, b, step / 40) for a, b in pairwise(corners) for step in range(41)]
    centres = [(a[0] + (b[0] - a[0]) * part, a[1] + (b[1] - a[1]) * part) for a, b, part in steps]
    return [Box(cx - 3, cy - 3, cx + 3, cy + 3) for cx, cy in centres]


def place_labels(
    texts: Sequence[str],
    places: Sequence[tuple[float, float]],
    tails: Sequence[float],
    avoid: Sequence[Box],
    plot: Box,
) -> list[Box]:
    """A box for each text near its point, chosen so that no text covers another text, a mark, a whisker or `avoid`.

    Greedy from the top of the chart: the first free position, nearest to the point first.
    """
    taken = [Box(px - 10, py - 9, max(px + 10, tail + 4), py + 9) for (px, py), tail in zip(places, tails, strict=True)]
    taken += avoid
    boxes: dict[int, Box] = {}
    for index in sorted(range(len(texts)), key=lambda i: (-places[i][1], places[i][0])):
        around = list(_label_positions(places[index], tails[index], LETTER * len(texts[index])))
        boxes[index] = min(around, key=lambda box: _cost(box, taken, plot))
        taken.append(boxes[index])
    return [boxes[index] for index in range(len(texts))]


def _label_positions(place: tuple[float, float], tail: float, width: float) -> Iterator[Box]:
    """Positions of a label: above, below, right of the whisker, left; then the same farther and farther away."""
    (x, y), half = place, LINE / 2
    for step in range(8):
        far = 11 + half + step * 13
        centres = (
            *((x, y + far), (x, y - far)),
            *((tail + 10 + width / 2, y + side * step * 13) for side in (1, -1)),
            *((x - 14 - width / 2, y + side * step * 13) for side in (1, -1)),
            *((x + shift * width / 2, y + side * far) for shift in (1, -1) for side in (1, -1)),
        )
        yield from (Box(cx - width / 2, cy - half, cx + width / 2, cy + half) for cx, cy in centres)


def _cost(box: Box, taken: Iterable[Box], plot: Box) -> float:
    outside = box.width * box.height - box.overlap(plot)
    return sum(box.overlap(other) for other in taken) + 4 * outside


# ------------------------------------------------------------------------------------------------------------- layers

LAYERS_WH = (936, 220)
LAYERS = Box(56, 84, 918, 204)
NAMED_LAYERS = 24
"""Bars that are drawn; the rest of the layers is one more bar."""


class Bar(NamedTuple):
    """A layer, its share of the whole squared error, and whether it is INT8 in the file."""

    name: str
    share: float
    is_int8: bool = True


def layers(bars: Sequence[Bar]) -> str:
    """Bars from the worst layer to the best; those in float are hollow."""
    drawn, rest = list(bars[:NAMED_LAYERS]), bars[NAMED_LAYERS:]
    if rest:
        drawn.append(Bar("others", sum(bar.share for bar in rest)))
    ticker = optional("matplotlib.ticker", "matplotlib")
    with _drawing():
        figure, axes = _axes(LAYERS_WH, LAYERS)
        own, paper = colour("int8"), colour("paper")
        fills = [own if bar.is_int8 else paper for bar in drawn]
        axes.bar(range(len(drawn)), [bar.share for bar in drawn], 0.7, color=fills, edgecolor=own, linewidth=1.5)
        axes.set_xlim(-0.6, len(drawn) - 0.4)
        axes.yaxis.set_major_locator(ticker.MaxNLocator(4, steps=ROUND))
        axes.yaxis.set_major_formatter(ticker.PercentFormatter(1, decimals=0))
        axes.grid(axis="y", color=colour("line"), linewidth=1)
        axes.tick_params(left=False, bottom=False, labelcolor=colour("faint"))
        axes.set_xticks([])
        for place, bar in enumerate(drawn):
            text = {"rotation": 60, "ha": "right", "va": "top", "rotation_mode": "anchor", "parse_math": False}
            figure.text(
                (LAYERS.left + (place + 0.7) / (len(drawn) + 0.2) * LAYERS.width) / LAYERS_WH[0],
                (LAYERS.bottom - 6) / LAYERS_WH[1],
                bar.name,
                color=colour("soft"),
                gid="class:label",
                **text,
            )
        return _svg(figure, "Share of the squared error of INT8 that each layer causes")


# ------------------------------------------------------------------------------------------------------------- curves

CURVE_WH = (260, 96)
CURVE = Box(4, 8, 256, 88)


def curve(points: Sequence[tuple[float, float]], kind: str, title: str, marked: float | None = None) -> str:
    """A line of (x, y) in the colour `kind`; `marked` is the x of the point that gets a dot, by default the last."""
    x, y = zip(*points, strict=True)
    dot = next((point for point in points if point[0] == marked), points[-1])
    with _drawing():
        figure, axes = _axes(CURVE_WH, CURVE)
        axes.set_axis_off()
        axes.set_xlim(*_ends(x))
        axes.set_ylim(*_ends(y))
        axes.axhline(_ends(y)[0], color=colour("line"), linewidth=1)
        base = _ends(y)[0]
        axes.fill([x[0], *x, x[-1]], [base, *y, base], facecolor=colour(kind), alpha=0.1)
        axes.plot(x, y, color=colour(kind), linewidth=2)
        _mark(axes, dot, 3.5, facecolor=colour(kind))
        return _svg(figure, title)


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)
