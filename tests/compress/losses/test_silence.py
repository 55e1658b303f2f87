"""A teacher that does not tell everything: logits that are NaN, and classes that it does not know."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.config import DistillConfig
from compress.losses.distill import LOSSES, Context, FeatureLoss, HeadLoss, Outputs, Shape
from compress.losses.distill.features import teacher_score
from compress.losses.distill.head import silent_at

STRIDES = (8, 16, 32)
HEADS = [name for name, loss in LOSSES.items() if issubclass(loss, HeadLoss)]
FEATURES = [name for name, loss in LOSSES.items() if issubclass(loss, FeatureLoss)]


@pytest.fixture
def shape(anchors_grid: Tensor) -> Shape:
    return Shape((4, 6, 8), 3, 3, anchors_grid, STRIDES)


def outputs(shape: Shape, seed: int, size: int = 64) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def noise(*dims: int) -> Tensor:
        return torch.randn(dims, generator=generator)

    cells = [size // stride for stride in shape.strides]
    raw = [noise(2, shape.na, n, n, 5 + shape.nc) for n in cells]
    return Outputs(raw, [noise(2, c, n, n) for c, n in zip(shape.channels, cells, strict=True)])


def background(shape: Shape, objectness: float, lacks: int | None = None) -> Outputs:
    """Outputs of one objectness everywhere; the logit at the index `lacks` is not told."""
    made = outputs(shape, 1)
    for level in made.raw:
        level[..., 4] = objectness
        if lacks is not None:
            level[..., lacks] = torch.nan
    return made


def gradients(name: str, shape: Shape, teacher: Outputs, targets: Tensor | None = None, **told: object) -> list[Tensor]:
    student = outputs(shape, 0)
    for level in student.raw:
        level.requires_grad_()
    loss = LOSSES[name](shape, shape._replace(**told))(student, teacher, Context(targets))
    assert loss.isfinite()
    loss.backward()
    return [level.grad if level.grad is not None else torch.zeros_like(level) for level in student.raw]


def is_nothing(gradient: Tensor) -> bool:
    """Whether it is zero to the rounding of p_S - p_T."""
    return bool((gradient.abs() < 1e-7).all())


@pytest.mark.parametrize("name", HEADS)
def test_a_class_that_is_not_told_gets_no_gradient_and_the_others_as_before(shape: Shape, name: str) -> None:
    teacher = outputs(shape, 1)
    for level in teacher.raw:
        level[..., 6] = torch.nan
    for level in gradients(name, shape, teacher, tells_all=False):
        assert level.isfinite().all()
        assert is_nothing(level[..., 6])
        assert level[..., 5].any()
        assert level[..., 4].any()


@pytest.mark.parametrize("name", HEADS)
def test_a_teacher_that_tells_nothing_pulls_nowhere(shape: Shape, name: str) -> None:
    teacher = outputs(shape, 1)
    for level in teacher.raw:
        level.fill_(torch.nan)
    assert all(is_nothing(level) for level in gradients(name, shape, teacher, tells_all=False))


@pytest.mark.parametrize("name", HEADS)
def test_a_loss_is_exactly_zero_for_equal_logits_where_some_are_not_told(shape: Shape, name: str) -> None:
    student, teacher = outputs(shape, 0), outputs(shape, 0)
    for level in teacher.raw:
        level[..., 5] = torch.nan
    assert float(LOSSES[name](shape, shape._replace(tells_all=False))(student, teacher)) == 0


@pytest.mark.parametrize("name", HEADS)
def test_an_object_of_an_unknown_class_is_not_pushed_to_background(shape: Shape, name: str) -> None:
    """In the middle of the first image lies an object of class 1, which the teacher does not know."""
    teacher = background(shape, -9.0, lacks=6)
    targets = torch.tensor([[0, 1, 0.5, 0.5, 0.2, 0.2], [1, 0, 0.5, 0.5, 0.2, 0.2]])
    fine = gradients(name, shape, teacher, targets, unknown=(1,), tells_all=False)[0]
    assert is_nothing(fine[0, :, 3:5, 3:5])
    assert fine[0, :, 0, 0, 4].all()
    assert fine[1, :, 3:5, 3:5, 4].all()


def unlabelled_gradients(name: str, shape: Shape, teacher: Outputs, unsure: float, **told: object) -> list[Tensor]:
    """At objectness, where only the first of the two images has labels."""
    student = outputs(shape, 0)
    for level in student.raw:
        level.requires_grad_()
    config = DistillConfig(unsure=unsure)
    loss = LOSSES[name](shape, shape._replace(**told), config)(student, teacher, Context(torch.zeros(0, 6), labelled=1))
    loss.backward()
    return [level.grad[..., 4] for level in student.raw]


@pytest.mark.parametrize("name", HEADS)
def test_an_unlabelled_image_teaches_no_background_where_the_teacher_is_sure_of_no_object(
    shape: Shape, name: str
) -> None:
    teacher = background(shape, -3.0)
    for labelled, unlabelled in unlabelled_gradients(name, shape, teacher, 0.5):
        assert labelled.all()
        assert is_nothing(unlabelled)
    teacher.raw[0][1, 0, 0, 0, 4] = 3.0
    assert all(level.all() for level in unlabelled_gradients(name, shape, teacher, 0.5))


@pytest.mark.parametrize("name", HEADS)
def test_a_teacher_that_lacks_a_class_teaches_only_objects_in_an_unlabelled_image(shape: Shape, name: str) -> None:
    teacher = background(shape, -3.0, lacks=6)
    teacher.raw[0][1, 0, 0, 0, 4] = 3.0
    fine, *coarse = unlabelled_gradients(name, shape, teacher, 0.5, unknown=(1,), tells_all=False)
    assert fine[0].all()
    assert (fine[1].abs() > 1e-7).nonzero().tolist() == [[0, 0, 0]]
    assert all(is_nothing(level[1]) for level in coarse)


def test_silence_covers_the_neighbours_that_a_label_is_assigned_to() -> None:
    raw = torch.zeros(1, 3, 8, 8, 8)
    tiny = torch.tensor([[0, 2, 0.5 + 0.1 / 8, 0.25, 0.001, 0.001]])
    silent = silent_at(raw, tiny, torch.tensor([2]))[0, 0, ..., 4].isnan()
    rows, columns = silent.nonzero().unbind(1)
    assert sorted(set(columns.tolist())) == [3, 4, 5]
    assert sorted(set(rows.tolist())) == [0, 1, 2, 3]  # the centre lies on the edge of two cells
    assert silent_at(raw, tiny, torch.tensor([0])).isfinite().all()
    assert silent_at(raw, None, torch.tensor([2])) is raw


@pytest.mark.parametrize("name", FEATURES)
def test_feature_losses_stay_finite(shape: Shape, name: str) -> None:
    teacher = outputs(shape, 1)
    for level in teacher.raw:
        level[..., 5:] = torch.nan
    assert LOSSES[name](shape, shape._replace(tells_all=False))(outputs(shape, 0), teacher).isfinite().all()
    assert all(not teacher_score(raw).any() for raw in teacher.raw)
