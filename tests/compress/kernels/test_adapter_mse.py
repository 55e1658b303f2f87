from __future__ import annotations

import pytest
import torch
from shim.oracle import (
    DTYPES,
    GRADIENT_TOLERANCE,
    LAYOUTS,
    LOSS_TOLERANCE,
    by_autograd,
    by_kernels,
    check,
    errors,
    gradient_error,
    kernels_of,
    laid,
    same_bits,
    truth,
    upstream,
)
from torch.nn import functional as F

from compress.kernels import adapter_mse as module
from compress.kernels.adapter_mse import ADAPTER_MSE, Args, _Kind, reference, source_of
from runtime.errors import UsageError

adapter_mse = kernels_of(ADAPTER_MSE)
HALVES = [torch.float16, torch.bfloat16]
LEARNS = ADAPTER_MSE.learns
ODD, REAL, NARROW, WIDE = (24, 40), (64, 128), (128, 16), (8, 64)
"""Channels of student and teacher: both padded; v5n's and v5s's at stride 8; a warp with many pieces of dx, or few."""
LEVELS = [
    (3, *ODD, 7, 9),
    (2, *ODD, 20, 20),
    (1, *ODD, 1, 1),
    (2, *WIDE, 11, 5),
    (2, *WIDE, 16, 8),
    (1, *REAL, 10, 8),
    (2, *NARROW, 9, 8),
]
"""Images, channels of student and of teacher, height, width."""
CASES = [*((level, False) for level in LEVELS), *((level, True) for level in LEVELS[:4])]


@pytest.fixture
def make(shim_device):
    """A device whose kernels are built fast."""
    return lambda **keywords: shim_device(optimise="-O1", **keywords)


def arguments(levels, dtype, *, weighted=False, layout="nchw", skip=0, residual=1.0):
    given = [_level(seed, level, dtype, residual) for seed, level in enumerate(levels)]
    students, teachers, matrices, biases, weights = map(list, zip(*given, strict=True))
    students, teachers = ([laid(x.to(dtype), layout, skip) for x in maps] for maps in (students, teachers))
    return [students, teachers, matrices, biases, weights if weighted else [], upstream(students)]


def _level(seed, level, dtype, residual):
    """With a teacher that is the adapted student, except for the residual; W and b are numbers of `dtype`."""
    n, inputs, outputs, h, w = level
    generator = torch.Generator().manual_seed(seed)
    normal = lambda *shape: torch.randn(*shape, generator=generator).to(dtype).float()  # noqa: E731
    student, matrix, bias = 2 * normal(n, inputs, h, w) + 0.7, normal(outputs, inputs) / inputs**0.5, normal(outputs)
    matrix = matrix.to(dtype).float()
    adapted = F.conv2d(student.to(dtype).float(), matrix[:, :, None, None], bias)
    teacher = adapted + residual * normal(n, outputs, h, w)
    return student, teacher, matrix, bias, torch.rand(n, h, w, generator=generator)


def check_as_eager(device, given):
    """For levels that go the general way: it rounds the adapted map, as eager torch does."""
    found, true = by_kernels(adapter_mse, device, given), truth(reference, given, LEARNS)
    eager = by_autograd(reference, given, LEARNS, None)
    tolerances = LOSS_TOLERANCE, GRADIENT_TOLERANCE[given[0][0].dtype]
    for error, by_eager, tolerance in zip(errors(found, true), errors(eager, true), tolerances, strict=True):
        assert error <= max(2 * by_eager, tolerance)


