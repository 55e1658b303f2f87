from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compress.losses.autoanchor import choose_anchors, evolve, measure, scaled_sizes

ANCHORS_PX = np.array(
    [[[10, 13], [16, 30], [33, 23]], [[30, 61], [62, 45], [59, 119]], [[116, 90], [156, 198], [373, 326]]], np.float32
)


def _rng(seed=0):
    return np.random.default_rng(seed)


@pytest.fixture(scope="module")
def coco128_wh(shared):
    """Label sizes of COCO128 at 640, without jitter."""
    cv2 = pytest.importorskip("cv2")
    folder = shared / "data" / "coco128"
    labels, sizes = [], []
    for path in sorted(folder.glob("labels/**/*.txt")):
        image = next(folder.glob(f"images/**/{path.stem}.*"))
        sizes.append(cv2.imread(str(image)).shape[:2])
        labels.append(np.loadtxt(path, ndmin=2)[:, 3:5].reshape(-1, 2))
    return scaled_sizes(labels, sizes, 640)


def test_fit_of_the_default_anchors_to_coco128_equals_the_reference(coco128_wh, reference):
    figures = json.loads((reference / "data_reference.json").read_text())["autoanchor_c128_640_no_jitter"]
    fit = measure(coco128_wh, ANCHORS_PX.reshape(-1, 2))
    assert len(coco128_wh) == figures["n"]
    assert fit.recall == pytest.approx(figures["bpr"], abs=1e-6)
    assert fit.matches == pytest.approx(figures["aat"], abs=1e-6)
    assert fit.fitness == pytest.approx(figures["fitness_thr4"], abs=1e-5)


def test_anchors_that_fit_are_kept(coco128_wh):
    choice = choose_anchors(coco128_wh, ANCHORS_PX, rng=_rng())
    assert not choice.replaced
    assert np.array_equal(choice.anchors_px, ANCHORS_PX)


def test_anchors_that_do_not_fit_are_replaced_by_better_ones(coco128_wh):
    choice = choose_anchors(coco128_wh, ANCHORS_PX / 20, rng=_rng())
    assert choice.replaced
    assert choice.before.recall < 0.98 < choice.after.recall
    assert choice.anchors_px.shape == ANCHORS_PX.shape
    assert choice.after.fitness > measure(coco128_wh, ANCHORS_PX.reshape(-1, 2)).fitness


def test_a_choice_is_kept_when_evolution_finds_no_better_recall():
    """Labels too far apart for one anchor: the given one already answers for half of them."""
    wh = np.array([[4, 4], [400, 400]], np.float32)
    given_anchor = np.array([[[4, 4]]], np.float32)
    choice = choose_anchors(wh, given_anchor, rng=_rng(), generations=20)
    assert not choice.replaced
    assert np.array_equal(choice.anchors_px, given_anchor)


def test_the_same_seed_gives_the_same_anchors_and_another_seed_others(coco128_wh):
    first, again, other = (evolve(coco128_wh, 9, rng=_rng(seed), generations=50) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


def test_more_generations_never_fit_worse(coco128_wh):
    fitness = [
        measure(coco128_wh, evolve(coco128_wh, 9, rng=_rng(), generations=count)).fitness for count in (0, 50, 200)
    ]
    assert fitness == sorted(fitness)
    assert fitness[0] < fitness[-1]


def test_evolved_anchors_find_the_sizes_that_the_labels_have():
    sizes = np.array([[10, 20], [40, 40], [200, 90]], np.float32)
    wh = np.repeat(sizes, 50, axis=0) * _rng().uniform(0.98, 1.02, (150, 2)).astype(np.float32)
    assert evolve(wh, 3, rng=_rng()) == pytest.approx(sizes, rel=0.05)


@settings(max_examples=25, deadline=None)
@given(count=st.integers(0, 12), side=st.floats(0.01, 2000), seed=st.integers(0, 999))
def test_few_equal_or_tiny_labels_still_give_ordered_anchors_of_two_pixels_or_more(count, side, seed):
    wh = np.full((count, 2), side, np.float32)
    anchors = evolve(wh, 9, rng=_rng(seed), generations=5)
    assert anchors.shape == (9, 2)
    assert np.isfinite(anchors).all()
    assert (anchors >= 2).all()
    assert (np.diff(anchors.prod(1)) >= 0).all()


@pytest.mark.parametrize("wh", [np.zeros((0, 2)), np.array([[0.0, 5.0]])])
def test_without_labels_that_have_an_area_the_anchors_stay(wh):
    choice = choose_anchors(wh, ANCHORS_PX, rng=_rng())
    assert not choice.replaced
    assert np.array_equal(choice.anchors_px, ANCHORS_PX)


def test_sizes_are_scaled_to_the_longest_side_and_jittered_per_image():
    labels, sizes = [np.array([[0.5, 0.5], [0.1, 1.0]]), np.zeros((0, 2)), np.array([[1.0, 0.5]])], [(100, 200)] * 3
    exact = scaled_sizes(labels, sizes, 400)
    assert np.allclose(exact, [[200, 100], [40, 200], [400, 100]])
    factors = scaled_sizes(labels, sizes, 400, _rng()) / exact
    assert np.allclose(factors[0], factors[1])
    assert not np.allclose(factors[0], factors[2])
    assert ((factors > 0.9) & (factors < 1.1)).all()
