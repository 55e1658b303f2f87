"""An image of a conveyor belt with metal parts, and a tight box around the visible portion of each.

Parts are height fields lit by one lamp: bevels and threads get their highlights from the same direction in which the
shadows fall. All randomness comes from the generator that is passed in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from compress.data.demo.belt_parts import PARTS, Outline, Part

Field = NDArray[np.float32]
"""(H, W) or (H, W, 3) float32; colours are BGR with 1 for white."""

OVERSAMPLING = 2
MIN_VISIBLE = 0.45
"""Least share of a part that stays visible when later ones cover it or the frame cuts it."""
MIN_BOX_PX = 6
PLACEMENT_TRIES = 8


class Material(NamedTuple):
    albedo_bgr: tuple[float, float, float]
    gloss: float
    sharpness: float


MATERIALS = (
    Material((0.62, 0.61, 0.60), 0.75, 30.0),  # steel
    Material((0.78, 0.76, 0.73), 0.60, 18.0),  # zinc
    Material((0.35, 0.62, 0.78), 0.65, 26.0),  # brass
    Material((0.50, 0.60, 0.74), 0.45, 16.0),  # yellow passivated
)


class Lamp(NamedTuple):
    """Direction towards the lamp (x right, y down, z up), its tint, and the share of light from everywhere."""

    direction: NDArray[np.float32]
    tint_bgr: NDArray[np.float32]
    ambient: float


class Rendered(NamedTuple):
    """A part ready to be laid down: colour (h, w, 3), coverage (h, w) 0..1, and its top left corner in the image."""

    colour: Field
    coverage: Field
    left: int
    top: int


@dataclass(frozen=True)
class Scene:
    """image uint8 (H, W, 3) BGR; boxes float32 (n, 5) [class, x1, y1, x2, y2] px; part_ids int16 (H, W), 0 for belt.

    Row k of `boxes` belongs to the value `ids[k]` of `part_ids`.
    """

    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    part_ids: NDArray[np.int16]
    ids: tuple[int, ...]


def draw_scene(rng: np.random.Generator, size_hw: tuple[int, int]) -> Scene:
    """A belt with four to nine parts on it, seen from above."""
    lamp = _draw_lamp(rng)
    image, free_rows = _belt(rng, size_hw)
    part_ids = np.zeros(size_hw, np.int16)
    classes: dict[int, int] = {}
    areas = [0]
    for _ in range(int(rng.integers(4, 10))):
        class_id = int(rng.integers(len(PARTS)))
        part = list(PARTS.values())[class_id](rng)
        placed = _place(rng, part, part_ids, areas, free_rows, lamp)
        if placed is not None:
            areas.append(_area(placed))
            classes[len(classes) + 1] = class_id
            _lay_down(image, part_ids, placed, len(classes), lamp)
    return _finish(rng, image, part_ids, classes)


def _finish(rng: np.random.Generator, image: Field, part_ids: NDArray[np.int16], classes: dict[int, int]) -> Scene:
    boxes = {part: _box(part_ids, part) for part in classes}
    kept = [part for part, box in boxes.items() if min(box[2] - box[0], box[3] - box[1]) >= MIN_BOX_PX]
    rows = np.array([(classes[part], *boxes[part]) for part in kept], np.float32).reshape(-1, 5)
    return Scene(_photograph(rng, image), rows, part_ids, tuple(kept))


def _box(part_ids: NDArray[np.int16], part: int) -> tuple[int, int, int, int]:
    """x1 y1 x2 y2 of the visible pixels, right and bottom exclusive."""
    mask = part_ids == part
    ys, xs = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(xs[0]), int(ys[0]), int(xs[-1]) + 1, int(ys[-1]) + 1


def _draw_lamp(rng: np.random.Generator) -> Lamp:
    azimuth, height = rng.uniform(0, 2 * np.pi), rng.uniform(0.9, 1.6)
    direction = np.array([np.cos(azimuth), np.sin(azimuth), height], np.float32)
    warmth = rng.uniform(-0.06, 0.06)
    tint = np.array([1 - warmth, 1.0, 1 + warmth], np.float32)
    return Lamp(direction / np.linalg.norm(direction), tint, rng.uniform(0.3, 0.45))


# --- parts -----------------------------------------------------------------------------------------------------------


def _place(
    rng: np.random.Generator,
    part: Part,
    part_ids: NDArray[np.int16],
    areas: list[int],
    free_rows: tuple[int, int],
    lamp: Lamp,
) -> Rendered | None:
    """The part at a random pose on the belt at which it does not hide too much of another; None if no try succeeded."""
    height, width = part_ids.shape
    length = min(height, width) * rng.uniform(0.22, 0.32) * part.relative_size
    rendered = _render(rng, part, length, rng.uniform(0, 2 * np.pi), lamp)
    side = rendered.coverage.shape[0]
    low, high = (row + reach for row, reach in zip(free_rows, _reaches(length, free_rows, height), strict=True))
    for _ in range(PLACEMENT_TRIES):
        x, y = rng.uniform(0.2 * length, width - 0.2 * length), rng.uniform(low, high)
        moved = rendered._replace(left=round(x - side / 2), top=round(y - side / 2))
        if _leaves_enough(moved, part_ids, areas):
            return moved
    return None


def _reaches(length: float, free_rows: tuple[int, int], height: int) -> tuple[float, float]:
    """Least distances of a part's centre from both ends of the belt: the frame may cut a part, a rail may not."""
    at_frame, at_rail = 0.2 * length, 0.55 * length
    return (at_rail if free_rows[0] else at_frame), -(at_rail if free_rows[1] < height else at_frame)


