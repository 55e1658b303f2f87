"""Metal parts of the demo set as solids in part coordinates: length 1, origin in the middle, x along the part.

Every function draws its variation from the given generator and returns a `Part`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Outline = NDArray[np.float64]
"""(n, 2) x y of a closed polygon, in part lengths."""


class Solid(NamedTuple):
    """A prism with rounded edges: `top` is its height and `bevel` the radius of its edge, in part lengths."""

    outline: Outline
    holes: tuple[Outline, ...]
    top: float
    bevel: float


class Thread(NamedTuple):
    """Ridges across x between `start` and `end`; `lean` is the slant in x per y."""

    start: float
    end: float
    pitch: float
    lean: float


class Part(NamedTuple):
    solids: tuple[Solid, ...]
    thread: Thread | None = None
    relative_size: float = 1.0
    """Length of this part; a bolt has length 1."""


def bolt(rng: np.random.Generator) -> Part:
    """A hexagon bolt from the side: faceted head, shank threaded to its blunt end."""
    half, head = rng.uniform(0.075, 0.095), rng.uniform(0.15, 0.2)
    head_half = half * rng.uniform(2.0, 2.3)
    facet = head_half * 0.52
    shank = Solid(_box(-0.5 + head, 0.5, -half, half, chamfer=0.03), (), 0.02, half)
    cap = Solid(_box(-0.5, -0.5 + head, -head_half, head_half, chamfer=0.03), (), 0.1, 0.03)
    ridge = Solid(_box(-0.5, -0.5 + head, -facet, facet, chamfer=0.01), (), 0.14, 0.025)
    start = -0.5 + head + rng.uniform(0.02, 0.25)
    return Part((shank, cap, ridge), Thread(start, 0.5, rng.uniform(0.045, 0.06), 0.25))


def screw(rng: np.random.Generator) -> Part:
    """A wood screw from the side: conical head, coarse slanted thread, sharp tip."""
    half, head_half, head = rng.uniform(0.055, 0.07), rng.uniform(0.15, 0.18), rng.uniform(0.1, 0.13)
    cone = np.array([(-0.5, -head_half), (-0.5, head_half), (-0.5 + head, half), (-0.5 + head, -half)])
    tip = rng.uniform(0.15, 0.22)
    x0 = -0.52 + head
    shank = np.array([(x0, -half), (0.5 - tip, -half), (0.5, -0.005), (0.5, 0.005), (0.5 - tip, half), (x0, half)])
    solids = (Solid(shank, (), 0.01, half), Solid(cone, (), 0.05, 0.06))
    return Part(solids, Thread(-0.5 + head + rng.uniform(0.05, 0.2), 0.5, rng.uniform(0.075, 0.095), 0.55), 0.92)


def nut(rng: np.random.Generator) -> Part:
    """A hexagon nut from above, with a step of thread inside the hole."""
    bore = rng.uniform(0.23, 0.27)
    body = Solid(_circle(0.5, 6), (_circle(bore + 0.045),), 0.2, 0.06)
    rim = Solid(_circle(bore + 0.05), (_circle(bore),), 0.08, 0.02)
    return Part((body, rim), relative_size=rng.uniform(0.5, 0.6))


def washer(rng: np.random.Generator) -> Part:
    """A thin flat ring."""
    return Part((Solid(_circle(0.5), (_circle(rng.uniform(0.25, 0.31)),), 0.04, 0.03),), relative_size=0.55)


def gear(rng: np.random.Generator) -> Part:
    """A spur gear from above: toothed rim, recessed web with or without openings, raised hub with a bore."""
    teeth, bore = int(rng.integers(11, 18)), _circle(rng.uniform(0.07, 0.1))
    rim = Solid(_toothed(teeth, 0.5, rng.uniform(0.4, 0.42)), (_circle(0.33),), 0.14, 0.02)
    openings = _ring_of_holes(int(rng.integers(3, 6)), 0.245, 0.06) if rng.random() < 0.6 else ()
    web = Solid(_circle(0.34), (bore, *openings), 0.05, 0.01)
    hub = Solid(_circle(0.17), (bore,), 0.16, 0.025)
    return Part((rim, web, hub), relative_size=rng.uniform(0.8, 0.95))


def bracket(rng: np.random.Generator) -> Part:
    """An angle bracket cut from sheet: an L with rounded corners and three holes."""
    arm, reach, hole = rng.uniform(0.2, 0.25), rng.uniform(0.28, 0.36), rng.uniform(0.045, 0.06)
    left, bottom = -0.5, -reach
    corners = [(left, bottom), (0.5, bottom), (0.5, bottom + arm), (left + arm, bottom + arm), (left + arm, reach)]
    outline = np.array([*corners, (left, reach)])
    spots = ((0.5 - arm / 2, bottom + arm / 2), (left + arm / 2, reach - arm / 2), (left + arm / 2, bottom + arm / 2))
    holes = tuple(_circle(hole) + spot for spot in spots)
    return Part((Solid(outline, holes, 0.04, 0.015),), relative_size=rng.uniform(0.8, 0.95))


PARTS: dict[str, Callable[[np.random.Generator], Part]] = {
    "bolt": bolt,
    "nut": nut,
    "washer": washer,
    "gear": gear,
    "screw": screw,
    "bracket": bracket,
}
"""Class name to part; the order is that of the class ids."""


def _circle(radius: float, corners: int = 48) -> Outline:
    angles = np.arange(corners) * 2 * np.pi / corners
    return radius * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _box(x0: float, x1: float, y0: float, y1: float, chamfer: float) -> Outline:
    c = chamfer
    return np.array(
        [(x0 + c, y0), (x1 - c, y0), (x1, y0 + c), (x1, y1 - c), (x1 - c, y1), (x0 + c, y1), (x0, y1 - c), (x0, y0 + c)]
    )


def _toothed(teeth: int, tip: float, root: float) -> Outline:
    """Trapezoidal teeth: each takes its pitch as root, flank, tip, flank."""
    steps = np.arange(teeth)[:, None] + np.array([0.0, 0.3, 0.42, 0.78, 0.9])
    radii = np.tile([root, root, tip, tip, root], teeth)
    angles = steps.ravel() * 2 * np.pi / teeth
    return radii[:, None] * np.stack([np.cos(angles), np.sin(angles)], axis=1)


def _ring_of_holes(count: int, distance: float, radius: float) -> tuple[Outline, ...]:
    return tuple(_circle(radius, 20) + centre for centre in _circle(distance, count))
