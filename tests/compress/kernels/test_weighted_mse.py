from __future__ import annotations

import pytest
import torch
from shim.oracle import DTYPES, LAYOUTS, by_kernels, check, kernels_of, laid, pairs, pixel_weights, same_bits, upstream

from compress.kernels.weighted_mse import SOURCE, WEIGHTED_MSE, Args, WeightSumArgs, reference

weighted_mse = kernels_of(WEIGHTED_MSE)
SHAPES = [(2, 8, 20, 20), (3, 5, 7, 9), (1, 1, 1, 1), (2, 3, 1, 1), (1, 4, 16, 16), (2, 13, 11, 5)]
LEVELS = [(2, 8, 20, 20), (2, 13, 10, 10), (2, 32, 7, 5)]


def arguments(shapes, dtype, *, weighted=True, **options):
    students, teachers = pairs(shapes, dtype, **options)
    return [students, teachers, pixel_weights(shapes) if weighted else [], upstream(students)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_loss_and_gradient_are_those_of_the_definition(shim_device, dtype, shape, layout, weighted):
    check(weighted_mse, reference, shim_device(), arguments([shape], dtype, weighted=weighted, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_all_levels_go_in_one_launch(shim_device, dtype, weighted):
    device, given = shim_device(), arguments(LEVELS, dtype, weighted=weighted)
    check(weighted_mse, reference, device, given)
    assert len(device.launches) == 1 + weighted


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_maps_off_the_alignment_are_read_right(shim_device, dtype):
    check(weighted_mse, reference, shim_device(), arguments([(2, 8, 8, 8)], dtype, skip=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_gives_the_same_bits(shim_device, shim, dtype):
    given = arguments(LEVELS, dtype)
    results = [by_kernels(weighted_mse, shim_device(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_maps_give_exactly_zero(shim_device, layout):
    given = arguments([(2, 8, 9, 7)], torch.float16, layout=layout)
    given[1] = given[0]
    loss, gradients = weighted_mse(shim_device(), *given)
    assert loss == 0
    assert not gradients[0].any()


def test_weights_that_are_all_zero_give_zero(shim_device):
    given = arguments([(2, 8, 9, 7)], torch.float32)
    given[2] = [torch.zeros_like(w) for w in given[2]]
    loss, gradients = weighted_mse(shim_device(), *given)
    assert loss == 0
    assert not gradients[0].any()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_reaches_loss_and_gradient(shim_device, bad):
    given = arguments([(2, 8, 4, 4)], torch.float16)
    given[0][0][1, 2, 3, 0] = bad
    loss, gradients = weighted_mse(shim_device(), *given)
    assert not loss.isfinite()
    assert (~gradients[0].isfinite()).sum() == 1


def test_a_gradient_beyond_float16_becomes_infinite(shim_device):
    given = arguments([(1, 1, 2, 4)], torch.float16)
    given[-1] = torch.tensor(1e8)
    assert weighted_mse(shim_device(), *given)[1][0].isinf().any()


def test_a_dense_layout_is_read_without_copies_and_the_gradient_keeps_it(shim_device):
    given = arguments([(2, 8, 4, 4)], torch.float32, layout="channels_last")
    gradient = weighted_mse(shim_device(), *given)[1][0]
    assert gradient.stride() == given[0][0].stride()


def test_maps_of_two_layouts_or_dtypes_are_compared_right(shim_device):
    given = arguments([(2, 8, 4, 4)], torch.float32)
    given[1] = [laid(given[1][0], "channels_last").half()]
    check(weighted_mse, reference, shim_device(), given)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("weighted", [False, True], ids=["mean", "weighted"])
def test_bytes_are_those_of_two_maps_read_and_one_written(shim_device, dtype, layout, weighted):
    device, given = shim_device(), arguments([(4, 64, 40, 40)], dtype, layout=layout, weighted=weighted)
    weighted_mse(device, *given)
    assert sum(device.moved_bytes()) <= 3.1 * given[0][0].nbytes


def test_no_partition_depends_on_the_gpu(shim_device):
    from shim.device import A100, H100

    given = arguments(LEVELS, torch.float32)
    a, b = (by_kernels(weighted_mse, shim_device(facts=facts), given) for facts in (A100, H100))
    assert same_bits(a, b)


def test_the_structs_are_those_of_the_source(shim):
    library = shim.build(SOURCE.path, SOURCE.defines)
    assert library.size_of("weighted_mse_f32") == len(bytes(Args()))
    assert library.size_of("weight_sums") == len(bytes(WeightSumArgs()))
