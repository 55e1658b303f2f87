from __future__ import annotations

import pytest
import torch
from shim.cases import HEAD
from shim.oracle import (
    ANCHORS,
    DTYPES,
    LAYOUTS,
    by_autograd,
    by_kernels,
    check,
    errors,
    head_anchors,
    head_pairs,
    head_shape,
    kernels_of,
    laid,
    same_bits,
    truth,
    upstream,
)
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from compress.config import DistillConfig
from compress.kernels import soft_head as room
from compress.kernels.fused import FusedLoss
from compress.kernels.soft_head import SOFT_HEAD, SOURCE, THREADS, Args, reference
from compress.losses.distill import LOSSES, Context, Outputs, Shape
from runtime.errors import UsageError

soft_head = kernels_of(SOFT_HEAD)
SHAPES = [(2, 8, 20, 20), (3, 5, 7, 9), (1, 1, 1, 1), (2, 3, 1, 1), (1, 240, 8, 5), (2, 13, 11, 5)]
LEVELS = [(2, 8, 20, 20), (2, 13, 10, 10), (2, 32, 7, 5)]
FACTORS = (HEAD["obj"], HEAD["cls"], HEAD["box"])
BACKGROUND = -4.0


@pytest.fixture(autouse=True)
def few_top_cells(monkeypatch):
    monkeypatch.setattr(room, "TOP_CELLS", 37)


def arguments(shapes, dtype, **options):
    return given(*head_pairs(shapes, dtype, **options))


def given(students, teachers, seen=None):
    """The teacher's own gates, and every logit told; or the gates of `seen`, and NaN for what is not told."""
    levels = len(students)
    factors = (head_anchors(levels), HEAD["balance"][:levels], *FACTORS)
    return [students, teachers, seen or teachers, *factors, seen is None, upstream(students)]


def top_rows(gradient: Tensor) -> Tensor:
    """(B, na * H * W): whether the classes of each cell and anchor have a gradient."""
    return (gradient[..., 5:] != 0).any(-1).flatten(1)


