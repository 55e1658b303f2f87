from __future__ import annotations

import pytest
import torch
from shim.oracle import DTYPES, LAYOUTS, by_kernels, check, errors, kernels_of, laid, pairs, same_bits, truth, upstream

from compress.kernels import cwd as module
from compress.kernels.cwd import CWD, SOURCE, ColumnsArgs, RowsArgs, reference
from runtime.errors import UsageError

cwd = kernels_of(CWD)
SHAPES = [
    (2, 8, 20, 20),  # one warp per row
    (3, 5, 7, 9),
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (1, 3, 40, 40),  # four warps per row
    (2, 13, 11, 5),
    (1, 40, 33, 40),  # several stretches of pixels
    (1, 320, 3, 50),  # several tiles of channels
]
LONG = [(1, 2, 80, 80), (1, 2, 64, 128), (1, 2, 100, 100), (1, 1, 97, 101)]  # 8192 values are the most of a held row
NAN, INF = float("nan"), float("inf")


def arguments(shapes, dtype, *, tau=1.0, **options):
    students, teachers = pairs(shapes, dtype, **options)
    return [students, teachers, tau, upstream(students)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_definition(shim_device, dtype, shape, layout):
    check(cwd, reference, shim_device(), arguments([shape], dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", LONG, ids=str)
def test_rows_of_any_length_are_read_whole(shim_device, dtype, shape):
    check(cwd, reference, shim_device(), arguments([shape], dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_levels_go_in_one_launch_a_pass(shim_device, dtype, layout):
    device = shim_device()
    check(cwd, reference, device, arguments([LONG[0], *SHAPES[:3]], dtype, layout=layout))
    assert len(device.launches) == (2 if layout == "channels_last" else 1)


@pytest.mark.parametrize("tau", [0.25, 4.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_temperature_is_that_of_the_definition(shim_device, layout, tau):
    check(cwd, reference, shim_device(), arguments(SHAPES[:2], torch.float32, layout=layout, tau=tau))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_off_the_alignment_are_read_right(shim_device, dtype, layout):
    check(cwd, reference, shim_device(), arguments([(2, 8, 8, 24)], dtype, layout=layout, skip=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(shim_device, shim, dtype, layout):
    given = arguments([SHAPES[0], SHAPES[4], SHAPES[6]], dtype, layout=layout)
    results = [by_kernels(cwd, shim_device(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)


@pytest.mark.parametrize("shape", [(3, 7, 24, 24), (1, 7, 100, 100)], ids=["held", "streamed"])
def test_a_block_that_takes_many_rows_keeps_them_apart(shim_device, shim, monkeypatch, shape):
    monkeypatch.setattr("compress.kernels.cwd.BLOCKS", 1)
    given = arguments([shape], torch.float32)
    results = [by_kernels(cwd, shim_device(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)
    check(cwd, reference, shim_device(), given)


@pytest.mark.parametrize("mean", [30.0, -3000.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_huge_mean_costs_no_accuracy(shim_device, layout, mean):
    check(cwd, reference, shim_device(), arguments([SHAPES[0], SHAPES[6]], torch.float32, layout=layout, mean=mean))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[1], LONG[2]], ids=str)
def test_equal_maps_give_exactly_zero(shim_device, layout, shape):
    given = arguments([shape], torch.float16, layout=layout)
    loss, gradients = cwd(shim_device(), given[0], given[0], *given[2:])
    assert loss == 0
    assert not gradients[0].any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_constant_channel_is_a_uniform_distribution(shim_device, layout):
    given = arguments([(2, 8, 9, 7)], torch.float32, layout=layout)
    given[0][0][:, 3] = 5.0
    given[1][0][:, 3] = -7.0
    given[0][0][:, 4] = 5.0
    found = by_kernels(cwd, shim_device(), given)
    assert not found.gradients[0][:, 3].any()
    check(cwd, reference, shim_device(), given)


@pytest.mark.parametrize("bad", [NAN, INF])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(2, 8, 4, 4), (2, 8, 5, 5), (1, 2, 32, 32), (1, 2, 96, 96)], ids=str)
@pytest.mark.parametrize("of", [0, 1], ids=["student", "teacher"])
def test_what_is_not_finite_reaches_the_loss_and_the_whole_row(shim_device, layout, shape, bad, of):
    given = arguments([shape], torch.float16, layout=layout)
    given[of][0][0, 1, 2, 3] = bad
    loss, gradients = cwd(shim_device(), *given)
    assert loss.isnan()
    assert gradients[0][0, 1].isnan().all()
    assert gradients[0].isnan().sum() == shape[2] * shape[3]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("shape", [(1, 8, 4, 4), (1, 8, 5, 5), (1, 8, 32, 32), (1, 2, 96, 96)], ids=str)
def test_minus_infinity_is_a_probability_of_zero(shim_device, layout, shape):
    given = arguments([shape], torch.float32, layout=layout)
    given[0][0][0, 1, :, 0] = given[0][0][0, 1, 1, :] = -INF
    found, true = by_kernels(cwd, shim_device(), given), truth(reference, given)
    assert found.loss == true.loss == INF
    assert errors(found._replace(loss=true.loss), true)[1] < 2e-6


def test_a_gradient_beyond_float16_becomes_infinite(shim_device):
    given = arguments([(1, 1, 2, 4)], torch.float16)
    given[-1] = torch.tensor(1e8)
    assert cwd(shim_device(), *given)[1][0].isinf().any()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("scale", [1.0, 65536.0, -3.0])
def test_the_gradient_is_scaled_and_the_loss_is_not(shim_device, layout, scale):
    given = arguments([SHAPES[0]], torch.float32, layout=layout)
    given[-1] = torch.tensor(scale)
    check(cwd, reference, shim_device(), given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_scale_and_a_scale_of_zero_are_one(shim_device, layout):
    given = arguments([SHAPES[0]], torch.float32, layout=layout)[:-1]
    results = [by_kernels(cwd, shim_device(), [*given, scale]) for scale in (None, torch.zeros(()), torch.ones(()))]
    assert same_bits(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_scaled_gradient_does_not_underflow(shim_device, layout):
    """As at stride 8 of a batch of 32: without the scale 60 % of it would be 0."""
    given = arguments([(1, 8, 80, 80)], torch.float16, layout=layout)
    given[-1] = torch.tensor(65536.0 / 4096 * 8)
    gradient = cwd(shim_device(), *given)[1][0]
    assert (gradient == 0).sum() < 1e-3 * gradient.numel()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_layout_is_read_without_copies_and_the_gradient_keeps_it(shim_device, layout):
    given = arguments([(2, 8, 4, 4)], torch.float32, layout=layout)
    gradient = cwd(shim_device(), *given)[1][0]
    assert gradient.stride() == given[0][0].stride()


def test_levels_of_two_layouts_are_compared_right_and_keep_them(shim_device):
    device, given = shim_device(), arguments([(2, 8, 4, 4), (2, 5, 3, 3)], torch.float32)
    given[0][0] = laid(given[0][0], "channels_last")
    check(cwd, reference, device, given)
    assert [name for name, _ in device.launches] == ["cwd_rows_f32"]
    assert [g.stride() for g in cwd(device, *given)[1]] == [s.stride() for s in given[0]]


def test_a_level_that_is_dense_both_ways_goes_with_the_others(shim_device):
    device, given = shim_device(), arguments([(2, 8, 4, 4), (2, 8, 1, 1)], torch.float32, layout="channels_last")
    given[0][1] = given[0][1].contiguous()
    check(cwd, reference, device, given)
    assert len(device.launches) == 2


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_teacher_of_another_layout_or_dtype_is_compared_right(shim_device, layout):
    given = arguments([(2, 8, 4, 4)], torch.float32, layout=layout)
    other = "nchw" if layout == "channels_last" else "channels_last"
    given[1] = [laid(given[1][0], other).half()]
    check(cwd, reference, shim_device(), given)


def test_a_view_with_holes_is_compared_right(shim_device):
    given = arguments([(2, 8, 4, 16)], torch.float32)
    given[0] = [given[0][0][..., ::2]]
    given[1] = [given[1][0][..., ::2]]
    check(cwd, reference, shim_device(), given)


@pytest.mark.parametrize("tau", [0.0, -1.0, NAN])
def test_a_temperature_that_is_not_above_zero_is_refused(tau):
    with pytest.raises(UsageError, match="temperature"):
        module.cwd(*arguments([(1, 1, 2, 2)], torch.float32, tau=tau)[:-1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_are_moved_once(shim_device, dtype):
    device, given = shim_device(), arguments([(2, 32, 40, 40)], dtype)
    cwd(device, *given)
    read, written = device.moved_bytes()
    unit = given[0][0].nbytes
    assert read <= 2.02 * unit
    assert written <= 1.01 * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_long_rows_are_read_twice_and_written_once(shim_device, dtype):
    device, given = shim_device(), arguments([(1, 2, 160, 160)], dtype)
    cwd(device, *given)
    read, written = device.moved_bytes()
    unit = given[0][0].nbytes
    assert read <= 4.01 * unit
    assert written <= 1.01 * unit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_columns_are_read_twice_and_written_once(shim_device, dtype):
    device, given = shim_device(), arguments([(2, 64, 40, 40)], dtype, layout="channels_last")
    cwd(device, *given)
    read, written = device.moved_bytes()
    unit, per_thread = given[0][0].nbytes, 16 * dtype.itemsize  # bytes of the 16 pixels of a channel
    assert read <= 4.15 * unit + unit * 16 / per_thread * 1.25  # a thread reads its channels' 4 float32, from the cache
    assert written <= 1.04 * unit


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_partition_depends_on_the_gpu(shim_device, layout):
    from shim.device import A100, H100

    given = arguments(SHAPES[:3], torch.float32, layout=layout)
    a, b = (by_kernels(cwd, shim_device(facts=facts), given) for facts in (A100, H100))
    assert same_bits(a, b)


def test_the_structs_are_those_of_the_source(shim):
    library = shim.build(SOURCE.path, SOURCE.defines)
    assert library.size_of("cwd_rows_f32") == len(bytes(RowsArgs()))
    assert library.size_of("cwd_column_sums_f32") == len(bytes(ColumnsArgs()))
    assert library.size_of("cwd_columns_f32") == len(bytes(ColumnsArgs()))