def _area(placed: Rendered) -> int:
    """Pixels of the whole part, in the frame or not."""
    return int((placed.coverage > 0.5).sum())


def _leaves_enough(placed: Rendered, part_ids: NDArray[np.int16], areas: list[int]) -> bool:
    """True if the new part and all that it covers keep `MIN_VISIBLE` of their area in sight."""
    image, own = _overlap(placed, part_ids.shape)
    mask = placed.coverage[own] > 0.5
    before = np.bincount(part_ids.ravel(), minlength=len(areas))
    covered = np.bincount(part_ids[image][mask], minlength=len(areas))
    needed = MIN_VISIBLE * np.array(areas)
    touched = covered > 0
    touched[0] = False
    return bool(mask.sum() >= MIN_VISIBLE * _area(placed) and np.all((before - covered >= needed)[touched]))


def _overlap(placed: Rendered, size_hw: tuple[int, ...]) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
    """The window of the image that the part touches, and the same window in the part."""
    y0, x0 = max(placed.top, 0), max(placed.left, 0)
    y1 = max(y0, min(placed.top + placed.coverage.shape[0], size_hw[0]))
    x1 = max(x0, min(placed.left + placed.coverage.shape[1], size_hw[1]))
    own = slice(y0 - placed.top, y1 - placed.top), slice(x0 - placed.left, x1 - placed.left)
    return (slice(y0, y1), slice(x0, x1)), own


def _lay_down(image: Field, part_ids: NDArray[np.int16], placed: Rendered, number: int, lamp: Lamp) -> None:
    _cast_shadow(image, placed, lamp)
    window, own = _overlap(placed, image.shape[:2])
    alpha = placed.coverage[own][..., None]
    image[window] += alpha * (placed.colour[own] - image[window])
    part_ids[window][placed.coverage[own] > 0.5] = number


def _cast_shadow(image: Field, placed: Rendered, lamp: Lamp) -> None:
    reach = 0.045 * placed.coverage.shape[0]
    pad = int(2 * reach) + 3
    shadow = cv2.copyMakeBorder(placed.coverage, pad, pad, pad, pad, cv2.BORDER_CONSTANT, value=0.0)
    dx, dy = -lamp.direction[:2] / lamp.direction[2] * reach * 1.5
    matrix = np.array([[1, 0, dx], [0, 1, dy]], np.float64)
    shadow = cv2.warpAffine(shadow, matrix, dsize=shadow.shape[::-1], borderValue=0.0)
    shadow = cv2.GaussianBlur(shadow, (0, 0), 0.6 + reach * 0.35)
    soft = placed._replace(coverage=np.asarray(shadow, np.float32), left=placed.left - pad, top=placed.top - pad)
    window, own = _overlap(soft, image.shape[:2])
    image[window] *= 1 - 0.62 * soft.coverage[own][..., None]


