"""Augmentation as pure functions of random numbers; `draw_plan` draws all of them for (seed, epoch, index).

Images are uint8 BGR (H, W, 3). Boxes are float32 rows [class, x1, y1, x2, y2] in pixels. The geometry follows
YOLOv5 v7.0: mosaic on a canvas of twice the size, then one affine or perspective warp, HSV, flips.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import cv2
import numpy as np
from numpy.typing import NDArray

from compress.config import AugmentConfig
from runtime.image import LETTERBOX_FILL, Image, letterbox

Boxes = NDArray[np.float32]
Load = Callable[[int], tuple[Image, Boxes]]
"""Index of an image -> the image, its longest side `size`, and its boxes in its own pixels."""

MIN_SIDE_PX = 2.0
MIN_AREA_LEFT = 0.10
MAX_ASPECT = 100.0
EDGE = 1e-3
"""Normalised boxes end this many pixels before the right and bottom border."""
MIXUP_BETA = 32.0
FILL = (LETTERBOX_FILL,) * 3


class Warp(NamedTuple):
    """Drawn numbers of one warp: perspective in 1/px, angles in degrees, translation as share of the output."""

    perspective_x: float = 0.0
    perspective_y: float = 0.0
    angle: float = 0.0
    scale: float = 1.0
    shear_x: float = 0.0
    shear_y: float = 0.0
    translate_x: float = 0.5
    translate_y: float = 0.5


class Mosaic(NamedTuple):
    """The point at which four images meet on the canvas, and the images: top left and right, bottom left and right."""

    centre_xy: tuple[int, int]
    indices: tuple[int, int, int, int]
    warp: Warp


class Mixup(NamedTuple):
    mosaic: Mosaic
    share: float


class AugmentPlan(NamedTuple):
    """Every random decision for one training item. Without `mosaic` the image is letterboxed and takes `warp`."""

    mosaic: Mosaic | None
    mixup: Mixup | None
    warp: Warp
    hsv: tuple[float, float, float]
    flip_ud: bool
    flip_lr: bool


def draw_plan(
    config: AugmentConfig, *, seed: int, epoch: int, index: int, count: int, imgsz: int, mosaic: bool = True
) -> AugmentPlan:
    """The plan of item `index` of `count` in `epoch`: the same numbers on every machine, worker and resume."""
    rng = np.random.default_rng([seed % 2**64, epoch, index])
    use_mosaic, use_mixup = rng.random(2) < (config.mosaic, config.mixup)
    use_mosaic = use_mosaic and mosaic
    flip_ud, flip_lr = rng.random(2) < (config.flipud, config.fliplr)
    hue, saturation, value = 1 + rng.uniform(-1, 1, 3) * (config.hsv_h, config.hsv_s, config.hsv_v)
    warp = draw_warp(rng, config)
    first = draw_mosaic(rng, config, index, count, imgsz) if use_mosaic else None
    second = _draw_mixup(rng, config, count, imgsz) if use_mosaic and use_mixup else None
    return AugmentPlan(first, second, warp, (float(hue), float(saturation), float(value)), bool(flip_ud), bool(flip_lr))


def draw_warp(rng: np.random.Generator, config: AugmentConfig) -> Warp:
    """Every field of `Warp` uniformly around its neutral value."""
    c = config
    reach = (c.perspective, c.perspective, c.degrees, c.scale, c.shear, c.shear, c.translate, c.translate)
    return Warp(*(np.array(Warp()) + rng.uniform(-1, 1, 8) * reach).tolist())


def draw_mosaic(rng: np.random.Generator, config: AugmentConfig, index: int, count: int, imgsz: int) -> Mosaic:
    centre_y, centre_x = rng.uniform(imgsz / 2, imgsz * 3 / 2, 2)
    indices = rng.permutation([index, *rng.integers(0, count, 3)])
    return Mosaic((int(centre_x), int(centre_y)), tuple(indices.tolist()), draw_warp(rng, config))


def _draw_mixup(rng: np.random.Generator, config: AugmentConfig, count: int, imgsz: int) -> Mixup:
    index = int(rng.integers(0, count))
    return Mixup(draw_mosaic(rng, config, index, count, imgsz), float(rng.beta(MIXUP_BETA, MIXUP_BETA)))


def apply_plan(plan: AugmentPlan, load: Load, index: int, size: int) -> tuple[Image, NDArray[np.float32]]:
    """Image `index` as `plan` says: (size, size, 3) BGR and labels (n, 5) [class, cx, cy, w, h] normalised."""
    image, boxes = compose(plan, load, index, size)
    image = jitter_hsv(image, plan.hsv)
    return flip(image, to_normalised(boxes, size, size), up_down=plan.flip_ud, left_right=plan.flip_lr)


def compose(plan: AugmentPlan, load: Load, index: int, size: int) -> tuple[Image, Boxes]:
    """The geometry of `apply_plan` alone: mosaic, mixup and warp; boxes in pixels of the (size, size) image."""
    if plan.mosaic is None:
        image, boxes = load(index)
        framed = letterbox(image, (size, size))
        boxes[:, 1:] *= framed.gain
        return _warped(framed.image, shift_boxes(boxes, *framed.pad_wh), plan.warp, size)
    image, boxes = _mosaic_of(plan.mosaic, load, size)
    if plan.mixup is None:
        return image, boxes
    return mix(image, boxes, *_mosaic_of(plan.mixup.mosaic, load, size), plan.mixup.share)


def _mosaic_of(plan: Mosaic, load: Load, size: int) -> tuple[Image, Boxes]:
    images, boxes = zip(*(load(index) for index in plan.indices), strict=True)
    return _warped(*mosaic(images, boxes, plan.centre_xy, size), plan.warp, size)


def _warped(image: Image, boxes: Boxes, warp: Warp, size: int) -> tuple[Image, Boxes]:
    out_hw = (size, size)
    matrix = warp_matrix(warp, (image.shape[0], image.shape[1]), out_hw)
    return warp_image(image, matrix, out_hw), warp_boxes(boxes, matrix, out_hw, warp.scale)


def mosaic(
    images: Sequence[Image], boxes: Sequence[Boxes], centre_xy: tuple[int, int], size: int
) -> tuple[Image, Boxes]:
    """Four images around `centre_xy` on a (2 size, 2 size) canvas, each touching the centre with its own corner.

    `boxes` are in pixels of their image; those returned are in canvas pixels, clipped to the canvas.
    """
    canvas = np.full((2 * size, 2 * size, 3), LETTERBOX_FILL, np.uint8)
    placed: list[Boxes] = []
    for quadrant, (image, own) in enumerate(zip(images, boxes, strict=True)):
        left, top = _mosaic_offset(quadrant, image.shape[:2], centre_xy)
        _paste(canvas, image, left, top)
        placed.append(shift_boxes(own, left, top))
    together = np.concatenate(placed)
    np.clip(together[:, 1:], 0, 2 * size, out=together[:, 1:])
    return canvas, together


def _mosaic_offset(quadrant: int, size_hw: tuple[int, ...], centre_xy: tuple[int, int]) -> tuple[int, int]:
    """Canvas position (x, y) of an image's top left corner; it may be outside the canvas."""
    x, y = centre_xy
    return (x if quadrant % 2 else x - size_hw[1]), (y if quadrant >= 2 else y - size_hw[0])


