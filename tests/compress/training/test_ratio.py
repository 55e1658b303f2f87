from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.losses.distill import Outputs
from compress.losses.gradients import limited, squared_norms
from compress.training.objective import Objective, own_views
from compress.training.ratio import LossWeights, is_due
from compress.training.teacher import Teacher, build_losses

from . import toys


def test_the_first_measurement_sets_the_weights_to_the_shares() -> None:
    ratio = LossWeights([None, None], [1.0, 0.3])
    ratio.update(torch.tensor(2.0), torch.tensor([4.0, 0.01]))
    torch.testing.assert_close(ratio.weights, torch.tensor([0.5, 60.0]))
    torch.testing.assert_close(ratio.measured, torch.tensor([1.0, 0.3]))


def test_later_measurements_are_followed_slowly_and_never_by_more_than_a_factor() -> None:
    ratio = LossWeights([None], [1.0])
    ratio.update(torch.tensor(1.0), torch.tensor([1.0]))
    ratio.update(torch.tensor(1e6), torch.tensor([1.0]))
    assert float(ratio.weights) == pytest.approx(2.0)  # half of the way to 4, in logarithms


def test_weights_arrive_where_the_gradient_has_its_share() -> None:
    ratio = LossWeights([None], [0.3])
    for _ in range(60):
        ratio.update(torch.tensor(5.0), torch.tensor([0.02]))
    torch.testing.assert_close(ratio.weights * 0.02 / 5.0, torch.tensor([0.3]))


@pytest.mark.parametrize("norms", [[float("nan"), 1.0], [0.0, 1.0], [float("inf"), 1.0]])
def test_a_measurement_that_is_not_finite_moves_only_the_other_weights(norms: list[float]) -> None:
    ratio = LossWeights([None, None], [0.5, 0.5])
    ratio.update(torch.tensor(3.0), torch.tensor(norms))
    assert ratio.weights.tolist() == [1.0, 1.5]


def test_shares_that_would_outweigh_the_labels_are_scaled_down_together() -> None:
    assert limited([1.0, 0.3]) == [1.0, 0.3]
    assert limited([2.0, 1.0]) == [1.0, 0.5]


def test_a_measurement_that_is_not_finite_does_not_delay_the_other_weights() -> None:
    ratio = LossWeights([None, None], [0.5, 0.5])
    for norm in (float("nan"), float("nan"), 1.0):
        ratio.update(torch.tensor([1.0, 1.0]), torch.tensor([1.0, norm]))
    assert ratio.count.tolist() == [3, 1]
    assert ratio.weights.tolist() == [0.5, 0.5]  # the first sound one sets a weight at once


def test_each_level_of_a_loss_gets_its_share_of_the_labels_gradient_at_its_own_map() -> None:
    ratio = LossWeights([None, None], [1.0, 0.3], [1, 3])
    label, own = torch.tensor([9.0, 4.0, 1.0]), torch.tensor([[1.0, 1.0, 2.0], [4.0, 1.0, 0.25]])
    ratio.follow(label, own)
    head, levels = ratio.of_losses()
    torch.testing.assert_close(head, torch.tensor([14.0 / 4.0]).sqrt())
    torch.testing.assert_close(levels * own[1].sqrt() / label.sqrt(), torch.full((3,), 0.3))
    torch.testing.assert_close(ratio.measured, torch.tensor([1.0, 0.3]))  # one share a loss


def test_a_level_without_a_gradient_does_not_stop_the_others() -> None:
    ratio = LossWeights([None], [0.3], [3])
    ratio.follow(torch.ones(3), torch.tensor([[1.0, 0.0, 4.0]]))
    torch.testing.assert_close(ratio.weights, torch.tensor([0.3, 1.0, 0.15]))
    assert ratio.count.tolist() == [1, 0, 1]


def test_norms_are_those_of_autograd_and_no_gradient_is_left() -> None:
    weight = torch.ones(3, requires_grad=True)
    maps = [weight * 2, weight * 3]
    losses = [(maps[0] ** 2).sum(), maps[1].sum()]
    norms = torch.stack([squared_norms(loss, maps) for loss in losses])
    torch.testing.assert_close(norms, torch.tensor([[48.0, 0.0], [0.0, 3.0]]))
    assert squared_norms(torch.ones(()), maps).tolist() == [0.0, 0.0]
    assert weight.grad is None
    sum(losses).backward()  # the graph is still there


