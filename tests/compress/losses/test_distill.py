from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from torch import Tensor

from compress.cli.trainings import loss_choices
from compress.config import STRATEGIES, DistillConfig, LossConfig
from compress.losses.distill import (
    LOSSES,
    Context,
    DistillLoss,
    FeatureLoss,
    HeadLoss,
    Outputs,
    Shape,
    check_losses,
    features,
    make_losses,
)
from compress.losses.distill.base import NO_CONTEXT
from compress.losses.distill.features import CWD, FGD, MGD, PKD, FeatMSE, FeatSL2, box_density, teacher_score
from compress.losses.distill.head import KD, MSE, CrossEntropy
from compress.losses.distill.standardise import by_channel, by_level
from runtime.errors import UsageError

STRIDES = (8, 16, 32)
BOX, CLS = 0.05, 0.5 / 80  # the detection loss's gains at 640 pixels, per box and per class; objectness has 1
HEADS = [name for name, loss in LOSSES.items() if issubclass(loss, HeadLoss)]
GATED = [name for name in HEADS if name not in ("mse", "cross_entropy")]
"""The losses that compare classes and boxes where the teacher sees an object."""
FEATURES = [name for name, loss in LOSSES.items() if issubclass(loss, FeatureLoss)]


@pytest.fixture
def shape(anchors_grid):
    return Shape((4, 6, 8), 3, 3, anchors_grid, STRIDES)


@pytest.fixture
def teacher_shape(shape):
    return shape._replace(channels=(8, 12, 16))