def _paste(canvas: Image, image: Image, left: int, top: int) -> None:
    height, width = canvas.shape[:2]
    x0, y0 = max(left, 0), max(top, 0)
    x1, y1 = min(left + image.shape[1], width), min(top + image.shape[0], height)
    canvas[y0:y1, x0:x1] = image[y0 - top : y1 - top, x0 - left : x1 - left]


def warp_matrix(warp: Warp, in_hw: tuple[int, int], out_hw: tuple[int, int]) -> NDArray[np.float64]:
    """M (3, 3) float64 = translation · shear · (rotation and scale) · perspective · centring."""
    centring, perspective, shear, translation = (np.eye(3) for _ in range(4))
    centring[:2, 2] = -in_hw[1] / 2, -in_hw[0] / 2
    perspective[2, :2] = warp.perspective_x, warp.perspective_y
    shear[0, 1], shear[1, 0] = math.tan(math.radians(warp.shear_x)), math.tan(math.radians(warp.shear_y))
    translation[:2, 2] = warp.translate_x * out_hw[1], warp.translate_y * out_hw[0]
    return translation @ shear @ _rotation(warp.angle, warp.scale) @ perspective @ centring


def _rotation(angle: float, scale: float) -> NDArray[np.float64]:
    """Counter-clockwise degrees on screen, y pointing down: OpenCV's convention."""
    cos, sin = math.cos(math.radians(angle)) * scale, math.sin(math.radians(angle)) * scale
    return np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])


def warp_image(image: Image, matrix: NDArray[np.float64], out_hw: tuple[int, int]) -> Image:
    """`image` transformed by `matrix`, bilinear; pixels from outside it are 114."""
    if image.shape[:2] == tuple(out_hw) and np.array_equal(matrix, np.eye(3)):
        return image
    size_wh = (out_hw[1], out_hw[0])
    if np.array_equal(matrix[2], (0.0, 0.0, 1.0)):
        return np.asarray(cv2.warpAffine(image, matrix[:2], dsize=size_wh, borderValue=FILL), np.uint8)
    return np.asarray(cv2.warpPerspective(image, matrix, dsize=size_wh, borderValue=FILL), np.uint8)


