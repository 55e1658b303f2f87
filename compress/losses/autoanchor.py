"""Measure how well anchors fit the labels, and evolve better anchors if they do not fit.

In: widths and heights of labels in pixels, as the network sees them. Out: anchors in pixels.
The rules are those of YOLOv5 v7.0.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.cluster.vq import kmeans

Sizes = NDArray[np.floating]
"""(n, 2) width and height in pixels."""

GOOD_RECALL = 0.98
"""Anchors that match more than this share of the labels are kept as they are."""
MIN_SIDE_PX = 2.0
GENERATIONS = 1000
RESTARTS = 30
LABELS_AT_MOST = 10_000
"""Evolution looks at a random draw of this many labels (0.5 ms per generation); decisions look at all."""


class AnchorFit(NamedTuple):
    """How well anchors match labels, at one `anchor_t`."""

    recall: float
    """Best possible recall: share of labels that at least one anchor matches."""
    matches: float
    """Anchors above threshold per label, mean."""
    fitness: float
    """Mean over labels of the best ratio if it passes the threshold, else 0."""


class AnchorChoice(NamedTuple):
    """The decision: `anchors_px` (nl, na, 2) are the ones to use."""

    anchors_px: NDArray[np.float32]
    before: AnchorFit
    after: AnchorFit
    replaced: bool


def scaled_sizes(
    labels_wh: Sequence[Sizes], sizes_hw: Sequence[tuple[int, int]], imgsz: int, rng: np.random.Generator | None = None
) -> NDArray[np.float32]:
    """All labels' sizes in pixels of images whose longest side is `imgsz`.

    Args:
        labels_wh: per image (n, 2) widths and heights as fractions of the image.
        sizes_hw: per image height and width.
        imgsz: pixels of the longest side.
        rng: scales each image by U(0.9, 1.1) as training will; None scales none.
    """
    factors = np.ones(len(labels_wh)) if rng is None else rng.uniform(0.9, 1.1, len(labels_wh))
    scaled = [
        wh * (np.array((width, height)) * (factor * imgsz / max(height, width)))
        for wh, (height, width), factor in zip(labels_wh, sizes_hw, factors, strict=True)
    ]
    return np.concatenate([np.zeros((0, 2)), *scaled]).astype(np.float32)


def _ratios(wh_px: Sizes, anchors_px: Sizes) -> NDArray[np.floating]:
    """(n, k) the worse side's min(r, 1/r), r = label / anchor: 1 is a perfect fit."""
    ratio = wh_px[:, None] / anchors_px[None]
    return np.minimum(ratio, 1 / ratio).min(2)


def _fitness(wh_px: Sizes, anchors_px: Sizes, anchor_t: float) -> float:
    best = _ratios(wh_px, anchors_px).max(1)
    return float(np.where(best > 1 / anchor_t, best, 0).mean())


def measure(wh_px: Sizes, anchors_px: Sizes, anchor_t: float = 4.0) -> AnchorFit:
    """The fit of anchors (k, 2) to labels (n, 2), n > 0, both in pixels with positive sides."""
    ratios = _ratios(wh_px, anchors_px)
    passes = ratios > 1 / anchor_t
    return AnchorFit(
        recall=float(passes.any(1).mean()),
        matches=float(passes.sum(1).mean()),
        fitness=_fitness(wh_px, anchors_px, anchor_t),
    )


def _cluster(wh_px: Sizes, count: int, rng: np.random.Generator) -> Sizes:
    """The best of several k-means, each axis in units of its spread; random sizes if labels are too alike.

    Distances are taken between logarithms, because the fitness compares ratios: on COCO128 that ends at fitness 0.696,
    while plain pixels, as in YOLOv5, end at 0.64 to 0.67. Starting points are drawn here: SciPy's own seeding has
    changed its name and its meaning between versions.
    """
    logs = np.log(wh_px)
    spread = logs.std(0)
    distinct = np.unique(logs, axis=0)
    if len(distinct) >= count and spread.all():
        starts = (rng.choice(distinct, count, replace=False) / spread for _ in range(RESTARTS))
        centres, _ = min((kmeans(logs / spread, start) for start in starts), key=lambda found: found[1])
        if len(centres) == count:
            return np.maximum(np.exp(centres * spread), MIN_SIDE_PX)
    return rng.uniform(MIN_SIDE_PX, max(2 * MIN_SIDE_PX, wh_px.max()), (count, 2))


def _mutated(anchors_px: Sizes, rng: np.random.Generator) -> Sizes:
    strength = 0.1 * rng.random()
    change = rng.standard_normal(anchors_px.shape) * (rng.random(anchors_px.shape) < 0.9)
    return np.maximum(anchors_px * np.clip(1 + strength * change, 0.3, 3.0), MIN_SIDE_PX)


def evolve(
    wh_px: Sizes, count: int, *, rng: np.random.Generator, anchor_t: float = 4.0, generations: int = GENERATIONS
) -> NDArray[np.float32]:
    """`count` anchors (count, 2) in pixels for labels (n, 2): k-means, then mutations that raise the fitness.

    Sorted by area. Labels under 2 px on both sides take no part; all others need positive sides. The same state of
    `rng` gives the same anchors.
    """
    usable = wh_px[(wh_px >= MIN_SIDE_PX).any(1)]
    if len(usable) > LABELS_AT_MOST:
        usable = rng.choice(usable, LABELS_AT_MOST, replace=False)
    usable = (usable if len(usable) else np.full((1, 2), MIN_SIDE_PX)).astype(np.float32)
    anchors = _cluster(usable, count, rng).astype(np.float32)
    best = _fitness(usable, anchors, anchor_t)
    for _ in range(generations):
        mutated = _mutated(anchors, rng).astype(np.float32)
        fitness = _fitness(usable, mutated, anchor_t)
        if fitness > best:
            anchors, best = mutated, fitness
    return anchors[np.argsort(anchors.prod(1))]


def choose_anchors(
    wh_px: Sizes, anchors_px: Sizes, *, rng: np.random.Generator, anchor_t: float = 4.0, generations: int = GENERATIONS
) -> AnchorChoice:
    """Keep anchors whose recall is above 0.98; else evolve new ones and take them if their recall is greater.

    Args:
        wh_px: (n, 2) labels in pixels at the training size; labels without area are ignored.
        anchors_px: (nl, na, 2), finest level first, as the result is.
        rng: source of every draw.
        anchor_t: greatest ratio of sides that the loss accepts, exclusive.
        generations: mutations to try.
    """
    current = np.asarray(anchors_px, np.float32)
    flat = current.reshape(-1, 2)
    wh_px = wh_px[(wh_px > 0).all(1)]
    if not len(wh_px):
        unknown = AnchorFit(1.0, 0.0, 0.0)
        return AnchorChoice(current, unknown, unknown, False)
    before = measure(wh_px, flat, anchor_t)
    if before.recall > GOOD_RECALL:
        return AnchorChoice(current, before, before, False)
    evolved = evolve(wh_px, len(flat), rng=rng, anchor_t=anchor_t, generations=generations)
    after = measure(wh_px, evolved, anchor_t)
    if after.recall > before.recall:
        return AnchorChoice(evolved.reshape(current.shape), before, after, True)
    return AnchorChoice(current, before, before, False)
