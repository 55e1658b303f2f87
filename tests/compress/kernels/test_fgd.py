from __future__ import annotations

import pytest
import torch
from shim.oracle import (
    DTYPES,
    LAYOUTS,
    LOSS_TOLERANCE,
    by_autograd,
    by_kernels,
    check,
    errors,
    kernels_of,
    laid,
    pairs,
    pixel_weights,
    same_bits,
    truth,
    upstream,
)

from compress.kernels import fgd as module
from compress.kernels.device import LevelMaps, level_maps
from compress.kernels.fgd import FGD, SOURCE, Args, reference

fgd = kernels_of(FGD)
SHAPES = [
    (2, 8, 20, 20),
    (3, 5, 7, 9),
    (1, 1, 1, 1),
    (2, 3, 1, 1),
    (1, 1, 8, 8),
    (2, 13, 11, 5),
    (1, 72, 20, 16),  # several tiles of columns, or of rows if channels come last
    (1, 130, 18, 16),  # both
]
LEVELS = [(2, 8, 20, 20), (3, 13, 10, 10), (1, 136, 7, 5)]


@pytest.fixture
def small_tiles(monkeypatch):
    """Small maps are cut into tiles as large ones are."""
    monkeypatch.setattr(module, "LEAST_ROWS", 1)