def warp_boxes(boxes: Boxes, matrix: NDArray[np.float64], out_hw: tuple[int, int], scale: float) -> Boxes:
    """Axis-aligned bounds of the warped corners, clipped to the output, without those now too small or thin.

    `scale` is that of the warp: a box is judged by the share of its area that is still inside. A box that reaches
    across the horizon of a perspective is left out: its corners do not bound its image.
    """
    corners = _warped_corners(boxes[:, 1:], matrix)
    is_across = corners[..., 2].min(1) * corners[..., 2].max(1) <= 0
    boxes, points = boxes[~is_across], corners[~is_across, :, :2] / corners[~is_across, :, 2:]
    hulls = np.concatenate([points.min(1), points.max(1)], axis=1).astype(np.float32)
    np.clip(hulls[:, 0::2], 0, out_hw[1], out=hulls[:, 0::2])
    np.clip(hulls[:, 1::2], 0, out_hw[0], out=hulls[:, 1::2])
    keep = _worth_keeping(boxes[:, 1:] * scale, hulls)
    return np.concatenate([boxes[keep, :1], hulls[keep]], axis=1, dtype=np.float32)


def _warped_corners(boxes_xyxy: NDArray[np.float32], matrix: NDArray[np.float64]) -> NDArray[np.float64]:
    """(n, 4, 3): the corners of boxes (n, 4) in homogeneous coordinates."""
    corners = np.ones((len(boxes_xyxy) * 4, 3))
    corners[:, :2] = boxes_xyxy[:, [0, 1, 2, 3, 0, 3, 2, 1]].reshape(-1, 2)
    return (corners @ matrix.T).reshape(-1, 4, 3)


def _worth_keeping(before: NDArray[np.float32], after: NDArray[np.float32]) -> NDArray[np.bool_]:
    eps = 1e-16
    w0, h0 = (before[:, 2:] - before[:, :2]).T
    w1, h1 = (after[:, 2:] - after[:, :2]).T
    aspect = np.maximum(w1 / (h1 + eps), h1 / (w1 + eps))
    left = w1 * h1 / (w0 * h0 + eps)
    return (w1 > MIN_SIDE_PX) & (h1 > MIN_SIDE_PX) & (left > MIN_AREA_LEFT) & (aspect < MAX_ASPECT)


def jitter_hsv(image: Image, gains: tuple[float, float, float]) -> Image:
    """Hue, saturation and value times `gains`, in OpenCV's 8-bit HSV (hue 0..179), truncated."""
    if gains == (1.0, 1.0, 1.0):
        return image
    ramp = np.arange(256, dtype=np.float64)
    tables = np.stack([(ramp * gains[0]) % 180, *(np.clip(ramp * gain, 0, 255) for gain in gains[1:])], axis=-1)
    hsv = cv2.LUT(cv2.cvtColor(image, cv2.COLOR_BGR2HSV), tables.astype(np.uint8)[None])
    return np.asarray(cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR), np.uint8)


def mix(image: Image, boxes: Boxes, other: Image, other_boxes: Boxes, share: float) -> tuple[Image, Boxes]:
    """`share` of `image` and the rest of `other`, truncated to uint8; boxes of both, unweighted."""
    blended = (image * share + other * (1 - share)).astype(np.uint8)
    return blended, np.concatenate([boxes, other_boxes])


def shift_boxes(boxes: Boxes, x: float, y: float) -> Boxes:
    return boxes + np.array([0, x, y, x, y], np.float32)


def to_pixels(labels: NDArray[np.float32], width: float, height: float, x: float = 0.0, y: float = 0.0) -> Boxes:
    """Normalised [class, cx, cy, w, h] as pixel boxes of an image of that size whose corner is at (x, y)."""
    boxes = labels.copy()
    half = labels[:, 3:5] / 2
    boxes[:, 1:3] = (labels[:, 1:3] - half) * (width, height) + (x, y)
    boxes[:, 3:5] = (labels[:, 1:3] + half) * (width, height) + (x, y)
    return boxes


def to_normalised(boxes: Boxes, width: int, height: int) -> NDArray[np.float32]:
    """The reverse of `to_pixels`, clipped to the image less `EDGE`."""
    clipped = boxes.copy()
    np.clip(clipped[:, 1::2], 0, width - EDGE, out=clipped[:, 1::2])
    np.clip(clipped[:, 2::2], 0, height - EDGE, out=clipped[:, 2::2])
    labels = clipped.copy()
    labels[:, 1:3] = (clipped[:, 1:3] + clipped[:, 3:5]) / 2 / (width, height)
    labels[:, 3:5] = (clipped[:, 3:5] - clipped[:, 1:3]) / (width, height)
    return labels


def flip(
    image: Image, labels: NDArray[np.float32], *, up_down: bool, left_right: bool
) -> tuple[Image, NDArray[np.float32]]:
    """Mirrored image and normalised labels."""
    mirrored = labels.copy()
    if up_down:
        image, mirrored[:, 2] = np.asarray(cv2.flip(image, 0), np.uint8), 1 - mirrored[:, 2]
    if left_right:
        image, mirrored[:, 1] = np.asarray(cv2.flip(image, 1), np.uint8), 1 - mirrored[:, 1]
    return image, mirrored
