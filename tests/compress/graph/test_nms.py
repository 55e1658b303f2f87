"""Unrolled Cluster-NMS against greedy NMS."""

from __future__ import annotations

import numpy as np
import pytest

from compress.graph.nms import cluster_nms
from runtime.boxes import nms


def scene(seed: int, count: int = 300) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Boxes around a few centres, best first."""
    rng = np.random.default_rng(seed)
    centres = rng.uniform(50, 590, (rng.integers(2, 40), 2))
    middle = centres[rng.integers(0, len(centres), count)] + rng.normal(0, 8, (count, 2))
    half = rng.uniform(10, 60, (count, 2))
    boxes = np.concatenate([middle - half, middle + half], 1).astype(np.float32)
    return boxes, np.sort(rng.random(count).astype(np.float32))[::-1], rng.integers(0, 3, count)


def test_eight_iterations_equal_greedy_nms():
    for seed in range(20):
        boxes, scores, classes = scene(seed)
        greedy = nms(boxes, scores, classes, iou=0.6, max_det=len(boxes))
        assert np.flatnonzero(cluster_nms(boxes, classes, 0.6, 8)).tolist() == greedy.tolist()


def test_too_few_iterations_are_noticed():
    differing = 0
    for seed in range(20):
        boxes, scores, classes = scene(seed)
        greedy = nms(boxes, scores, classes, iou=0.6, max_det=len(boxes))
        differing += set(np.flatnonzero(cluster_nms(boxes, classes, 0.6, 1))) != set(greedy)
    assert differing > 0


@pytest.mark.parametrize("iterations", [1, 2, 3])
def test_a_chain_needs_as_many_iterations_as_it_has_suppressions(iterations):
    """Each box overlaps only its neighbour, so greedy keeps every second one."""
    boxes = np.asarray([[10.0 * i, 0, 10.0 * i + 40, 10] for i in range(6)], np.float32)
    keep = cluster_nms(boxes, np.zeros(6), 0.5, iterations)
    assert keep[: iterations + 1].tolist() == [i % 2 == 0 for i in range(iterations + 1)]


def test_other_classes_never_suppress():
    boxes = np.zeros((4, 4), np.float32) + np.asarray([0, 0, 10, 10], np.float32)
    assert cluster_nms(boxes, np.asarray([0, 1, 2, 0]), 0.5, 8).tolist() == [True, True, True, False]