def _outputs(shape: Shape, batch=2, size=64, seed=0, scale=1.0, dtype=torch.float32) -> Outputs:
    generator = torch.Generator().manual_seed(seed)

    def noise(*dims: int) -> Tensor:
        return (torch.randn(dims, generator=generator) * scale).to(dtype)

    cells = [size // stride for stride in shape.strides]
    raw = [noise(batch, shape.na, n, n, 5 + shape.nc) for n in cells]
    return Outputs(raw, [noise(batch, c, n, n) for c, n in zip(shape.channels, cells, strict=True)])


def _tracked(outputs: Outputs) -> Outputs:
    return Outputs([t.requires_grad_() for t in outputs.raw], [t.requires_grad_() for t in outputs.features])


def _exact(name: str, *shapes: Shape) -> DistillLoss:
    """The loss without anything random."""
    return LOSSES[name](*shapes, **({"mask": 0} if name == "mgd" else {}))


def _map(outputs: Outputs, function) -> Outputs:
    return Outputs([function(t) for t in outputs.raw], [function(t) for t in outputs.features])


def _set(raw: list[Tensor], channels: slice | int, value: float) -> list[Tensor]:
    changed = [level.clone() for level in raw]
    for level in changed:
        level[..., channels] = value
    return changed


@pytest.mark.parametrize("name", LOSSES)
def test_every_component_of_a_loss_is_positive_finite_and_float32(shape, teacher_shape, name):
    value = LOSSES[name](shape, teacher_shape)(_outputs(shape), _outputs(teacher_shape, seed=1))
    assert value.dtype == torch.float32
    assert value.shape == ((3,) if name in FEATURES else (1,))
    assert value.isfinite().all()
    assert (value > 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_exactly_zero_where_student_equals_teacher(teacher_shape, name):
    loss, teacher = LOSSES[name](teacher_shape, teacher_shape), _outputs(teacher_shape, scale=4.0)
    student = _tracked(_map(teacher, torch.clone))
    value = loss.compare(student, teacher, NO_CONTEXT)
    assert not value.any()
    value.sum().backward()
    used = student.raw if name in HEADS else student.features
    assert all(t.grad.abs().max() < 1e-6 for t in used)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_does_not_depend_on_the_batch_size(shape, teacher_shape, name):
    loss, student, teacher = _exact(name, shape, teacher_shape), _outputs(shape), _outputs(teacher_shape, seed=1)

    def double(t: Tensor) -> Tensor:
        return torch.cat((t, t))

    assert torch.allclose(loss(_map(student, double), _map(teacher, double)), loss(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "mgd"])  # whose 3x3 convolutions see the border
def test_a_loss_does_not_depend_on_the_image_size(shape, teacher_shape, name):
    """A map tiled twice each way is the head of an image four times as large."""
    loss, student, teacher = LOSSES[name](shape, teacher_shape), _outputs(shape), _outputs(teacher_shape, seed=1)

    def tile(outputs: Outputs) -> Outputs:
        return Outputs([t.repeat(1, 1, 2, 2, 1) for t in outputs.raw], [t.repeat(1, 1, 2, 2) for t in outputs.features])

    assert torch.allclose(loss(tile(student), tile(teacher)), loss(student, teacher), rtol=1e-5)


@pytest.mark.parametrize("name", HEADS)
def test_shifting_all_class_logits_down_costs(shape, name):
    """A softmax over classes would not notice."""
    loss, teacher = LOSSES[name](shape, shape), _outputs(shape)
    student = [level.clone() for level in teacher.raw]
    for level in student:
        level[..., 5:] -= 6
    assert loss(teacher._replace(raw=student), teacher) > 0.1 * CLS


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("extreme", [50.0, 1000.0])
def test_saturated_logits_give_a_finite_loss_and_gradient(shape, name, dtype, extreme):
    teacher = Outputs([torch.full_like(t, extreme, dtype=dtype) for t in _outputs(shape).raw], [])
    student = [torch.full_like(t, -extreme, dtype=dtype).requires_grad_() for t in teacher.raw]
    value = LOSSES[name](shape, shape)(Outputs(student, []), teacher)
    value.backward()
    assert value.isfinite()
    assert value > 0.1
    assert all(t.grad.isfinite().all() for t in student)


@pytest.mark.parametrize("name", LOSSES)
def test_a_teacher_that_sees_nothing_gives_a_finite_loss_with_a_gradient_path(shape, name):
    loss, teacher = LOSSES[name](shape, shape), _outputs(shape, seed=1)
    teacher = teacher._replace(raw=_set(teacher.raw, 4, -1000.0))
    student = _tracked(_outputs(shape))
    value = loss(student, teacher).sum()
    value.backward()
    assert value.isfinite()
    assert all(t.grad.isfinite().all() for t in (student.raw if name in HEADS else student.features))


@pytest.mark.parametrize("name", GATED)
def test_classes_and_boxes_are_not_copied_where_the_teacher_sees_nothing(shape, name):
    teacher = _outputs(shape, seed=1)
    teacher = teacher._replace(raw=_set(teacher.raw, 4, -1000.0))
    student = _tracked(_outputs(shape))
    LOSSES[name](shape, shape)(student, teacher).backward()
    assert not any(t.grad[..., :4].any() or t.grad[..., 5:].any() for t in student.raw)


@pytest.mark.parametrize("name", HEADS)
def test_an_unsure_teacher_pulls_objectness_to_its_own_value_not_to_background(shape, name):
    teacher = Outputs(_set(_outputs(shape).raw, 4, -2.0), [])
    student = Outputs([t.requires_grad_() for t in _set(_outputs(shape).raw, 4, -6.0)], [])
    LOSSES[name](shape, shape)(student, teacher).backward()
    assert all((t.grad[..., 4] < 0).all() for t in student.raw)


@pytest.mark.parametrize("name", LOSSES)
def test_no_gradient_reaches_the_teacher(shape, teacher_shape, name):
    teacher = _tracked(_outputs(teacher_shape, seed=1))
    LOSSES[name](shape, teacher_shape)(_tracked(_outputs(shape)), teacher).sum().backward()
    assert all(t.grad is None for t in (*teacher.raw, *teacher.features))


@pytest.mark.parametrize("name", FEATURES)
def test_every_adapter_parameter_moves_in_one_step(shape, teacher_shape, name):
    torch.manual_seed(0)
    loss = LOSSES[name](shape, teacher_shape)
    before = [p.detach().clone() for p in loss.parameters()]
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    loss(_outputs(shape), _outputs(teacher_shape, seed=1)).sum().backward()
    optimizer.step()
    assert before
    assert all(not torch.equal(old, new) for old, new in zip(before, loss.parameters(), strict=True))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_outputs_are_accepted_by_float32_adapters(shape, teacher_shape, name, dtype):
    loss = _exact(name, shape, teacher_shape)
    student, teacher = _outputs(shape, dtype=dtype), _outputs(teacher_shape, seed=1, dtype=dtype)
    half, full = loss(student, teacher), loss(_map(student, Tensor.float), _map(teacher, Tensor.float))
    assert half.dtype == torch.float32
    assert torch.allclose(half, full, rtol=2e-2)
    if half.requires_grad:
        half.sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in loss.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_autocast_gives_a_finite_float32_loss(shape, teacher_shape, name):
    loss = LOSSES[name](shape, teacher_shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        value = loss(_outputs(shape), _outputs(teacher_shape, seed=1))
    assert value.dtype == torch.float32
    assert value.isfinite().all()


@pytest.mark.parametrize("name", ["feat_mse", "feat_sl2", "mgd"])
def test_a_large_float16_map_does_not_overflow(anchors_grid, name):
    """256 x 80 x 80 unit errors sum to 1.6e6, beyond float16."""
    shape = Shape((256,), 3, 3, anchors_grid[:1], (8,))
    raw = [torch.zeros(1, 3, 80, 80, 8, dtype=torch.float16)]
    student = Outputs(raw, [torch.ones(1, 256, 80, 80, dtype=torch.float16)])
    teacher = Outputs(raw, [torch.zeros(1, 256, 80, 80, dtype=torch.float16)])
    assert LOSSES[name](shape, shape).compare(student, teacher, NO_CONTEXT) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_needs_no_answer_from_the_device(shape, teacher_shape, name):
    loss = LOSSES[name](shape, teacher_shape).to("meta")
    student, teacher = _outputs(shape), _outputs(teacher_shape)
    assert loss(_map(student, lambda t: t.to("meta")), _map(teacher, lambda t: t.to("meta"))).shape == (
        loss.components,
    )


@pytest.mark.parametrize("name", LOSSES)
def test_other_strides_are_refused(shape, name):
    with pytest.raises(UsageError, match=r"strides are \(8, 16, 32\).*same levels"):
        LOSSES[name](shape, shape._replace(strides=(16, 32, 64)))


@pytest.mark.parametrize("name", HEADS)
def test_other_classes_are_refused_with_the_remedy(shape, name):
    with pytest.raises(UsageError, match=r"3 classes, the teacher 80.*Fine-tune the teacher"):
        LOSSES[name](shape, shape._replace(nc=80))


@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("change", [lambda a: a * 1.05, lambda a: a[:, :2], lambda a: a.flip(0)])
def test_other_anchors_are_refused_with_the_remedy(shape, name, change):
    anchors = change(shape.anchors)
    with pytest.raises(UsageError, match=r"anchors differ.*autoanchor: false"):
        LOSSES[name](shape, shape._replace(anchors=anchors, na=anchors.shape[1]))


def test_anchors_rounded_to_float16_are_the_same_anchors(shape):
    KD(shape, shape._replace(anchors=shape.anchors.half()))


@pytest.mark.parametrize("name", FEATURES)
def test_features_may_come_from_a_teacher_with_other_classes(shape, teacher_shape, name):
    other = teacher_shape._replace(nc=80)
    assert LOSSES[name](shape, other)(_outputs(shape), _outputs(other)).sum() > 0


@pytest.mark.parametrize("name", LOSSES)
def test_another_input_size_is_refused(shape, name):
    with pytest.raises(UsageError, match="same images at the same size"):
        LOSSES[name](shape, shape)(_outputs(shape, size=64), _outputs(shape, size=96))


def _one_cell(shape: Shape, objectness: float, class_logit: float) -> Outputs:
    """Background everywhere but in one cell and anchor of P4, in 64 x 64 pixels."""
    raw = [torch.zeros(1, 3, 64 // s, 64 // s, 8) for s in STRIDES]
    for level in raw:
        level[..., 4] = -1000.0
    raw[1][0, 0, 1, 2, 4] = objectness
    raw[1][0, 0, 1, 2, 5] = class_logit
    return Outputs(raw, [])


def test_soft_weighs_a_disjoint_box_as_the_labels_do_and_a_class_by_four(shape):
    """Half a cell of anchor size at most, pushed a cell apart: GIoU is computed by hand."""
    student, teacher = _one_cell(shape, 1000.0, -2.0), _one_cell(shape, 1000.0, 0.0)
    for outputs, side in ((student, -1000.0), (teacher, 1000.0)):
        outputs.raw[1][0, 0, 1, 2, 0] = side
    w, h = shape.anchors[1, 0].tolist()
    inter = max(w - 2, 0) * h
    union, hull = 2 * w * h - inter, (w + 2) * h
    giou = inter / union - (hull - union) / hull
    t, s = (torch.distributions.Bernoulli(logits=torch.tensor(z)) for z in (0.0, -2.0))
    classes = torch.distributions.kl_divergence(t, s).item()
    expected = BOX * (1 - giou) + 4 * CLS * classes
    assert LOSSES["soft"](shape, shape)(student, teacher) == pytest.approx(expected, rel=1e-4)


def test_kd_is_the_divergence_of_student_from_teacher_at_its_temperature(shape):
    """KL(teacher || student), not the reverse."""
    teacher, student = _one_cell(shape, 1000.0, 2.0), _one_cell(shape, 1000.0, -1.0)
    p, q = (torch.distributions.Bernoulli(logits=torch.tensor(z / 4.0)) for z in (2.0, -1.0))
    expected = CLS * 16 * torch.distributions.kl_divergence(p, q)
    reverse = CLS * 16 * torch.distributions.kl_divergence(q, p)
    value = KD(shape, shape, temperature=4.0)(student, teacher)
    assert value == pytest.approx(expected.item(), rel=1e-4)
    assert value != pytest.approx(reverse.item(), rel=1e-2)


def test_mse_is_the_mean_squared_difference_of_all_logits(shape):
    student, teacher = _outputs(shape), _outputs(shape, seed=1)
    levels = zip(student.raw, teacher.raw, strict=True)
    expected = sum(((s.double() - t.double()) ** 2).mean() for s, t in levels)
    assert MSE(shape, shape)(student, teacher).item() == pytest.approx(expected.item(), rel=1e-6)


def test_cross_entropy_is_that_of_objectness_and_classes_less_the_teachers_own(shape):
    student, teacher = _outputs(shape), _outputs(shape, seed=1)
    expected = 0.0
    for s, t in zip(student.raw, teacher.raw, strict=True):
        p, q, z = (x[..., 4:].double().sigmoid() for x in (t, s, t))
        entropies = [-(p * x.log() + (1 - p) * (1 - x).log()).mean() for x in (q, z)]
        expected += (entropies[0] - entropies[1]).item()
    assert CrossEntropy(shape, shape)(student, teacher).item() == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_cross_entropy_is_that_without_the_teachers_entropy(shape):
    student, teacher = _tracked(_outputs(shape)), _outputs(shape, seed=1)
    CrossEntropy(shape, shape)(student, teacher).backward()
    plain = [s.detach().clone().requires_grad_() for s in student.raw]
    for s, t in zip(plain, teacher.raw, strict=True):
        F.binary_cross_entropy_with_logits(s[..., 4:], t[..., 4:].sigmoid()).backward()
    for s, other in zip(student.raw, plain, strict=True):
        torch.testing.assert_close(s.grad, other.grad)


def test_sl2_counts_only_where_the_teacher_scores(shape):
    zeros = [torch.zeros_like(feature[:1]) for feature in _outputs(shape).features]
    teacher = _one_cell(shape, 1000.0, 1000.0)._replace(features=zeros)
    student = teacher._replace(features=[torch.full_like(feature, 5.0) for feature in zeros])
    student.features[1][0, :, 1, 2] = 3.0
    assert FeatSL2(shape, shape).compare(student, teacher, NO_CONTEXT).tolist() == pytest.approx([0, 9, 0])


def _one_level(shape: Shape, *features: Tensor) -> tuple[Shape, list[Outputs]]:
    """The shape of one level with these features' channels, and their outputs."""
    batch, channels, height, width = features[0].shape
    raw = [torch.zeros(batch, 3, height, width, 8)]
    one = shape._replace(channels=(channels,), anchors=shape.anchors[:1], strides=(8,))
    return one, [Outputs(raw, [feature]) for feature in features]


def test_cwd_is_the_divergence_of_student_from_teacher_over_pixels(shape):
    """KL(teacher || student), not the reverse. Two channels of one image are averaged."""
    t = torch.tensor([[0.0, 1.0, 2.0, 3.0], [1.0, 1.0, 1.0, 1.0]])
    s = torch.tensor([[0.0, 0.0, 0.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    one, (student, teacher) = _one_level(shape, s.view(1, 2, 2, 2), t.view(1, 2, 2, 2))
    p, q = ((row / 2).softmax(0) for row in (t[0], s[0]))
    expected = 2.0**2 * (p * (p / q).log()).sum() / 2
    assert CWD(one, one, tau=2.0).compare(student, teacher, NO_CONTEXT) == pytest.approx(expected.item(), rel=1e-5)


def test_pkd_is_one_minus_pearsons_r(shape):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 2, 4, 4, generator=generator, dtype=torch.float64) for _ in range(2))
    one, (student, teacher) = _one_level(shape, s, t)
    rows = [torch.stack((s[:, c].flatten(), t[:, c].flatten())) for c in range(2)]
    expected = sum(1 - torch.corrcoef(pair)[0, 1] for pair in rows) / 2
    assert PKD(one, one).compare(student, teacher, NO_CONTEXT).item() == pytest.approx(expected.item(), rel=1e-5)


def test_pkd_of_a_constant_channel_is_finite_with_a_finite_gradient(shape):
    """Standardisation divides by the deviation."""
    s = torch.full((2, 3, 4, 4), 7.0, requires_grad=True)
    one, (student, teacher) = _one_level(shape, s, torch.randn(2, 3, 4, 4))
    value = PKD(one, one).compare(student, teacher, NO_CONTEXT)
    value.backward()
    assert value.isfinite()
    assert s.grad.isfinite().all()


@pytest.mark.parametrize("name", ["cwd", "pkd"])
def test_an_adapter_has_no_bias_where_the_loss_is_blind_to_offsets(shape, teacher_shape, name):
    assert all(len(parameter.shape) > 1 for parameter in LOSSES[name](shape, teacher_shape).parameters())


def test_fgd_of_uniform_attention_is_the_weighted_squared_difference(shape):
    """Maps of +-1 have attention 1 everywhere, so the value follows by hand."""
    t = torch.ones(1, 2, 4, 4)
    s = t.clone()
    s[0, :, 1, 2] = -1.0
    one, (student, teacher) = _one_level(shape, s, t)
    loss = FGD(one, one, alpha=1.0, beta=0.5)
    assert loss.compare(student, teacher, NO_CONTEXT).item() == pytest.approx(0.5 / 16 * 4.0)
    box = torch.tensor([[0, 0, 0.625, 0.375, 0.5, 0.25]])  # pixels x 1.5..3.5, y 1..2: three of them
    assert loss.compare(student, teacher, Context(box)).item() == pytest.approx(1 / 3 * 4.0)


# ---- the teacher's maps in units of their own scale, and adapters to them -----------------------------------------


def _rescaled(outputs: Outputs, factor, offset: float = 0.0) -> Outputs:
    return outputs._replace(features=[f * factor(f) + offset for f in outputs.features])


def _ramp(maps: Tensor) -> Tensor:
    """Another factor for each channel."""
    return torch.linspace(0.5, 40, maps.shape[1])[:, None, None]


@pytest.mark.parametrize("name", [name for name in FEATURES if name != "fgd"])
def test_no_channels_scale_or_offset_in_the_teacher_matters(shape, teacher_shape, name):
    loss, student, teacher = _exact(name, shape, teacher_shape), _outputs(shape), _outputs(teacher_shape, seed=1)
    found = loss(student, _rescaled(teacher, _ramp, 3.0))
    torch.testing.assert_close(found, loss(student, teacher), rtol=1e-4, atol=1e-6)


def test_a_levels_scale_in_the_teacher_does_not_matter_to_fgd_but_a_channels_does(shape, teacher_shape):
    loss, student, teacher = FGD(shape, teacher_shape), _outputs(shape), _outputs(teacher_shape, seed=1)
    value = loss(student, teacher)
    torch.testing.assert_close(loss(student, _rescaled(teacher, lambda _: 30.0)), value, rtol=1e-4, atol=0)
    assert not torch.allclose(loss(student, _rescaled(teacher, _ramp)), value, rtol=0.05)


def test_standardised_channels_have_mean_0_and_deviation_1_and_a_constant_one_is_0():
    maps = torch.randn(4, 3, 5, 7, dtype=torch.float64) * torch.tensor([0.1, 9.0, 0.0])[:, None, None] + 5
    found = by_channel(maps)
    torch.testing.assert_close(found.mean((0, 2, 3)), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-6)
    deviations = found.std((0, 2, 3), correction=0)
    torch.testing.assert_close(deviations, torch.tensor([1.0, 1.0, 0.0]).double(), rtol=1e-3, atol=1e-6)


def test_a_standardised_level_keeps_its_zeros_and_the_proportions_of_its_channels():
    maps = torch.randn(4, 3, 5, 7).relu() * torch.tensor([1.0, 9.0, 0.1])[:, None, None]
    found = by_level(maps)
    assert torch.equal(found == 0, maps == 0)
    ratio = found[maps > 0] / maps[maps > 0]
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))
    assert found.square().mean().item() == pytest.approx(1, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_standardised_maps_keep_dtype_and_layout(dtype, layout):
    maps = (100 + 50 * torch.randn(2, 8, 6, 6)).to(dtype).contiguous(memory_format=layout)
    for standardise in (by_channel, by_level):
        found = standardise(maps)
        assert found.dtype == dtype
        assert found.is_contiguous(memory_format=layout)
        torch.testing.assert_close(found.float(), standardise(maps.float()), rtol=1e-2, atol=2e-2)


def test_feat_mse_is_the_mean_squared_difference_from_the_standardised_teacher(shape, teacher_shape):
    loss, student, teacher = FeatMSE(shape, teacher_shape), _outputs(shape), _outputs(teacher_shape, seed=1)
    for found, adapter, s, t in zip(
        loss(student, teacher), loss.adapters, student.features, teacher.features, strict=True
    ):
        t = t.double()
        deviation = t.var((0, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
        standard = (t - t.mean((0, 2, 3), keepdim=True)) / deviation
        adapted = F.conv2d(s.double(), adapter.weight.double(), adapter.bias.double())
        assert found.item() == pytest.approx((adapted - standard).square().mean().item(), rel=1e-5)


def test_mgd_gives_the_teachers_map_back_from_the_pixels_that_are_left(shape, teacher_shape):
    loss, student, teacher = MGD(shape, teacher_shape, mask=0.5), _outputs(shape), _outputs(teacher_shape, seed=1)
    found = loss(student, teacher)
    for index in range(3):
        t = teacher.features[index].double()
        standard = (t - t.mean((0, 2, 3), keepdim=True)) / t.var((0, 2, 3), correction=0, keepdim=True).add(1e-5).sqrt()
        first, _, last = loss.generators[index].double()
        loss.drawn = index  # the masks of this loss are tested below
        masked = loss._mask(t) * loss.adapters[index].double()(student.features[index].double())
        filled = F.conv2d(
            F.conv2d(masked, first.weight, first.bias, padding=1).relu(), last.weight, last.bias, padding=1
        )
        assert found[index].item() == pytest.approx((filled - standard).square().mean().item(), rel=1e-5)


def test_mgd_leaves_out_its_part_of_the_pixels_and_others_each_time(shape):
    loss = MGD(shape, shape, mask=0.65)
    first, second = (loss._mask(torch.zeros(8, 4, 40, 40)) for _ in range(2))
    assert first.mean().item() == pytest.approx(0.35, abs=0.02)
    assert not torch.equal(first, second)
    assert torch.equal(first, MGD(shape, shape)._mask(torch.zeros(8, 4, 40, 40)))
    assert not torch.equal(first, MGD(shape, shape, DistillConfig(seed=1))._mask(torch.zeros(8, 4, 40, 40)))


def test_mgd_goes_on_with_its_masks_from_its_state(shape):
    loss, resumed = MGD(shape, shape), MGD(shape, shape)
    loss(_outputs(shape), _outputs(shape, seed=1))
    resumed.load_state_dict(loss.state_dict())
    maps = torch.zeros(2, 4, 8, 8)
    assert torch.equal(loss._mask(maps), resumed._mask(maps))


def _related(shape: Shape, teacher_shape: Shape, count: int = 3) -> list[tuple[Outputs, Outputs]]:
    """Batches in which the student's features are linear in the teacher's, and noise."""
    pairs = []
    for seed in range(count):
        noise, teacher = _outputs(shape, size=96, seed=seed), _outputs(teacher_shape, size=96, seed=100 + seed)
        matrices = [
            torch.randn(s, t, generator=torch.Generator().manual_seed(s))
            for s, t in zip(shape.channels, teacher_shape.channels, strict=True)
        ]
        features = [
            torch.einsum("st,bthw->bshw", matrix, t) + 0.1 * s
            for matrix, t, s in zip(matrices, teacher.features, noise.features, strict=True)
        ]
        pairs.append((noise._replace(features=features), teacher))
    return pairs


@pytest.mark.parametrize("name", FEATURES)
def test_fitted_adapters_make_every_level_of_every_loss_smaller(shape, teacher_shape, name):
    torch.manual_seed(0)
    loss, pairs = LOSSES[name](shape, teacher_shape), _related(shape, teacher_shape)
    before = [p.detach().clone() for p in loss.parameters()]
    losses = [torch.stack([loss(*pair) for pair in pairs]).mean(0)]
    loss.fit(pairs)
    losses.append(torch.stack([loss(*pair) for pair in pairs]).mean(0))
    assert (losses[1] < 0.9 * losses[0]).all()
    assert not any(torch.equal(old, new) for old, new in zip(before, loss.parameters(), strict=True))
    assert all(p.grad is None for p in loss.parameters())
    assert not any(t.requires_grad for s, t_ in pairs for t in (*s.features, *t_.features))


def test_the_adapters_of_feat_mse_are_the_ridge_regression_over_all_batches(shape, teacher_shape):
    loss, pairs = FeatMSE(shape, teacher_shape), _related(shape, teacher_shape)
    loss.fit(pairs)

    def rows(maps: list[Tensor]) -> Tensor:
        return torch.cat([m.permute(0, 2, 3, 1).flatten(0, 2) for m in maps]).double()

    x = rows([s.features[0] for s, _ in pairs])
    y = rows([by_channel(t.features[0]) for _, t in pairs])
    x = torch.cat((x, torch.ones(len(x), 1, dtype=torch.float64)), 1)
    penalty = 0.1 * (x.T @ x).diagonal().mean() * torch.eye(x.shape[1], dtype=torch.float64)
    penalty[-1, -1] = 0
    solution = torch.linalg.inv(x.T @ x + penalty) @ x.T @ y
    torch.testing.assert_close(loss.adapters[0].weight[..., 0, 0].double(), solution[:-1].T, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(loss.adapters[0].bias.double(), solution[-1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["feat_sl2", "mgd"])
def test_fitting_twice_from_the_same_start_gives_the_same_bits(shape, teacher_shape, name, monkeypatch):
    monkeypatch.setattr(features, "FIT_STEPS", 5)
    fitted = []
    for _ in range(2):
        torch.manual_seed(0)
        fitted.append(LOSSES[name](shape, teacher_shape))
        torch.rand(1 + len(fitted))
        fitted[-1].fit(_related(shape, teacher_shape))
    assert all(torch.equal(a, b) for a, b in zip(*(loss.parameters() for loss in fitted), strict=True))


# ---- boxes and scores ---------------------------------------------------------------------------------------------


def test_the_foreground_lies_where_the_box_lies():
    """On a map that is wider than high, an exchange of axes would show."""
    feature = torch.zeros(2, 3, 4, 8)
    boxes = torch.tensor([[1, 0, 5.5 / 8, 0.5 / 4, 1 / 8, 1 / 4], [1, 2, 0.5, 0.5, 1.0, 1.0]])
    density = box_density(feature, boxes)
    assert not density[0].any()
    assert density[1, 0, 5] == 1  # of two boxes the smaller counts
    assert (density[1] == 1 / 32).sum() == 31


def test_a_box_smaller_than_a_pixel_still_counts():
    assert box_density(torch.zeros(1, 1, 4, 4), torch.tensor([[0, 0, 0.6, 0.6, 0.01, 0.01]])).sum() == 1


def test_the_teacher_score_is_the_best_probability_of_a_cell(shape):
    raw = _outputs(shape).raw[0]
    expected = (raw[..., 4:5].sigmoid() * raw[..., 5:].sigmoid()).amax((1, 4))
    assert torch.allclose(teacher_score(raw), expected)


@settings(max_examples=25, deadline=None)
@given(scale=st.floats(0.01, 60), seed=st.integers(0, 2**16))
def test_no_head_loss_is_negative_or_infinite(scale, seed):
    anchors = torch.tensor([[[1.25, 1.625], [2.0, 3.75], [4.125, 2.875]]])
    shape = Shape((4,), 3, 3, anchors, (8,))
    student, teacher = _tracked(_outputs(shape, seed=seed, scale=scale)), _outputs(shape, seed=seed + 1, scale=scale)
    for name in HEADS:
        value = LOSSES[name](shape, shape)(student, teacher)
        value.backward()
        assert value >= 0
        assert value.isfinite()
    assert student.raw[0].grad.isfinite().all()


@pytest.mark.parametrize("name", HEADS)
def test_descending_the_loss_brings_the_student_to_the_teacher(shape, name):
    teacher, loss = _outputs(shape, seed=1), LOSSES[name](shape, shape)
    student = _tracked(_outputs(shape))
    optimizer = torch.optim.Adam(student.raw, lr=0.1)
    start = loss(student, teacher).item()
    for _ in range(150):
        optimizer.zero_grad()
        loss(student, teacher).backward()
        optimizer.step()
    assert loss(student, teacher).item() < 0.05 * start


# ---- settings -----------------------------------------------------------------------------------------------------


def test_a_recipe_may_say_a_weight_or_a_weight_and_settings(shape):
    config = DistillConfig.model_validate({"losses": {"kd": 0.2, "cwd": {"weight": 0.3, "tau": 2}, "pkd": 0}})
    losses = make_losses(shape, shape, config)
    assert {name: loss.weight for name, loss in losses.items()} == {"kd": 0.2, "cwd": 0.3}
    assert {name: loss.settings.model_dump() for name, loss in losses.items()} == {
        "kd": {"temperature": 4.0},
        "cwd": {"tau": 2.0},
    }


def test_without_a_weight_a_loss_has_its_own_share_and_end(shape):
    config = DistillConfig.model_validate({"losses": {"soft": "auto", "pkd": {"until": 0.5}, "cwd": {"share": 0.1}}})
    losses = make_losses(shape, shape, config)
    assert [(loss.weight, loss.share, loss.until) for loss in losses.values()] == [
        (None, 1.0, 1.0),
        (None, 0.3, 0.5),
        (None, 0.1, 0.7),
    ]


def test_a_weight_and_a_share_contradict_each_other():
    with pytest.raises(ValidationError, match="not both"):
        DistillConfig.model_validate({"losses": {"soft": {"weight": 1, "share": 1}}})


@pytest.mark.parametrize(
    ("losses", "says"),
    [
        ({"cwdd": 1}, r"'cwdd' is not known\. Did you mean 'cwd'\?"),
        (
            {"cwd": {"weight": 1, "taw": 2}},
            r"loss cwd: unknown key 'taw'\. Did you mean 'tau'\?",
        ),
        ({"pkd": {"weight": 1, "x": 2}}, r"loss pkd: unknown key 'x'\. Known: none"),
        ({"cwd": {"weight": 1, "tau": 0}}, r"loss cwd: tau: 0 is not accepted: .*greater than 0"),
        ({"kd": {"weight": 1, "temperature": 0}}, r"loss kd: temperature: 0 is not accepted"),
        ({"soft": {"weight": 1, "weights": [1, -1, 1]}}, r"loss soft: weights\.1: -1 is not accepted"),
        ({"cwd": {"weight": 0, "taw": 2}, "kd": 1}, "unknown key"),
        ({"kd": 0}, "weight above 0"),
    ],
)
def test_a_loss_or_setting_that_is_not_known_is_one_line(losses, says):
    with pytest.raises(UsageError, match=says) as caught:
        check_losses(DistillConfig.model_validate({"losses": losses}))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        (("soft", "kd=0.2", "pkd.share=0.1"), {"soft": "auto", "kd": 0.2, "pkd": {"share": 0.1}}),
        (("soft=auto",), {"soft": "auto"}),
        (("cwd=0.3", "cwd.tau=2"), {"cwd": {"weight": 0.3, "tau": 2}}),
        (("cwd.tau=2", "cwd=0.3"), {"cwd": {"weight": 0.3, "tau": 2}}),
        (("cwd.tau=2", "cwd"), {"cwd": {"tau": 2}}),
        (("cwd=0.3", "cwd.tau=2", "cwd=auto"), {"cwd": {"tau": 2}}),
        (("cwd=auto", "cwd=0.3"), {"cwd": 0.3}),
    ],
)
def test_the_command_lines_losses_are_those_of_a_recipe(given, wanted):
    told, written = (DistillConfig.model_validate({"losses": losses}) for losses in (loss_choices(given), wanted))
    assert told == written


def test_a_loss_on_the_command_line_in_another_form_is_one_line():
    with pytest.raises(UsageError, match=r"--loss 'cwd.tau': expected NAME, .* Write cwd.tau=VALUE"):
        loss_choices(("cwd.tau",))


def _another(value):
    """A value of the same kind."""
    if isinstance(value, tuple):
        return tuple(map(_another, value))
    return value / 2 if value < 1 else 2 * value


@pytest.mark.parametrize(
    ("name", "setting"), [(name, setting) for name, loss in LOSSES.items() for setting in loss.Settings.model_fields]
)
def test_every_setting_of_a_loss_changes_its_value_or_gradient(shape, teacher_shape, name, setting):
    default = getattr(LOSSES[name].Settings(), setting)
    other = _another(default)
    teacher, context = _outputs(teacher_shape, seed=1), Context(torch.tensor([[0, 0, 0.5, 0.5, 0.5, 0.5]]))
    found = []
    for value in (default, other):
        torch.manual_seed(0)
        student = _tracked(_outputs(shape))
        loss = LOSSES[name](shape, teacher_shape, **{setting: value})(student, teacher, context).sum()
        loss.backward()
        gradients = [t.grad.norm() for t in (*student.raw, *student.features) if t.grad is not None]
        found.append(torch.stack([loss.detach(), *gradients]))
    assert not torch.equal(*found)


def test_soft_adds_up_objectness_classes_and_boxes_by_their_weights(shape):
    student, teacher = _outputs(shape), _outputs(shape, seed=1)

    def loss(*weights):
        return LOSSES["soft"](shape, shape, weights=weights)(student, teacher)

    parts = loss(1, 0, 0), loss(0, 1, 0), loss(0, 0, 1)
    assert all(part > 0 for part in parts)
    torch.testing.assert_close(loss(2, 3, 5), 2 * parts[0] + 3 * parts[1] + 5 * parts[2])


def test_the_gains_of_a_head_loss_are_those_of_the_detection_loss(shape):
    config = DistillConfig(imgsz=320, loss=LossConfig(obj=0.7, cls=0.3, box=0.1))
    for name in HEADS:
        assert LOSSES[name](shape, shape, config).gains == pytest.approx((0.1, 0.7 / 4, 0.3 * 3 / 80))


# ---- strategies -----------------------------------------------------------------------------------------------------


def test_objectness_is_not_compared_in_an_unlabelled_image_in_which_the_teacher_sees_nothing(shape):
    teacher, student = _outputs(shape, batch=3, seed=1), _outputs(shape, batch=3)
    for raw in teacher.raw:
        raw[..., 4] = -4.0  # at most 0.02
    teacher.raw[1][2, 0, 0, 0, 4] = 3.0  # in the last image, one cell of one level is sure
    student = _tracked(student)
    loss = LOSSES["soft"](shape, shape, DistillConfig(unsure=0.1))
    loss(student, teacher, Context(labelled=1)).backward()
    for raw in student.raw:
        assert [bool((image.abs() > 1e-7).any()) for image in raw.grad[..., 4]] == [True, False, True]
        assert [bool(image.any()) for image in raw.grad[..., :4]] == [True, True, True]


@pytest.mark.parametrize("name", HEADS)
def test_where_the_teacher_is_sure_an_unlabelled_image_counts_as_any_other(name, shape):
    teacher, student = _outputs(shape, seed=1, scale=3), _outputs(shape)
    loss = LOSSES[name](shape, shape, DistillConfig())
    torch.testing.assert_close(loss(student, teacher, Context(labelled=0)), loss(student, teacher))


def _strategy(name, **more):
    return DistillConfig.model_validate({"strategy": name} | more)


def test_a_strategy_sets_losses_and_label_weight_and_what_is_said_wins():
    assert [*_strategy("soft_labels").losses] == ["soft"]
    assert _strategy("soft_labels").label_weight == _strategy("label_free").label_weight == 0
    assert all(issubclass(LOSSES[name], FeatureLoss) for name in _strategy("features").losses)
    assert _strategy("soft_labels", label_weight=0.2, losses={"kd": 1.0}).label_weight == 0.2
    assert "losses" not in _strategy("features").model_dump(exclude_unset=True)  # an arm of a study may change it


@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_works_as_it_is(name):
    check_losses(_strategy(name, unlabelled="images" if STRATEGIES[name].needs_unlabelled else None))


def test_without_labels_one_loss_of_the_head_lasts_to_the_end():
    check_losses(_strategy("soft_labels", losses={"kd": {"until": 0.2}, "soft": "auto"}))
    check_losses(_strategy("soft_labels", losses={"soft": {"until": 0.5}}, label_weight=0.2))


@pytest.mark.parametrize(
    ("name", "more", "expected"),
    [
        ("label_free", {}, "learns from unlabelled images, none are given. Add --unlabelled"),
        ("joint", {"losses": {}}, "strategy joint has no loss by which the student learns from the teacher"),
        ("soft_labels", {"losses": {"pkd": "auto"}}, "strategy soft_labels takes no loss such as pkd. It takes soft"),
        ("features", {"losses": {"soft": "auto"}}, "strategy features takes no loss such as soft. It takes feat_mse"),
        ("features", {"label_weight": 0}, "label_weight is 0 and no loss compares heads"),
        *(
            ("joint", more, "strategy joint trains one checkpoint, on the student's images. Leave out teachers")
            for more in ({"teachers": ["b.pt"]}, {"teacher_flip": True}, {"teacher_imgsz": 1280})
        ),
        ("soft_labels", {"losses": {"soft": {"until": 0.5}}}, "loss soft fades out at 0.5 of the epochs, so nothing"),
        ("soft_labels", {"losses": {"kd": {"until": 0.2}, "mse": {"until": 0.7}}}, "loss mse fades out at 0.7 of"),
        ("offline", {"losses": {}, "unlabelled": "x"}, "unlabelled images teach nothing without a distillation loss"),
        ("offline", {"losses": {"fgd": "auto"}, "unlabelled": "x"}, "loss fgd needs the labels"),
        ("label_free", {"losses": {"soft": "auto", "fgd": 1}, "unlabelled": "x"}, "loss fgd needs the labels"),
    ],
)  # fmt: skip
def test_a_strategy_that_lacks_something_is_one_line_with_a_remedy(name, more, expected):
    with pytest.raises(UsageError) as caught:
        check_losses(_strategy(name, **more))
    assert expected in str(caught.value)
    assert caught.value.hint
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", STRATEGIES)
@pytest.mark.parametrize("more", [{"losses": {}}, {"losses": {"pkd": "auto"}, "label_weight": 0}])
def test_a_hint_names_only_losses_that_the_strategy_takes(name, more):
    with pytest.raises(UsageError) as caught:
        check_losses(_strategy(name, unlabelled="images", **more))
    for named in re.findall(r"(\w+): auto", caught.value.hint):
        check_losses(_strategy(name, unlabelled="images", losses={named: "auto"}))


def test_losses_that_do_not_belong_to_a_strategy_may_have_a_weight_of_0():
    check_losses(_strategy("features", losses={"soft": 0, "pkd": "auto"}))