def _render(rng: np.random.Generator, part: Part, length: float, angle: float, lamp: Lamp) -> Rendered:
    """The part at `length` px and `angle` rad in the middle of a square patch."""
    side = int(length * 1.25) + 8
    unit = length * OVERSAMPLING
    height, mask = _height_field(part, unit, angle, side * OVERSAMPLING)
    material = MATERIALS[rng.integers(len(MATERIALS))]
    colour = _shade(rng, height, material, lamp, angle)
    size_wh = (side, side)
    return Rendered(
        np.asarray(cv2.resize(colour, size_wh, interpolation=cv2.INTER_AREA), np.float32),
        np.asarray(cv2.resize(mask, size_wh, interpolation=cv2.INTER_AREA), np.float32),
        0,
        0,
    )


def _height_field(part: Part, unit: float, angle: float, side: int) -> tuple[Field, Field]:
    """(side, side) height in px above the belt, and coverage 0 or 1."""
    height = np.zeros((side, side), np.float32)
    for solid in part.solids:
        mask = _fill(solid.outline, solid.holes, unit, angle, side)
        inside = cv2.distanceTransform(mask, cv2.DIST_L2, 3)
        radius = max(1.0, solid.bevel * unit)
        drop = radius - np.minimum(inside, radius)
        rounded = np.sqrt(np.maximum(radius**2 - drop**2, 0)) - 0.5 * radius
        height = np.maximum(height, np.where(mask > 0, solid.top * unit + rounded + 1.0, 0).astype(np.float32))
    covered = (height > 0).astype(np.float32)
    return height + covered * _ridges(part, unit, angle, side), covered


def _fill(outline: Outline, holes: tuple[Outline, ...], unit: float, angle: float, side: int) -> NDArray[np.uint8]:
    """Mask 0 or 1 of an outline less its holes, turned by `angle`, its origin in the middle."""
    cos, sin = np.cos(angle), np.sin(angle)
    turn = np.array([[cos, sin], [-sin, cos]]) * unit
    mask = np.zeros((side, side), np.uint8)
    for polygon, value in ((outline, 1), *((hole, 0) for hole in holes)):
        points = np.round((polygon @ turn + (side - 1) / 2) * 16).astype(np.int32)
        cv2.fillPoly(mask, [points], value, lineType=cv2.LINE_8, shift=4)
    return mask


def _ridges(part: Part, unit: float, angle: float, side: int) -> Field | float:
    """Height of the thread in px, if there is one."""
    if part.thread is None:
        return 0.0
    start, end, pitch, lean = part.thread
    steps = (np.arange(side, dtype=np.float32) - (side - 1) / 2) / unit
    x = steps[None] * np.cos(angle) + steps[:, None] * np.sin(angle)
    y = -steps[None] * np.sin(angle) + steps[:, None] * np.cos(angle)
    wave = np.sin((x + lean * y) * (2 * np.pi / pitch)) * (0.16 * pitch * unit)
    return np.where((x > start) & (x < end), wave, 0).astype(np.float32)


def _shade(rng: np.random.Generator, height: Field, material: Material, lamp: Lamp, angle: float) -> Field:
    """Colour (h, w, 3) of a height field: diffuse light, one highlight, and a soft reflection of the surroundings."""
    normal = _normals(height)
    diffuse = np.maximum(_along(normal, lamp.direction), 0)
    halfway = lamp.direction + np.array([0, 0, 1], np.float32)
    gleam = cv2.pow(np.maximum(_along(normal, halfway / np.linalg.norm(halfway)), 0), material.sharpness)
    band = 0.16 * np.sin(normal[0] * 3.1 + normal[1] * 2.3 + np.float32(rng.uniform(0, 6.28)))
    grain = _brushed(rng, height.shape, angle) + _sheen(rng, height.shape)
    body = np.float32(lamp.ambient) + np.float32(1 - lamp.ambient) * diffuse + band + grain
    mirrored = np.float32(material.gloss * 0.7) * np.asarray(gleam, np.float32)
    tinted = [
        (body * np.float32(albedo) + mirrored) * tint
        for albedo, tint in zip(material.albedo_bgr, lamp.tint_bgr, strict=True)
    ]
    return np.asarray(cv2.merge(tinted), np.float32)