def arguments(shapes, dtype, *, gamma=1.0, temperature=0.5, **options):
    """Masks are of mean 1 / (2 HW), so that all terms of the loss and of the gradient have about the same size."""
    students, teachers = pairs(shapes, dtype, **options)
    masks = [weights / weights[0].numel() for weights in pixel_weights(shapes)]
    return [students, teachers, masks, gamma, temperature, upstream(students)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_definition(shim_device, dtype, shape, layout):
    check(fgd, reference, shim_device(), arguments([shape], dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_levels_go_in_two_launches(shim_device, dtype, layout):
    device = shim_device()
    check(fgd, reference, device, arguments(LEVELS, dtype, layout=layout))
    assert len(device.launches) == 2


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_tiles_of_an_image_agree_on_its_attention(shim_device, small_tiles, dtype, layout):
    given = arguments([*LEVELS, (1, 130, 18, 16)], dtype, layout=layout)
    check(fgd, reference, shim_device(), given)
    assert max(tiling.row_tiles for tiling in module.tile(level_maps(*given[:2]))) > 1


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("gamma", "temperature"), [(30.0, 0.5), (1e-3, 2.0), (0.0, 0.5)])
def test_every_gamma_and_temperature_is_right(shim_device, gamma, temperature, layout):
    check(
        fgd,
        reference,
        shim_device(),
        arguments(LEVELS, torch.float32, gamma=gamma, temperature=temperature, layout=layout),
    )


@pytest.mark.parametrize("layout", LAYOUTS)
def test_where_the_student_is_zero_its_attention_has_no_gradient(shim_device, layout):
    given = arguments([(2, 8, 9, 7)], torch.float32, gamma=30.0, layout=layout)
    given[0] = [laid(s.relu(), layout) for s in given[0]]
    given[2] = [torch.zeros_like(mask) for mask in given[2]]
    check(fgd, reference, shim_device(), given)
    assert not fgd(shim_device(), *given)[1][0][given[0][0] == 0].any()


@pytest.mark.parametrize("mean", [10.0, -100.0])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_large_mean_costs_no_more_accuracy_than_eager(shim_device, mean, layout):
    given = arguments([(2, 24, 10, 10)], torch.float32, mean=mean, layout=layout)
    true, eager = truth(reference, given), by_autograd(reference, given, (0,), None)
    found = by_kernels(fgd, shim_device(), given)
    assert errors(found, true)[0] <= LOSS_TOLERANCE
    assert errors(found, true)[1] <= 2 * errors(eager, true)[1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_off_the_alignment_are_read_right(shim_device, dtype, layout):
    check(fgd, reference, shim_device(), arguments([(2, 8, 8, 8)], dtype, skip=1, layout=layout))


@pytest.mark.parametrize(("dtype", "layout"), [*zip(DTYPES, ["nchw", "channels_last", "nchw"], strict=True)])
def test_every_schedule_gives_the_same_bits(shim_device, shim, small_tiles, dtype, layout):
    given = arguments(LEVELS, dtype, layout=layout)
    results = [by_kernels(fgd, shim_device(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)


def test_no_partition_depends_on_the_gpu(shim_device):
    from shim.device import H100, ORIN

    given = arguments(LEVELS, torch.float32)
    a, b = (by_kernels(fgd, shim_device(facts=facts), given) for facts in (ORIN, H100))
    assert same_bits(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_maps_give_exactly_zero(shim_device, dtype, layout):
    given = arguments(LEVELS, dtype, layout=layout)
    given[1] = given[0]
    loss, gradients = fgd(shim_device(), *given)
    assert loss == 0
    assert not any(gradient.any() for gradient in gradients)


def test_constant_maps_have_even_attention(shim_device):
    given = arguments([(2, 8, 9, 7)], torch.float32)
    given[0], given[1] = [[torch.full_like(given[0][0], value)] for value in (0.5, -2.0)]
    check(fgd, reference, shim_device(), given)


@pytest.mark.parametrize("of", ["student", "teacher"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("gamma", [0.0, 1.0])
def test_what_is_not_finite_reaches_loss_and_gradient(shim_device, of, bad, gamma):
    given = arguments([(2, 8, 4, 4)], torch.float16, gamma=gamma)
    given[of == "teacher"][0][1, 2, 3, 0] = bad
    loss, (gradient,) = fgd(shim_device(), *given)
    assert not loss.isfinite()
    assert gradient[0].isfinite().all()
    spoiled = ~gradient[1].isfinite()
    assert spoiled.all() if gamma or of == "teacher" else spoiled.nonzero().tolist() == [[2, 3, 0]]


@pytest.mark.parametrize("scale", [None, 1.0, 65536.0, 0.0, -3.0])
def test_the_gradient_carries_the_expected_upstream_gradient(shim_device, scale):
    given = arguments([(2, 8, 9, 7)], torch.float32)
    given[-1] = None
    true = truth(reference, given)
    given[-1] = None if scale is None else torch.tensor(scale)
    found = by_kernels(fgd, shim_device(), given)
    scaled = true._replace(gradients=[(scale or 1.0) * gradient for gradient in true.gradients])
    assert max(errors(found, scaled)) < 2e-6


def test_no_float16_gradient_is_lost_once_scaled(shim_device):
    given = arguments([(2, 32, 20, 20)], torch.float16)
    given[-1] = torch.tensor(65536.0)
    assert (fgd(shim_device(), *given)[1][0] == 0).double().mean() < 1e-3


def test_a_gradient_beyond_float16_becomes_infinite(shim_device):
    given = arguments([(1, 1, 2, 4)], torch.float16)
    given[-1] = torch.tensor(1e8)
    assert fgd(shim_device(), *given)[1][0].isinf().any()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_gradient_keeps_the_layout(shim_device, layout):
    given = arguments([(2, 8, 4, 4)], torch.float32, layout=layout)
    assert fgd(shim_device(), *given)[1][0].stride() == given[0][0].stride()


def test_maps_of_two_layouts_or_dtypes_are_compared_right(shim_device):
    given = arguments([(2, 8, 4, 4)], torch.float32)
    given[1] = [laid(given[1][0], "channels_last").half()]
    check(fgd, reference, shim_device(), given)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("gamma", "passes"), [(1.0, 5), (0.0, 4)])
def test_bytes_are_those_of_two_passes_and_small_maps(shim_device, dtype, layout, gamma, passes):
    device, given = shim_device(), arguments([(1, 256, 40, 40)], dtype, layout=layout, gamma=gamma)
    fgd(device, *given)
    assert sum(device.moved_bytes()) <= (passes + 0.27) * given[0][0].nbytes


@pytest.mark.parametrize("layout", LAYOUTS)
def test_small_maps_move_what_they_must(shim_device, layout):
    n, c, h, w = shape = (2, 32, 40, 40)
    device, given = shim_device(), arguments([shape], torch.float16, layout=layout)
    fgd(device, *given)
    maps = 4 * n * (h * w + c)
    assert sum(device.moved_bytes()) <= 5 * given[0][0].nbytes + 20 * maps


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("images", [1, 16, 32, 48, 64])
def test_all_tiles_of_a_detectors_maps_run_at_once_channels_last(images, layout):
    shapes = [(images, 128, 80, 80), (images, 256, 40, 40), (images, 512, 20, 20)]
    maps = [torch.empty(s, dtype=torch.float16, device="meta", memory_format=LAYOUTS[layout]) for s in shapes]
    tilings = module.tile([LevelMaps(m, m, m) for m in maps])
    assert all((tiling.row_tiles - 1) * tiling.tile_rows < tiling.rows for tiling in tilings)
    if layout == "channels_last":
        assert sum(tiling.tiles for tiling in tilings) <= module.BLOCKS


def test_the_struct_is_that_of_the_source(shim):
    library = shim.build(SOURCE.path, SOURCE.defines)
    assert library.size_of("fgd_sums_f32") == library.size_of("fgd_gradient_f32") == len(bytes(Args()))