def launched(device):
    return [kernel for kernel, _ in device.launches]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize(("level", "weighted"), CASES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradients_are_those_of_the_definition(make, dtype, level, weighted, layout):
    device = make()
    check(adapter_mse, reference, device, arguments([level], dtype, weighted=weighted, layout=layout), LEARNS)
    assert "adapter_sums" in launched(device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("level", [(2, 5, 7, 7, 9), (1, 136, 16, 4, 4), (2, 3, 1, 1, 1)], ids=str)
@pytest.mark.parametrize(("layout", "weighted"), [("nchw", True), ("channels_last", False)])
def test_what_the_tiles_do_not_fit_goes_the_general_way(make, dtype, level, layout, weighted):
    device = make()
    check_as_eager(device, arguments([level], dtype, weighted=weighted, layout=layout))
    assert "adapter_sums" not in launched(device)


def test_a_gpu_without_the_instructions_goes_the_general_way(make):
    from shim.device import H100

    device = make(facts=H100._replace(capability=(7, 5)))
    check_as_eager(device, arguments([(2, *ODD, 7, 9)], torch.float16))
    assert launched(device) == ["weighted_mse_f16"]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_levels_of_one_kind_go_in_one_launch_and_all_in_one_call(make, dtype, weighted):
    levels = [(2, *ODD, 9, 9), (1, 3, 5, 6, 6), (1, *WIDE, 8, 8), (3, *ODD, 8, 4)]
    device, given = make(), arguments(levels, dtype, weighted=weighted)
    check_as_eager(device, given)
    assert sum(kernel.startswith("adapter_mse") for kernel in launched(device)) == 2
    assert sum(kernel.startswith("weighted_mse") for kernel in launched(device)) == 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("skip", [1, 4])
def test_maps_off_the_alignment_are_read_right(make, layout, skip):
    given = arguments([(2, *ODD, 8, 10)], torch.float16, layout=layout, skip=skip)
    check(adapter_mse, reference, make(), given, LEARNS)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_of_two_layouts_or_dtypes_are_compared_right(make, layout):
    given = arguments([(2, *ODD, 8, 10)], torch.bfloat16, layout=layout)
    (other,) = LAYOUTS.keys() - {layout}
    given[1] = [laid(t.float(), other) for t in given[1]]
    check(adapter_mse, reference, make(), given, LEARNS)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(make, shim, dtype, layout):
    given = arguments([LEVELS[0], (1, *ODD, 12, 24)], dtype, weighted=True, layout=layout)
    results = [by_kernels(adapter_mse, make(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)


def test_no_partition_depends_on_the_gpu(make):
    from shim.device import A100, H100

    given = arguments([LEVELS[1]], torch.float16)
    a, b = (by_kernels(adapter_mse, make(facts=facts), given) for facts in (A100, H100))
    assert same_bits(a, b)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_near_the_teacher_the_gradient_keeps_its_precision(make, dtype, layout):
    """A case in which plain torch rounds the adapted map, and loses the small difference."""
    given = arguments([(2, *ODD, 8, 10)], dtype, layout=layout, residual=0.03)
    check(adapter_mse, reference, make(), given, LEARNS)


@pytest.mark.parametrize("level", [(1, *ODD, 4, 4), (1, 5, 7, 4, 4)], ids=str)
def test_matrix_and_bias_are_used_in_the_dtype_of_the_maps(make, level):
    given = arguments([level], torch.bfloat16)
    given[2:4] = [[x + 1e-4 for x in adapter] for adapter in given[2:4]]
    rounded = [*given[:2], *([x.bfloat16().float() for x in adapter] for adapter in given[2:4]), *given[4:]]
    assert same_bits(*(by_kernels(adapter_mse, make(), each) for each in (given, rounded)))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_adapted_map_that_is_the_teacher_gives_exactly_zero(make, layout):
    given = arguments([(2, *ODD, 9, 7)], torch.float16, layout=layout)
    given[1] = [torch.cat([s, torch.full_like(s[:, :16], 0.5)], 1) for s in given[0]]
    given[2], given[3] = [torch.eye(40, 24)], [0.5 * (torch.arange(40) >= 24)]
    loss, gradients = adapter_mse(make(), *given)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("where", [0, 1], ids=["student", "teacher"])
def test_what_is_not_finite_reaches_loss_and_gradients_and_no_other_pixel(make, layout, bad, where):
    given = arguments([(2, *ODD, 9, 9)], torch.float16, layout=layout)
    given[where][0][1, 2, 8, 8] = bad  # the last pixel, beside those that pad the tile
    loss, (dx, dw, db) = adapter_mse(make(), *given)
    assert not loss.isfinite()
    assert not dx[1, :, 8, 8].isfinite().any()
    assert (~dx.isfinite()).sum() == dx.shape[1]
    assert not dw.isfinite().all()
    assert not db.isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weight", [1e-6, 1e6])
def test_the_size_of_the_weights_does_not_matter(make, layout, weight):
    given = arguments([(2, *ODD, 9, 8)], torch.float16, weighted=True, layout=layout)
    given[4] = [weight * w for w in given[4]]
    check(adapter_mse, reference, make(), given, LEARNS)


def test_one_pixel_may_have_all_the_weight(make):
    given = arguments([(2, *ODD, 9, 8)], torch.float16, weighted=True)
    given[4] = [torch.zeros_like(w) for w in given[4]]
    given[4][0][1, 2, 3] = 1.0
    check(adapter_mse, reference, make(), given, LEARNS)


def test_weights_that_are_all_zero_give_zero(make):
    given = arguments([(2, *ODD, 9, 7)], torch.float16, weighted=True)
    given[4] = [torch.zeros_like(w) for w in given[4]]
    loss, gradients = adapter_mse(make(), *given)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


@pytest.mark.parametrize("scale", [65536.0, -4.0, 0.0])
def test_the_scale_multiplies_every_gradient_before_it_is_rounded(make, scale):
    given = arguments([(2, *ODD, 9, 7)], torch.bfloat16)
    given[-1] = None
    plain = by_kernels(adapter_mse, make(), given)
    given[-1] = torch.tensor(scale)
    scaled = by_kernels(adapter_mse, make(), given)
    assert torch.equal(plain.loss, scaled.loss)
    assert all(torch.equal((scale or 1) * a, b) for a, b in zip(plain.gradients, scaled.gradients, strict=True))


def test_without_a_scale_float16_keeps_the_gradients_of_the_adapter(make):
    given = arguments([(1, *ODD, 20, 20)], torch.float16)
    given[0] = [s / 64 for s in given[0]]
    given[1] = [F.conv2d(s, m.half()[:, :, None, None]) + t / 2**12 for s, t, m in zip(*given[:3], strict=True)]
    given[3] = [torch.zeros_like(b) for b in given[3]]
    given[-1] = None
    found, true = by_kernels(adapter_mse, make(), given), truth(reference, given, LEARNS)
    assert gradient_error(found.gradients[1], true.gradients[1]) < 6e-4
    assert gradient_error(found.gradients[2], true.gradients[2]) < 6e-4


def test_a_gradient_beyond_float16_becomes_infinite(make):
    given = arguments([(1, *ODD, 2, 4)], torch.float16)
    given[-1] = torch.tensor(1e9)
    _, (dx, dw, _) = adapter_mse(make(), *given)
    assert dx.isinf().any()
    assert not dx.isnan().any()
    assert dw.isfinite().all()


@pytest.mark.parametrize("level", [(2, *ODD, 4, 4), (2, 5, 7, 4, 4)], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradients_have_the_layout_of_the_student_and_float32(make, level, layout):
    given = arguments([level], torch.float16, layout=layout)
    _, (dx, dw, db) = adapter_mse(make(), *given)
    assert dx.dtype == torch.float16
    assert dx.stride() == given[0][0].stride()
    assert dw.dtype == db.dtype == torch.float32


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_each_map_is_moved_once(make, layout, weighted):
    device, given = make(), arguments([(2, *REAL, 40, 40)], torch.float16, layout=layout, weighted=weighted)
    adapter_mse(device, *given)
    read, written = device.moved_bytes()
    student, teacher = given[0][0].nbytes, given[1][0].nbytes
    blocks = 13  # of 50 tiles; each reads W and b and writes as many numbers, which are read again
    adapter = 4 * (REAL[0] + 1) * REAL[1]
    weights = 2 * given[4][0].nbytes if weighted else 0
    assert read <= 1.001 * (student + teacher) + 2 * blocks * adapter + weights
    assert written <= 1.001 * student + (blocks + 1) * adapter


def test_every_pair_of_channels_fits_the_smallest_shared_memory():
    sizes = range(8, 129, 8)
    kinds = [_Kind(s, t, last) for s in sizes for t in sizes for last in (False, True)]
    assert max(kind.shared_bytes for kind in kinds) + 256 <= 99 << 10


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [
        (_Kind(64, 128, True), 2),
        (_Kind(64, 128, False), 1),
        (_Kind(72, 128, True), 1),
        (_Kind(64, 64, True), 4),
        (_Kind(64, 16, True), 8),  # as many as shared memory holds
        (_Kind(128, 64, False), 2),
    ],
    ids=str,
)
def test_a_multiprocessor_runs_as_many_blocks_as_registers_and_shared_memory_allow(kind, blocks):
    assert kind.blocks_per_sm == blocks
    assert blocks * (kind.shared_bytes + 1024) <= 228 << 10


def test_an_adapter_of_another_shape_is_refused():
    given = arguments([(2, *ODD, 4, 4)], torch.float16)
    given[2] = [given[2][0].mT]
    with pytest.raises(UsageError, match=r"\(24, 40\)"):
        module.adapter_mse(*given[:-1])


def test_the_structs_are_those_of_the_source(shim):
    source = source_of(_Kind(*ODD, False))
    library = shim.build(source.path, source.defines, optimise="-O1")
    assert library.size_of("adapter_mse_f16") == library.size_of("adapter_sums") == len(bytes(Args()))