def _normals(height: Field) -> tuple[Field, Field, Field]:
    """x, y and z (h, w) of unit normals. Slopes are limited, because a vertical wall would give only noise."""
    slope_x: Any = np.clip(cv2.Scharr(height, cv2.CV_32F, 1, 0) / 32, -2.5, 2.5)
    slope_y: Any = np.clip(cv2.Scharr(height, cv2.CV_32F, 0, 1) / 32, -2.5, 2.5)
    up = 1 / np.sqrt(slope_x**2 + slope_y**2 + 1)
    return -slope_x * up, -slope_y * up, up


def _along(normal: tuple[Field, Field, Field], direction: NDArray[np.float32]) -> Field:
    """Cosine of the angle between normals and a unit direction."""
    return normal[0] * direction[0] + normal[1] * direction[1] + normal[2] * direction[2]


def _brushed(rng: np.random.Generator, size_hw: tuple[int, ...], angle: float) -> Field:
    """Fine streaks along the part."""
    noise = rng.standard_normal(size_hw, dtype=np.float32)
    return np.asarray(cv2.filter2D(noise, -1, _line(15, angle)), np.float32) * 0.06


def _sheen(rng: np.random.Generator, size_hw: tuple[int, ...]) -> Field:
    """The lamp's reflection on a flat face: brighter towards one side of the part."""
    towards, strength = rng.uniform(0, 2 * np.pi), rng.uniform(0.1, 0.35)
    ys, xs = (np.linspace(-1, 1, side, dtype=np.float32) for side in size_hw)
    return np.asarray(strength * (xs[None] * np.cos(towards) + ys[:, None] * np.sin(towards)), np.float32)


def _line(length: int, angle: float) -> NDArray[np.float32]:
    """A normalised kernel (k, k) that averages along a line of `length` px at `angle` rad."""
    size = length | 1
    kernel = np.zeros((size, size), np.float32)
    middle, reach = size // 2, np.array([np.cos(angle), np.sin(angle)]) * (length - 1) / 2
    ends = [tuple(int(v) for v in np.round((middle + sign * reach) * 16)) for sign in (-1, 1)]
    cv2.line(kernel, ends[0], ends[1], 1.0, 1, cv2.LINE_AA, shift=4)
    return kernel / kernel.sum()


# --- belt ------------------------------------------------------------------------------------------------------------


HAZARD_BGR = (0.08, 0.62, 0.78)
BELT_COLOURS_BGR = ((0.17, 0.17, 0.16), (0.20, 0.22, 0.16), (0.26, 0.21, 0.17), (0.15, 0.14, 0.14))


def _belt(rng: np.random.Generator, size_hw: tuple[int, int]) -> tuple[Field, tuple[int, int]]:
    """Rubber with a woven texture, wear along the direction of travel (x) and stains, half the time with a guide rail.

    Returns the image and the first and last row (exclusive) of the belt.
    """
    tone = 1 + 0.14 * _cloud(rng, size_hw, 6) + 0.08 * _cloud(rng, size_hw, 40) + _weave(rng, size_hw)
    tone += _wear(rng, size_hw)
    base = np.array(BELT_COLOURS_BGR[rng.integers(len(BELT_COLOURS_BGR))], np.float32) * rng.uniform(0.85, 1.25)
    image = np.ascontiguousarray(tone[..., None] * base, np.float32)
    return image, (_rail(rng, image) if rng.random() < 0.5 else (0, size_hw[0]))


def _cloud(rng: np.random.Generator, size_hw: tuple[int, int], cells: int) -> Field:
    """Smooth noise of unit variance with about `cells` spots along each side."""
    coarse = rng.standard_normal((cells, cells), dtype=np.float32)
    return np.asarray(cv2.resize(coarse, size_hw[::-1], interpolation=cv2.INTER_CUBIC), np.float32)


def _weave(rng: np.random.Generator, size_hw: tuple[int, int]) -> Field:
    period, strength = rng.uniform(3.5, 6.0), rng.uniform(0.02, 0.09)
    xs, ys = np.arange(size_hw[1], dtype=np.float32), np.arange(size_hw[0], dtype=np.float32)
    return np.outer(np.sin(ys * (6.283 / period)), np.sin(xs * (6.283 / period))).astype(np.float32) * np.float32(
        strength
    )


