"""Which images and which losses take part, by labels and their weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from compress.losses.distill import Outputs
from compress.training.teacher import Teacher, distillation
from runtime.errors import UsageError

from .toys import batch, config, network

pytestmark = pytest.mark.usefixtures("one_thread")


def made(*, has_labels: bool = True, **changes: Any) -> Any:
    settings = config(**{"losses": {"soft": "auto", "feat_mse": "auto"}} | changes)
    return distillation(network(), Teacher(network("n", seed=1), "cpu"), settings, has_labels=has_labels).eval()


def images(size: int = 4) -> torch.Tensor:
    return batch(0, size).images / 255


def outputs(x: torch.Tensor) -> Outputs:
    with torch.no_grad():
        return Outputs(*network("n", seed=1).eval().forward_features(x))


def test_the_label_loss_of_the_first_images_is_that_of_a_batch_of_them() -> None:
    objective, x, targets = made(), images(), batch(0, 2).targets
    raw = objective.student_outputs(x).raw
    total, parts = objective.label_loss(raw, targets, 2)
    alone, alone_parts = objective.label_loss([level[:2] for level in raw], targets)
    assert torch.equal(total, alone)
    torch.testing.assert_close(parts, alone_parts / 2)


def test_an_unlabelled_image_gets_no_gradient_from_the_labels() -> None:
    objective, x = made(), images()
    raw = [level.detach().requires_grad_() for level in objective.student_outputs(x).raw]
    objective.label_loss(raw, batch(0, 2).targets, 2)[0].backward()
    for level in raw:
        assert level.grad is not None
        assert level.grad[:2].any()
        assert not level.grad[2:].any()


def test_a_batch_without_labels_has_no_label_loss_and_keeps_a_gradient() -> None:
    objective = made()
    total, parts = objective.label_loss(objective.student_outputs(images()).raw, torch.zeros(0, 6), 0)
    assert (total.item(), parts.tolist()) == (0, [0, 0, 0])
    total.backward()
    assert not objective.model.detect.m[0].bias.grad.any()


def test_labels_of_weight_0_are_the_reference_and_are_not_trained_on() -> None:
    x, targets = images(), batch(0).targets
    whole, none = made(), made(label_weight=0)
    teacher = outputs(x)
    terms = [objective(x, targets, teacher, measure=True).terms for objective in (whole, none)]
    torch.testing.assert_close(none.weights.weights, whole.weights.weights)
    torch.testing.assert_close(none.weights.measured, torch.tensor([1.0, 0.3]))
    assert terms[1][:3].tolist() == [0, 0, 0]
    torch.testing.assert_close(terms[1][3:], terms[0][3:])


def test_without_labels_the_head_loss_keeps_its_share_as_weight_and_the_others_follow_it() -> None:
    objective, x = made(has_labels=False, strategy="label_free", unlabelled="x"), images()
    for number in range(3):
        objective(x * (number + 1) / 3, torch.zeros(0, 6), outputs(x), measure=True, labelled=0)
    assert objective.reference == "soft"
    assert objective.weights.weights[0] == 1
    torch.testing.assert_close(objective.weights.measured, torch.tensor([1.0, 0.3]), rtol=0.5, atol=0)


def test_a_fraction_of_the_labels_is_that_fraction_of_their_loss() -> None:
    x, targets, teacher = images(), batch(0).targets, outputs(images())
    whole, half = (made(label_weight=weight)(x, targets, teacher).terms for weight in (1.0, 0.5))
    torch.testing.assert_close(half, torch.cat([0.5 * whole[:3], whole[3:]]))
    alone = [made(label_weight=weight, losses={})(x, targets) for weight in (1.0, 0.5)]
    assert torch.equal(alone[1].total, 0.5 * alone[0].total)
    assert torch.equal(alone[1].terms, 0.5 * alone[0].terms)


def test_the_terms_of_a_half_labelled_batch_add_up() -> None:
    total, terms = made()(images(), batch(0, 2).targets, outputs(images()), labelled=2)
    assert total.item() == pytest.approx(4 * terms.sum().item(), rel=1e-5)


def test_the_soft_loss_sees_which_images_are_labelled() -> None:
    sure, unsure = (made(unsure=value, losses={"soft": 1.0}) for value in (0.0, 1.0))
    x, teacher = images(), outputs(images())
    a, b = (objective(x, batch(0, 2).targets, teacher, labelled=2).terms[3] for objective in (sure, unsure))
    assert b < a


def test_a_loss_that_reads_labels_is_refused_where_there_are_none() -> None:
    with pytest.raises(UsageError, match=r"loss fgd needs the labels, which some images lack\. Leave it out"):
        made(has_labels=False, label_weight=0, losses={"soft": "auto", "fgd": "auto"})
