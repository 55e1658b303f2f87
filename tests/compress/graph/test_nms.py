"""NMS in rounds against greedy NMS."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest

from compress.graph.nms import BLOCK, cluster_nms, nms_in_rounds, rounds_of
from runtime.boxes import nms

Scene = tuple[np.ndarray, np.ndarray, np.ndarray]


def scene(seed: int, count: int = 300, centres: int = 0) -> Scene:
    """Boxes around a few centres, best first."""
    rng = np.random.default_rng(seed)
    places = rng.uniform(50, 590, (centres or rng.integers(2, 40), 2))
    middle = places[rng.integers(0, len(places), count)] + rng.normal(0, 8, (count, 2))
    half = rng.uniform(10, 60, (count, 2))
    boxes = np.concatenate([middle - half, middle + half], 1).astype(np.float32)
    return boxes, np.sort(rng.random(count).astype(np.float32))[::-1], rng.integers(0, 3, count)


def crowd(objects: int, duplicates: int) -> Scene:
    """Objects apart from each other, each found by `duplicates` rows that score a little less one after the other."""
    corner = np.stack([np.arange(objects) % 25 * 25.0, np.arange(objects) // 25 * 25.0], 1)
    boxes = np.repeat(np.concatenate([corner, corner + 20], 1), duplicates, axis=0)
    boxes[:, 2:] += np.tile(np.linspace(0, 2, duplicates), objects)[:, None]
    best = np.random.default_rng(0).permutation(np.linspace(0.5, 0.95, objects))
    scores = (best[:, None] - np.linspace(0, 0.2, duplicates)).ravel().astype(np.float32)
    order = np.argsort(-scores, kind="stable")
    return boxes[order].astype(np.float32), scores[order], np.zeros(len(order), np.int64)


def greedy(boxes: np.ndarray, scores: np.ndarray, classes: np.ndarray, max_det: int) -> list[int]:
    return nms(boxes, scores, classes, iou=0.6, max_det=max_det).tolist()


@pytest.mark.parametrize("count", [40, 192, 300, 1024])
def test_eight_iterations_equal_greedy_nms_where_there_is_room(count):
    for seed in range(20):
        boxes, scores, classes = scene(seed, count)
        kept = nms_in_rounds(boxes, scores, classes, iou=0.6, iterations=8, max_det=300)
        above = scores > kept.cutoff
        assert [i for i in kept.rows if above[i]] == [i for i in greedy(boxes, scores, classes, 300) if above[i]]


def test_duplicates_of_good_boxes_do_not_take_the_place_of_other_objects():
    """100 objects of ten rows each: the rounds decide on 574 rows, and as many of the best rows lack objects."""
    boxes, scores, classes = crowd(100, 10)
    kept = nms_in_rounds(boxes, scores, classes, iou=0.6, iterations=8, max_det=300)
    wanted = greedy(boxes, scores, classes, 300)
    decided = sum(step.block for step in rounds_of(1000, 300))
    assert len(wanted) == 100 > sum(row < decided for row in wanted)
    assert kept.rows[scores[kept.rows] > kept.cutoff].tolist() == wanted


@pytest.mark.parametrize(("objects", "max_det"), [(600, 300), (100, 40)], ids=["too many rows pass", "max_det is full"])
def test_the_cutoff_is_the_best_score_that_was_left_out(objects, max_det):
    boxes, scores, classes = crowd(objects, 1)
    kept = nms_in_rounds(boxes, scores, classes, iou=0.6, iterations=8, max_det=max_det)
    left_out = np.setdiff1d(np.arange(objects), kept.rows)
    assert 0.3 < kept.cutoff == scores[left_out].max()


@pytest.mark.parametrize("count", [1, BLOCK, BLOCK + 1, 320, 1024, 3839])
@pytest.mark.parametrize("max_det", [1, 300, 1000, 5000])
def test_rounds_shrink_and_decide_on_enough_rows(count, max_det):
    plan = rounds_of(count, max_det)
    assert plan[0].length == count
    assert sum(step.block for step in plan) >= min(count, max_det)
    assert all(step.block == min(step.length, BLOCK) for step in plan)
    assert all(before.length - before.block >= after.length for before, after in pairwise(plan))
    assert plan[-1].length == plan[-1].block


def test_too_few_iterations_are_noticed():
    differing = 0
    for seed in range(20):
        boxes, scores, classes = scene(seed, BLOCK)
        differing += np.flatnonzero(cluster_nms(boxes, classes, 0.6, 1)).tolist() != greedy(
            boxes, scores, classes, BLOCK
        )
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
