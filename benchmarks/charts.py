"""Pictures of a report as SVG text, by hand: no plotting library on the device, and equal input gives equal bytes.

Colours are classes and CSS variables of the page, so a picture follows its dark and light dress. Axes carry the class
`axis`: their ticks are the only numbers of a page that are not in the report.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from itertools import pairwise
from typing import NamedTuple

LETTER_PX = 7.8
"""Width of an average letter of a bold 12.5 px label in DejaVu Sans, the widest of the usual fonts."""
LABEL_PX = 16.0
LOG_FROM = 4.0
"""A latency axis is logarithmic from this ratio of its ends."""


class Box(NamedTuple):
    """A rectangle in picture pixels."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area, px²."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0.0) * max(height, 0.0)


class Scale(NamedTuple):
    """Maps values to pixels."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (
            (math.log(v) for v in (self.low, self.high, value)) if self.log else (self.low, self.high, value)
        )
        return self.start + (self.end - self.start) * (at - low) / (high - low)


# ------------------------------------------------------------------------------------------------------------- Pareto


class Point(NamedTuple):
    """One measured file: `x` its median and `x_high` the tail of its latency (ms), `y` its mAP."""

    label: str
    x: float
    x_high: float
    y: float
    kind: str
    """CSS class of the colour."""
    teacher: bool = False
    kept: bool = True


PLOT = Box(76, 18, 918, 372)
PICTURE_WH = (936, 428)
MARK_PX = 7.0
FEWEST_POINTS = 2
FEWEST_TICKS = 3


def pareto(points: Sequence[Point]) -> str:
    """Scatter of mAP over latency, with the front of files that no kept file beats in both; "" below two points."""
    if len(points) < FEWEST_POINTS:
        return ""
    x, y = _latency_scale(points), _accuracy_scale(points)
    places = [(x(point.x), y(point.y)) for point in points]
    tails = [x(point.x_high) for point in points]
    best = front(points)
    crossed = _beads([(x(point.x), y(point.y)) for point in best])
    labels = place_labels([point.label for point in points], places, tails, crossed, PLOT)
    parts = [
        *_axes(x, y),
        _front_line(best, x, y),
        *(_whisker(place, tail, point.kind) for point, place, tail in zip(points, places, tails, strict=True)),
        *(_mark(point, place) for point, place in zip(points, places, strict=True)),
        *(_label(*each) for each in zip((point.label for point in points), labels, places, tails, strict=True)),
    ]
    return _svg(PICTURE_WH, parts, "Accuracy against latency of every measured file")


def front(points: Sequence[Point]) -> list[Point]:
    """The kept points that no kept point beats in latency and accuracy at once, from fast to accurate."""
    ordered = sorted((point for point in points if point.kept), key=lambda point: (point.x, -point.y))
    best, chosen = -math.inf, []
    for point in ordered:
        if point.y > best:
            best = point.y
            chosen.append(point)
    return chosen


def _latency_scale(points: Sequence[Point]) -> Scale:
    low, high = min(point.x for point in points), max(point.x_high for point in points)
    if high / low > LOG_FROM:
        return Scale(low / 1.25, high * 1.25, PLOT.left, PLOT.right, log=True)
    room = 0.15 * (high - low) or 0.1 * high
    return Scale(max(low - room, 0.0), high + room, PLOT.left, PLOT.right)


def _accuracy_scale(points: Sequence[Point]) -> Scale:
    low, high = min(point.y for point in points), max(point.y for point in points)
    room = max(0.18 * (high - low), 0.01)
    return Scale(max(low - room, 0.0), high + room, PLOT.bottom, PLOT.top)


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """At most about `most` round numbers from low to high, by steps of 1, 2 or 5."""
    raw = (high - low) / most
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [index * step for index in range(first, last + 1)]


def log_ticks(low: float, high: float) -> list[float]:
    """1, 2, 5, 10, 20 ... from low to high; even steps where these are too few to read by."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found = [value for power in decades for factor in (1, 2, 5) if low <= (value := factor * 10.0**power) <= high]
    return found if len(found) >= FEWEST_TICKS else ticks(low, high)