def test_a_view_of_a_map_has_only_the_gradient_of_its_reader() -> None:
    """The neck makes each map of the one before it."""
    finest = torch.ones(3, requires_grad=True)
    maps = [finest, 2 * finest]
    seen = own_views(Outputs([], maps)).features
    total = seen[0].sum() + 5 * seen[1].sum()
    assert squared_norms(total, seen).tolist() == [3.0, 75.0]
    assert squared_norms(total, maps).tolist() == [3 * 11.0**2, 75.0]


@pytest.mark.parametrize("upstream", [None, 2.0**16])
def test_small_gradients_in_float16_are_measured_as_large_as_they_are_trained(upstream: float | None) -> None:
    settings = toys.config(losses={"pkd": "auto"})
    losses = build_losses(toys.network(), Teacher(toys.network("n"), "cpu"), settings)
    made = Objective(toys.network(), torch.nn.Identity(), losses)
    features = [torch.ones(1, 1, 100, 100, dtype=torch.float16, requires_grad=True) for _ in range(3)]
    label, loss = (factor * torch.stack([f.float().mean() for f in features]) for factor in (1.0, 1e-5))
    scale = None if upstream is None else torch.tensor(upstream)
    outputs = Outputs([], features)
    made._measure(label.sum(), [loss], outputs, outputs, scale)
    expected = 1.0 if upstream is None else 0.3e5  # without it the gradient of 1e-9 is 0, and nothing moves
    torch.testing.assert_close(made.weights.weights, torch.full((3,), expected), rtol=0.02, atol=0)


def test_weights_survive_in_the_state_dict() -> None:
    ratio = LossWeights([None, None], [1.0, 0.3])
    ratio.update(torch.tensor(2.0), torch.tensor([4.0, 0.01]))
    other = LossWeights([None, None], [1.0, 0.3])
    other.load_state_dict(ratio.state_dict())
    for module in (ratio, other):
        module.update(torch.tensor(1.0), torch.tensor([3.0, 0.2]))
    assert torch.equal(ratio.weights, other.weights)


def test_measurements_are_dense_at_the_start_and_rare_later() -> None:
    assert [i for i in range(160) if is_due(i)] == [0, 1, 2, 4, 8, 16, 32, 50, 100, 150]


def test_one_training_step_gives_every_level_its_share(tmp_path: Path) -> None:
    made = toys.trainer(toys.config(losses={"soft": "auto", "feat_mse": "auto"}), tmp_path, distils=True)
    made.wrapped.train()
    images, targets, *_ = toys.batch(0)
    student = made.objective.student_outputs(images.float() / 255)
    with torch.no_grad():
        teacher = made.teacher_outputs(images.float() / 255)
    made.objective.loss(student, teacher, targets, [], None, True)
    label = squared_norms(made.objective.detection(student.raw, targets)[0] / len(images), student.features)
    _, weights = made.objective.weights.of_losses()
    seen = own_views(student)
    loss = made.objective.losses["feat_mse"](seen, teacher)
    for level, (weight, part) in enumerate(zip(weights, loss, strict=True)):
        own = squared_norms(weight * part, seen.features)
        assert (own[level] / label[level]).sqrt().item() == pytest.approx(0.3, rel=1e-3)
        assert not own[[other for other in range(3) if other != level]].any()
    assert made.objective.weights.measured.tolist() == pytest.approx([1.0, 0.3], rel=1e-3)


def test_a_fixed_weight_stays_and_its_share_is_measured() -> None:
    weights = LossWeights([0.2, None], [1.0, 0.3])
    weights.update(torch.tensor(2.0), torch.tensor([5.0, 0.1]))
    torch.testing.assert_close(weights.weights, torch.tensor([0.2, 6.0]))
    torch.testing.assert_close(weights.measured, torch.tensor([0.5, 0.3]))