# ---- loss and gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_definition(shim_device, dtype, shape, layout):
    check(soft_head, reference, shim_device(), arguments([shape], dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_levels_go_in_two_launches(shim_device, dtype, layout):
    device = shim_device()
    check(soft_head, reference, device, arguments(LEVELS, dtype, layout=layout))
    assert [name.rpartition("_")[0] for name, _ in device.launches] == ["soft_head_select", "soft_head"]


def test_levels_may_have_other_batches_and_classes(shim_device):
    check(soft_head, reference, shim_device(), arguments([(2, 8, 6, 6), (1, 3, 8, 8), (5, 40, 2, 3)], torch.float32))


@pytest.mark.parametrize("classes", [THREADS - 1, THREADS, 3 * THREADS + 1, 900])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_may_have_more_classes_than_a_block_has_threads(shim_device, classes, dtype):
    check(soft_head, reference, shim_device(), arguments([(2, ANCHORS * classes, 3, 5)], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_off_the_alignment_are_read_right(shim_device, dtype):
    check(soft_head, reference, shim_device(), arguments([(2, 8, 8, 8)], dtype, skip=1))


def test_student_and_teacher_may_have_other_layouts_and_dtypes(shim_device):
    for own, other in ((*LAYOUTS,), (*LAYOUTS,)[::-1]):
        (s,), (t,) = head_pairs([(2, 8, 6, 7)], torch.float32)
        check(soft_head, reference, shim_device(), given([laid(s, own)], [laid(t, other)]))
    check(soft_head, reference, shim_device(), given([s], [t.bfloat16()]))


def test_rows_that_are_not_dense_are_copied(shim_device):
    (s,), (t,) = head_pairs([(2, 8, 6, 7)], torch.float32)
    parts = [torch.cat((x, x), -1)[..., : s.shape[-1]] for x in (s, t)]
    check(soft_head, reference, shim_device(), given(*([part] for part in parts)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_keeps_the_layout_of_the_map(shim_device, layout):
    found = arguments([(2, 8, 4, 4)], torch.float16, layout=layout)
    assert soft_head(shim_device(), *found).gradients[0].stride() == found[0][0].stride()


@pytest.mark.parametrize("place", range(4))
def test_boxes_with_equal_edges_have_the_gradient_that_torch_gives(shim_device, place):
    """Equal numbers get half of the gradient of their minimum each."""
    students, teachers = head_pairs([(1, 8, 9, 7)], torch.float32)
    equal = [k for k in range(4) if k != place]
    students[0][..., equal] = teachers[0][..., equal]
    check(soft_head, reference, shim_device(), given(students, teachers))


@pytest.mark.parametrize("apart", [0.0, 1.0])
def test_boxes_that_touch_or_are_apart_are_drawn_together(shim_device, apart):
    """Powers of 2, so that the boxes touch exactly: widths of 1 cell, centres 1 cell apart and more."""
    students, teachers = head_pairs([(1, 8, 4, 4)], torch.float32)
    for maps, x in ((students, -30.0), (teachers, 0.0)):
        maps[0][..., :4] = torch.tensor([x, 0.0, 0.0, 0.0])
    found = given(students, teachers)
    found[3] = [torch.full((ANCHORS, 2), 1 - apart / 2)]
    check(soft_head, reference, shim_device(), found)


@pytest.mark.parametrize("extreme", [30.0, 3e3])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_saturated_logits_are_compared_right(shim_device, dtype, extreme):
    students, teachers = head_pairs([(2, 8, 3, 4)], dtype)
    for maps in (students, teachers):
        maps[0][..., 4:].mul_(extreme)
    check(soft_head, reference, shim_device(), given(students, teachers))


@pytest.mark.parametrize("extreme", [30.0, 3e3])
def test_boxes_of_no_size_are_compared_as_well_as_plain_torch_does_it(shim_device, extreme):
    """Their sides are differences of edges that float32 hardly tells apart."""
    students, teachers = head_pairs([(2, 8, 3, 4)], torch.float32)
    for maps in (students, teachers):
        maps[0][..., :4].mul_(extreme)
    found = given(students, teachers)
    true = truth(reference, found)
    eager, ours = by_autograd(reference, found, (0,), None), by_kernels(soft_head, shim_device(), found)
    assert ours.gradients[0].isfinite().all()
    assert all(own <= 1.1 * other + 1e-6 for own, other in zip(errors(ours, true), errors(eager, true), strict=True))


@pytest.mark.parametrize("objectness", [BACKGROUND, -1e4, 0.0])
def test_a_batch_of_background_is_divided_by_its_images(shim_device, objectness):
    students, teachers = head_pairs([(3, 8, 3, 4)], torch.float32)
    teachers[0][..., 4] = objectness + teachers[0][..., 4] / 8
    check(soft_head, reference, shim_device(), given(students, teachers))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_maps_give_exactly_zero(shim_device, dtype, layout):
    found = arguments([(2, 8, 9, 7)], dtype, layout=layout)
    found[1] = found[0]
    loss, gradients = soft_head(shim_device(), *found)
    assert loss == 0
    assert not gradients[0].any()


@pytest.mark.parametrize(
    ("place", "bad"), [(0, torch.nan), (4, torch.nan), (5, torch.nan), (4, torch.inf), (5, torch.inf)]
)
def test_what_is_not_finite_reaches_loss_and_gradient(shim_device, place, bad):
    """An infinite logit of a box is no such thing: its probability is finite."""
    found = arguments([(2, 8, 3, 4)], torch.float16)
    found[0][0][1, 2, 2, 0, place] = bad
    loss, gradients = soft_head(shim_device(), *found)
    assert not loss.isfinite()
    assert gradients[0].isnan().any() == (bad is torch.nan)


def test_a_gradient_beyond_float16_becomes_infinite(shim_device):
    found = arguments([(1, 3, 2, 4)], torch.float16)
    found[-1] = torch.tensor(1e9)
    assert soft_head(shim_device(), *found).gradients[0].isinf().any()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_that_the_teacher_does_not_tell_pull_nowhere(shim_device, dtype, layout):
    """The gates come from other maps, in another layout here."""
    students, seen = head_pairs([(2, 8, 9, 7), (2, 8, 5, 3)], dtype, layout=layout)
    generator = torch.Generator().manual_seed(5)
    holes = [torch.rand(t.shape, generator=generator) < 0.3 for t in seen]
    teachers = [t.masked_fill(hole, torch.nan) for t, hole in zip(seen, holes, strict=True)]
    found = given(students, teachers, [laid(z, "nchw") for z in seen])
    check(soft_head, reference, shim_device(), found)
    gradients = soft_head(shim_device(), *found).gradients
    for gradient, hole in zip(gradients, holes, strict=True):
        assert not gradient[..., 4:][hole[..., 4:]].any()
        assert gradient[..., 4:][~hole[..., 4:]].any()


def test_a_teacher_that_should_tell_all_and_does_not_is_seen(shim_device):
    found = arguments([(1, 8, 3, 4)], torch.float32)
    found[1][0][0, 0, 0, 0, 5] = torch.nan
    assert not soft_head(shim_device(), *found).loss.isfinite()


@pytest.mark.parametrize("part", range(3))
def test_a_part_that_weighs_0_has_no_gradient(shim_device, part):
    found = arguments([(2, 8, 3, 4)], torch.float32)
    found[5 + part] = 0.0
    gradient = soft_head(shim_device(), *found).gradients[0]
    own, others = ([slice(4, 5), slice(5, None), slice(0, 4)][i] for i in (part, (part + 1) % 3))
    assert not gradient[..., own].any()
    assert gradient[..., others].any()
    check(soft_head, reference, shim_device(), found)


# ---- the top cells ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(2, 8, 20, 20), (1, 3, 30, 30)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_cells_with_the_largest_gates_are_compared_and_no_others(shim_device, shape, layout):
    found = arguments([shape], torch.float32, layout=layout)
    gradient = soft_head(shim_device(), *found).gradients[0]
    gates = found[1][0][..., 4].flatten(1)
    for rows, logits in zip(top_rows(gradient), gates, strict=True):
        assert rows.nonzero().flatten().tolist() == sorted(logits.topk(room.TOP_CELLS).indices.tolist())


@pytest.mark.parametrize("values", [1, 2, 7])
@pytest.mark.parametrize("shape", [(2, 8, 20, 20), (3, 4, 5, 3), (1, 3, 30, 30)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_of_equal_gates_the_first_count(shim_device, shape, values, layout):
    found = arguments([shape], torch.float16, layout=layout)
    logits = found[1][0][..., 4]
    logits.copy_(torch.randint(values, logits.shape, generator=torch.Generator().manual_seed(1)) - 2.0)
    gradient = soft_head(shim_device(), *found).gradients[0]
    order = logits.flatten(1).argsort(dim=1, descending=True, stable=True)
    for rows, ordered in zip(top_rows(gradient), order, strict=True):
        assert rows.nonzero().flatten().tolist() == sorted(ordered[: room.TOP_CELLS].tolist())


def test_gates_are_equal_as_float32_has_them_not_the_logits(shim_device):
    """Logits of 30 and 40 are both certain."""
    found = arguments([(1, 3, 8, 8)], torch.float32)
    found[1][0][..., 4] = 30 + 10 * (torch.arange(ANCHORS * 64).view(1, ANCHORS, 8, 8) % 2)
    rows = top_rows(soft_head(shim_device(), *found).gradients[0])[0]
    assert rows.nonzero().flatten().tolist() == list(range(room.TOP_CELLS))


def test_a_gate_that_is_no_number_counts_as_0(shim_device):
    found = arguments([(1, 3, 8, 8)], torch.float32)
    found[2] = [found[1][0].clone()]
    found[2][0][0, 1, 2, 3, 4] = torch.nan
    gradient = soft_head(shim_device(), *found).gradients[0]
    assert not top_rows(gradient)[0, 64 + 2 * 8 + 3]
    assert top_rows(gradient).sum() == room.TOP_CELLS


# ---- the same bits, and the cost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_gives_the_same_bits(shim_device, shim, dtype):
    found = arguments(LEVELS, dtype)
    assert same_bits(*(by_kernels(soft_head, shim_device(seed=seed), found) for seed in shim.SEEDS))


def test_no_partition_depends_on_the_gpu(shim_device):
    from shim.device import A100, H100

    found = arguments(LEVELS, torch.float32)
    assert same_bits(*(by_kernels(soft_head, shim_device(facts=facts), found) for facts in (A100, H100)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_bytes_are_those_of_the_gradient_and_of_top_rows_and_little_more(shim_device, monkeypatch, dtype, layout):
    monkeypatch.setattr(room, "TOP_CELLS", 200)
    device, found = shim_device(), arguments([(1, 240, 24, 24)], dtype, layout=layout)
    soft_head(device, *found)
    one, rows = found[0][0].nbytes, ANCHORS * 24 * 24
    read, written = device.moved_bytes()
    assert written <= one + 8 * rows + 64
    assert read <= 2.1 * one * room.TOP_CELLS / rows + (3 * found[0][0].itemsize + 40) * rows


class Operations(TorchDispatchMode):
    """Counts ATen operations but views."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += not func.is_view
        return func(*args, **(kwargs or {}))


def test_forward_and_backward_take_few_operations(shim_device, monkeypatch):
    """The kernels' launches are three more. Plain torch takes several hundred."""
    device = shim_device()
    monkeypatch.setattr(FusedLoss, "device", lambda self, arguments: device)
    loss, student, teacher = soft_loss(), outputs(0), outputs(1)
    with Operations() as fused:
        loss(student, teacher).backward()
    assert fused.count + len(device.launches) <= 40
    monkeypatch.undo()
    with Operations() as plain:
        loss(student, teacher).backward()
    assert plain.count > 200


def test_the_structs_are_those_of_the_source(shim):
    library = shim.build(SOURCE.path, SOURCE.defines)
    assert library.size_of("soft_head_f32") == library.size_of("soft_head_select_f16") == len(bytes(Args()))


# ---- what is refused ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda given: given[3].pop(), "1 student maps, 1 teacher maps, 1 maps of gates, 0 tables of anchors"),
        (lambda given: [given.__setitem__(i, []) for i in range(5)], "0 student maps"),
        (lambda given: given[1].__setitem__(0, given[1][0][..., :6]), r"level 0 .*\(2, 3, 4, 4, 6\)"),
        (lambda given: given.__setitem__(2, [given[2][0][:, :, :3]]), r"level 0 .*\(2, 3, 3, 4, 8\)"),
        (lambda given: given[3].__setitem__(0, given[3][0][:2]), r"level 0 .*\(2, 2\)"),
        (lambda given: given.__setitem__(4, ()), "0 balances"),
    ],
)
def test_maps_of_unlike_shapes_are_refused_before_a_kernel_reads_beyond_one(change, says):
    found = arguments([(2, 8, 4, 4)], torch.float32)
    change(found)
    with pytest.raises(UsageError, match=says):
        room.soft_head(*found[:-1])


# ---- the loss that calls it ---------------------------------------------------------------------------------------


SHAPE = Shape((6, 8), 4, ANCHORS, torch.stack(head_anchors(2)), (8, 16))


def outputs(seed: int) -> Outputs:
    generator = torch.Generator().manual_seed(seed)
    raw = [torch.randn(2, ANCHORS, side, side, 9, generator=generator) for side in (8, 4)]
    return Outputs([level.requires_grad_(seed == 0) for level in raw], [])


def soft_loss(**terms):
    return LOSSES["soft"](SHAPE, SHAPE._replace(**terms), DistillConfig(imgsz=64))


@pytest.fixture
def on_shim(shim_device, monkeypatch):
    device = shim_device()
    monkeypatch.setattr(FusedLoss, "device", lambda self, arguments: device)
    return device


def test_the_loss_of_a_recipe_gives_what_plain_torch_gives(on_shim, monkeypatch):
    monkeypatch.setattr(room, "TOP_CELLS", 1000)
    loss, student, teacher = soft_loss(), outputs(0), outputs(1)
    found = loss(student, teacher)
    gradients = torch.autograd.grad(found, student.raw)
    assert len(on_shim.launches) == 3
    monkeypatch.undo()
    true = loss(student, teacher)
    assert found.shape == (1,)
    assert torch.allclose(found, true, rtol=1e-5)
    for g, t in zip(gradients, torch.autograd.grad(true, student.raw), strict=True):
        assert torch.allclose(g, t, rtol=1e-4, atol=1e-8)


def test_an_upstream_gradient_that_is_known_is_folded_in(on_shim):
    student, teacher, expected = outputs(0), outputs(1), torch.tensor([512.0])
    loss = soft_loss()(student, teacher, Context(upstream=expected))
    gradients = torch.autograd.grad(loss, student.raw, expected)
    written = sum(counters.written for name, counters in on_shim.launches if name.startswith("rescale"))
    assert written == 0
    plain = torch.autograd.grad(soft_loss()(student, teacher), student.raw, expected)
    assert all(torch.allclose(g, p, rtol=1e-5, atol=1e-7) for g, p in zip(gradients, plain, strict=True))


LABELS = torch.tensor([[0, 1, 0.5, 0.5, 0.3, 0.3]])


@pytest.mark.parametrize(
    ("terms", "context"),
    [
        ({"tells_all": False}, Context()),
        ({}, Context(labelled=1)),
        ({"unknown": (1,), "tells_all": False}, Context(LABELS)),
        ({"unknown": (1,), "tells_all": False}, Context(LABELS, labelled=1)),
    ],
    ids=["untold logits", "unlabelled images", "unknown classes", "both"],
)
def test_what_the_teacher_does_not_tell_is_left_out_as_in_plain_torch(on_shim, monkeypatch, terms, context):
    monkeypatch.setattr(room, "TOP_CELLS", 1000)
    loss, student, teacher = soft_loss(**terms), outputs(0), outputs(1)
    teacher.raw[1][1][..., 4] = BACKGROUND
    if terms:
        teacher.raw[0][0, 0, 0, 0, 5] = torch.nan
    found = loss(student, teacher, context)
    gradients = torch.autograd.grad(found, student.raw)
    assert len(on_shim.launches) == 3
    monkeypatch.undo()
    true = loss(student, teacher, context)
    assert torch.allclose(found, true, rtol=1e-5)
    for g, t in zip(gradients, torch.autograd.grad(true, student.raw), strict=True):
        assert torch.allclose(g, t, rtol=1e-4, atol=1e-7)


def test_gradients_at_the_neck_can_be_measured_before_the_backward_pass(on_shim):
    """As the weights of the losses do: twice, through a graph that is kept."""
    torch.manual_seed(0)
    neck = [torch.randn(2, 4, side, side, requires_grad=True) for side in (8, 4)]
    heads = [nn.Conv2d(4, ANCHORS * 9, 1) for _ in neck]
    raw = [
        head(x).view(2, ANCHORS, 9, *x.shape[2:]).permute(0, 1, 3, 4, 2).contiguous()
        for head, x in zip(heads, neck, strict=True)
    ]
    loss = soft_loss()(Outputs(raw, []), outputs(1))
    first, second = (torch.autograd.grad((factor * loss).sum(), neck, retain_graph=True) for factor in (1.0, 3.0))
    assert all(torch.allclose(3 * f, s, rtol=1e-5) and f.any() for f, s in zip(first, second, strict=True))
    loss.backward()
    assert all(torch.allclose(x.grad, f, rtol=1e-5) for x, f in zip(neck, first, strict=True))


def test_the_definition_is_that_of_plain_torch_on_a_cpu():
    """A kernel is asked for nowhere: the function gives the reference itself."""
    found = arguments([(2, 8, 4, 4)], torch.float32)
    assert torch.equal(room.soft_head(*found[:-1]), reference(*found[:-1]))
    assert by_autograd(reference, found, (0,), None).loss == reference(*found[:-1])
    assert head_shape((2, 8, 4, 4)) == tuple(found[0][0].shape)