def _axes(x: Scale, y: Scale) -> Iterator[str]:
    yield '<g class="axis" aria-hidden="true">'
    for value in ticks(y.low, y.high, 5):
        at = y(value)
        yield f'<line class="grid" x1="{PLOT.left}" x2="{PLOT.right}" y1="{at:.1f}" y2="{at:.1f}"/>'
        yield f'<text x="{PLOT.left - 10}" y="{at + 4:.1f}" text-anchor="end">{value:.3g}</text>'
    for value in log_ticks(x.low, x.high) if x.log else ticks(x.low, x.high, 8):
        at = x(value)
        yield f'<line class="grid" x1="{at:.1f}" x2="{at:.1f}" y1="{PLOT.top}" y2="{PLOT.bottom}"/>'
        yield f'<text x="{at:.1f}" y="{PLOT.bottom + 20}" text-anchor="middle">{value:g}</text>'
    yield "</g>"
    scale = ", logarithmic" if x.log else ""
    yield (
        f'<text class="title" x="{(PLOT.left + PLOT.right) / 2}" y="{PLOT.bottom + 46}" text-anchor="middle">'
        f"Latency, frame to boxes (ms{scale}) → slower</text>"
    )
    middle = (PLOT.top + PLOT.bottom) / 2
    yield (
        f'<text class="title" x="14" y="{middle}" text-anchor="middle" transform="rotate(-90 14 {middle})">'
        "mAP50-95 → better</text>"
    )


def _front_line(points: Sequence[Point], x: Scale, y: Scale) -> str:
    path = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in points)
    return f'<polyline class="front" points="{path}"/>'


def _whisker(place: tuple[float, float], tail: float, kind: str) -> str:
    (left, at), cap = place, 4
    if tail - left < MARK_PX:
        return ""
    return (
        f'<path class="whisker {kind}" d="M{left:.1f} {at:.1f}H{tail:.1f}M{tail:.1f} {at - cap:.1f}V{at + cap:.1f}"/>'
    )


def _mark(point: Point, place: tuple[float, float]) -> str:
    (left, top), size = place, MARK_PX
    shown = f"mark {point.kind}" + ("" if point.kept else " refused")
    if point.teacher:
        corners = ((left, top - size - 1), (left + size + 1, top), (left, top + size + 1), (left - size - 1, top))
        return f'<polygon class="{shown}" points="{" ".join(f"{a:.1f},{b:.1f}" for a, b in corners)}"/>'
    return f'<circle class="{shown}" cx="{left:.1f}" cy="{top:.1f}" r="{size}"/>'


def _label(text: str, box: Box, place: tuple[float, float], tail: float) -> str:
    """The text, with a thin line to its mark where it stands away from mark and whisker."""
    left, middle = box.left, (box.top + box.bottom) / 2
    near = (min(max(place[0], box.left), box.right), min(max(place[1], box.top), box.bottom))
    own = (min(max(near[0], place[0]), tail), place[1])
    leader = ""
    if math.dist(own, near) > 3 * MARK_PX:
        ends = "L".join(f"{x:.1f} {y:.1f}" for x, y in (place, near))
        leader = f'<path class="leader" d="M{ends}"/>'
    return f'{leader}<text class="label" x="{left:.1f}" y="{middle + 4.5:.1f}">{escape(text)}</text>'