def _wear(rng: np.random.Generator, size_hw: tuple[int, int]) -> Field:
    """Scuffs along the belt and a few dark stains."""
    height, width = size_hw
    marks = np.zeros(size_hw, np.float32)
    for _ in range(int(rng.integers(2, 9))):
        x, y = rng.uniform(0, width), rng.uniform(0, height)
        end = (int(x + rng.uniform(0.1, 0.6) * width), int(y + rng.uniform(-3, 3)))
        cv2.line(marks, (int(x), int(y)), end, float(rng.uniform(0.1, 0.45)), 1, cv2.LINE_AA)
    for _ in range(int(rng.integers(0, 4))):
        centre = (int(rng.uniform(0, width)), int(rng.uniform(0, height)))
        axes = (int(width * rng.uniform(0.02, 0.1)), int(height * rng.uniform(0.02, 0.06)))
        cv2.ellipse(marks, centre, axes, float(rng.uniform(-20, 20)), 0, 360, -0.3, -1)
    return np.asarray(cv2.GaussianBlur(marks, (0, 0), 1.1), np.float32)


def _rail(rng: np.random.Generator, image: Field) -> tuple[int, int]:
    """Draw a guide rail along one edge, with the shadow it throws; returns the rows that are still belt."""
    height, width = image.shape[:2]
    depth = int(height * rng.uniform(0.04, 0.09))
    profile = 0.35 + 0.3 * np.sin(np.linspace(0.3, 2.8, depth, dtype=np.float32))
    streaks = np.repeat(rng.standard_normal((depth, 1), dtype=np.float32) * 0.03, width, axis=1)
    band = (profile[:, None] + streaks)[..., None] * np.array([1.02, 1.0, 0.98], np.float32)
    if rng.random() < 0.5:
        stripe = (np.add.outer(np.arange(depth), np.arange(width)) // max(4, depth)) % 2 == 0
        band = np.where(stripe[..., None], HAZARD_BGR, 0.07).astype(np.float32)
    at_top = rng.random() < 0.5
    image = image if at_top else image[::-1]
    image[:depth] = band
    fade = 1 - 0.5 * np.exp(-np.arange(2 * depth, dtype=np.float32) / (0.5 * depth))
    image[depth : 3 * depth] *= fade[:, None, None]
    return (depth, height) if at_top else (0, height - depth)


# --- camera ----------------------------------------------------------------------------------------------------------


GAMMA = 1.35


def _photograph(rng: np.random.Generator, image: Field) -> NDArray[np.uint8]:
    """Uneven light, motion along the belt, focus, exposure, sensor noise, gamma; uint8."""
    lit: Any = image * _light(rng, image.shape[:2])[..., None]
    if rng.random() < 0.5:
        lit = cv2.filter2D(lit, -1, _line(int(rng.integers(2, 6)), rng.uniform(-0.05, 0.05)))
    lit = cv2.GaussianBlur(lit, (0, 0), float(rng.uniform(0.4, 1.1)))
    exposed = np.maximum(lit * np.float32(rng.uniform(0.75, 1.35)), 0)
    noise = rng.standard_normal(lit.shape, dtype=np.float32) * np.sqrt(
        exposed * np.float32(0.0006) + np.float32(0.00004)
    )
    shown = cv2.pow(np.clip(exposed + noise * np.float32(rng.uniform(0.4, 1.6)), 0, 1), 1 / GAMMA)
    return np.asarray(shown * 255 + 0.5, np.uint8)


def _light(rng: np.random.Generator, size_hw: tuple[int, int]) -> Field:
    """A gradient across the image and a darker border."""
    ys, xs = (np.linspace(-1, 1, side, dtype=np.float32) for side in size_hw)
    azimuth, slope = rng.uniform(0, 2 * np.pi), rng.uniform(0.05, 0.3)
    gradient = 1 + slope * (xs[None] * np.cos(azimuth) + ys[:, None] * np.sin(azimuth))
    vignette = 1 - rng.uniform(0.05, 0.2) * (xs[None] ** 2 + ys[:, None] ** 2) / 2
    return np.asarray(gradient * vignette, np.float32)