def _beads(corners: Sequence[tuple[float, float]]) -> list[Box]:
    """Small boxes along a line, which keep labels off it."""
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

    Greedy from the top of the picture: the first free place of ever wider circles of candidates.
    """
    taken = [Box(px - 10, py - 9, max(px + 10, tail + 4), py + 9) for (px, py), tail in zip(places, tails, strict=True)]
    taken += avoid
    boxes: dict[int, Box] = {}
    for index in sorted(range(len(texts)), key=lambda i: (places[i][1], places[i][0])):
        width = LETTER_PX * len(texts[index])
        candidates = list(_around(places[index], tails[index], width))
        costs = [_cost(box, taken, plot) for box in candidates]
        boxes[index] = candidates[costs.index(min(costs))]
        taken.append(boxes[index])
    return [boxes[index] for index in range(len(texts))]


def _around(place: tuple[float, float], tail: float, width: float) -> Iterator[Box]:
    """Candidates: above, below, right of the whisker, left; then the same ever farther away."""
    (x, y), half = place, LABEL_PX / 2
    for step in range(8):
        far = 11 + half + step * 13
        centres = (
            *((x, y - far), (x, y + far)),
            *((tail + 10 + width / 2, y + side * step * 13) for side in (-1, 1)),
            *((x - 14 - width / 2, y + side * step * 13) for side in (-1, 1)),
            *((x + shift * width / 2, y + side * far) for shift in (1, -1) for side in (-1, 1)),
        )
        yield from (Box(cx - width / 2, cy - half, cx + width / 2, cy + half) for cx, cy in centres)


def _cost(box: Box, taken: Iterable[Box], plot: Box) -> float:
    inside = box.overlap(plot)
    area = (box.right - box.left) * (box.bottom - box.top)
    return sum(box.overlap(other) for other in taken) + 4 * (area - inside)


# --------------------------------------------------------------------------------------------------- bars and curves


class Part(NamedTuple):
    """One piece of a stacked bar."""

    kind: str
    value: float


BAR_WH = (620, 18)


def stacked_bar(parts: Sequence[Part], whole: float, title: str) -> str:
    """A bar of pieces side by side; `whole` is the value of the full width."""
    width, height = BAR_WH
    starts = [sum(part.value for part in parts[:index]) for index in range(len(parts))]
    pieces = [
        f'<rect class="{part.kind}" x="{width * start / whole:.2f}" y="0" '
        f'width="{max(width * part.value / whole, 0.5):.2f}" height="{height}"/>'
        for part, start in zip(parts, starts, strict=True)
    ]
    return _svg(BAR_WH, pieces, title, stretch=True)


CURVE_WH = (260, 96)
CURVE = Box(4, 8, 256, 88)


def curve(points: Sequence[tuple[float, float]], kind: str, title: str, marked: float | None = None) -> str:
    """A line of (x, y); `marked` is the x of the point that gets a dot."""
    (low_x, high_x), (low_y, high_y) = (_ends([point[axis] for point in points]) for axis in (0, 1))
    x, y = Scale(low_x, high_x, CURVE.left, CURVE.right), Scale(low_y, high_y, CURVE.bottom, CURVE.top)
    path = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    area = f"{x(points[0][0]):.1f},{CURVE.bottom} {path} {x(points[-1][0]):.1f},{CURVE.bottom}"
    dots = [(a, b) for a, b in points if a == marked] or points[-1:]
    return _svg(
        CURVE_WH,
        [
            f'<line class="grid" x1="0" x2="{CURVE_WH[0]}" y1="{CURVE.bottom}" y2="{CURVE.bottom}"/>',
            f'<polygon class="area {kind}" points="{area}"/>',
            f'<polyline class="curve {kind}" points="{path}"/>',
            *(f'<circle class="dot {kind}" cx="{x(a):.1f}" cy="{y(b):.1f}" r="3.5"/>' for a, b in dots),
        ],
        title,
    )


def _ends(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _svg(size_wh: tuple[float, float], parts: Iterable[str], title: str, *, stretch: bool = False) -> str:
    width, height = size_wh
    fit = ' preserveAspectRatio="none"' if stretch else ""
    head = f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{escape(title, quote=True)}"{fit}>'
    return head + "".join(parts) + "</svg>"
