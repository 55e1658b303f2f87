from __future__ import annotations

import weakref
from functools import partial

import pytest
import torch
from shim.oracle import (
    DTYPES,
    LAYOUTS,
    LOSS_TOLERANCE,
    by_kernels,
    check,
    errors,
    kernels_of,
    laid,
    pairs,
    same_bits,
    truth,
    upstream,
)

from compress.kernels import pkd as module
from compress.kernels.device import Facts, LevelMaps, level_maps, vector
from compress.kernels.pkd import PKD, SOURCE, Args, reference
from runtime.errors import UsageError

pkd = kernels_of(PKD)
SHAPES = [(2, 8, 20, 20), (3, 5, 7, 9), (1, 1, 1, 1), (3, 3, 1, 1), (1, 4, 16, 16), (2, 13, 11, 5), (5, 72, 2, 4)]
LEVELS = [(2, 3, 48, 48), (2, 13, 8, 8), (2, 20, 7, 5)]
WHOLE = [(2, 2, 20, 20), (2, 5, 8, 8), (3, 6, 4, 4)]
"""Levels that clusters serve in every dtype."""
DETECTOR = [(32, 128, 80, 80), (32, 256, 40, 40), (32, 512, 20, 20)]


def arguments(shapes, dtype, **options):
    students, teachers = pairs(shapes, dtype, **options)
    return [students, teachers, upstream(students)]


@pytest.fixture
def small_pieces(monkeypatch):
    """Small maps are split among blocks as large ones are."""
    monkeypatch.setattr(module, "SPLIT_SAMPLES", 1000)
    monkeypatch.setattr(module, "LAST_BLOCK_BYTES", 1 << 10)


def cluster_facts(shape, dtype, cluster):
    """Facts of a GPU whose shared memory makes `cluster` the smallest that holds a channel."""
    n, _, h, w = shape
    vectors = n * h * w // vector(dtype)
    shared = module.CLUSTER_HEAD_BYTES + 32 * -(-vectors // cluster)
    return Facts((9, 0), 50 << 20, shared)


# ---- loss and gradient --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_are_those_of_the_definition(shim_device, dtype, shape, layout):
    check(partial(pkd, form="plain"), reference, shim_device(), arguments([shape], dtype, layout=layout))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_blocks_that_share_a_channel_agree_on_it(shim_device, small_pieces, dtype, layout):
    device, given = shim_device(), arguments(LEVELS, dtype, layout=layout)
    check(partial(pkd, form="plain"), reference, device, given)
    assert len(device.launches) == 2
    levels = module.describe(level_maps(*given[:2]))
    assert all(level.splits > 1 for level in levels if level.samples > 1000)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cluster", module.CLUSTER_SIZES)
def test_a_cluster_agrees_on_its_channel(shim_device, dtype, cluster):
    shape = (3, 3, 4, 10 * vector(dtype) // 4)  # 30 vectors per channel: no even share for 4 or 8 blocks
    device = shim_device(facts=cluster_facts(shape, dtype, cluster))
    given = arguments([shape], dtype)
    check(partial(pkd, form="cluster"), reference, device, given)
    levels = module.describe(level_maps(*given[:2]))
    assert [launch.cluster for launch in module.plan(device.facts, levels, "cluster")] == [cluster]
    assert len(device.launches) == 1


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_levels_of_every_form_go_in_one_call(shim_device, dtype):
    given = arguments([*WHOLE[:2], (2, 20, 7, 5), (2, 8, 8, 8)], dtype)
    device = shim_device(facts=cluster_facts(WHOLE[0], dtype, 4))
    given[0][3] = laid(given[0][3], "channels_last")
    check(pkd, reference, device, given)
    names = [name.removesuffix(module.SUFFIX[dtype]) for name, _ in device.launches]
    # By clusters of 1 and of 4; 35 pixels are no whole vectors; and the last level is channels last.
    assert names == [*["pkd_cluster"] * 2, "pkd_statistics", "pkd_gradient", "pkd_statistics_last", "pkd_gradient_last"]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_maps_off_the_alignment_are_read_right(shim_device, dtype, layout):
    check(pkd, reference, shim_device(), arguments([(2, 8, 8, 8)], dtype, layout=layout, skip=1))


def test_maps_of_two_layouts_or_dtypes_are_compared_right(shim_device):
    given = arguments([(2, 8, 4, 4)], torch.float32)
    given[1] = [laid(given[1][0], "channels_last").half()]
    check(pkd, reference, shim_device(), given)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_dense_layout_is_read_without_copies_and_the_gradient_keeps_it(shim_device, layout):
    given = arguments([(2, 8, 4, 4)], torch.float32, layout=layout)
    device = shim_device()
    gradient = pkd(device, *given)[1][0]
    assert gradient.stride() == given[0][0].stride()
    assert any("_last_" in name for name, _ in device.launches) == (layout == "channels_last")


# ---- the same bits ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_schedule_gives_the_same_bits(shim_device, shim, small_pieces, dtype, layout):
    given = arguments(LEVELS, dtype, layout=layout)
    results = [by_kernels(partial(pkd, form="plain"), shim_device(seed=seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_schedule_of_a_cluster_gives_the_same_bits(shim_device, shim, dtype):
    given, facts = arguments(WHOLE, dtype), cluster_facts(WHOLE[0], dtype, 8)
    results = [by_kernels(partial(pkd, form="cluster"), shim_device(facts, seed), given) for seed in shim.SEEDS]
    assert same_bits(*results)
    assert errors(results[0], truth(reference, given))[0] < 1e-5


def test_groups_of_channels_give_the_bits_of_all_at_once(shim_device, monkeypatch):
    monkeypatch.setattr(module, "MIN_GROUP_BYTES", 0)
    given = arguments(LEVELS, torch.float16)
    small = shim_device(facts=Facts((8, 0), 50_000, 160 << 10))
    grouped, plain = by_kernels(pkd, small, given), by_kernels(partial(pkd, form="plain"), shim_device(), given)
    assert len(small.launches) > 6
    assert same_bits(grouped, plain)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_no_partition_depends_on_the_gpu(shim_device, layout):
    from shim.device import A100, ORIN

    given = arguments(LEVELS, torch.float32, layout=layout)
    a, b = (by_kernels(pkd, shim_device(facts=facts), given) for facts in (A100, ORIN))
    assert same_bits(a, b)


# ---- special values -----------------------------------------------------------------------------------------------

FORMS = [("nchw", "plain"), ("channels_last", "plain"), ("nchw", "cluster")]


@pytest.fixture(params=FORMS, ids="-".join)
def form(request):
    """Layout and form."""
    return request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equal_maps_give_exactly_zero_constant_channels_included(shim_device, form, dtype):
    given = arguments([(2, 8, 8, 8)], dtype, layout=form[0], mean=3.0)
    given[0][0][:, 2] = 7.7
    given[1] = given[0]
    loss, gradients = pkd(shim_device(), *given, form=form[1])
    assert loss == 0
    assert not gradients[0].any()


@pytest.mark.parametrize("constant", [(0,), (1,), (0, 1)], ids=["student", "teacher", "both"])
def test_a_constant_channel_has_a_finite_gradient(shim_device, form, constant):
    given = arguments([(2, 8, 8, 8)], torch.float32, layout=form[0])
    for which in constant:
        given[which][0][:, 2] = 7.7
    check(partial(pkd, form=form[1]), reference, shim_device(), given)


@pytest.mark.parametrize("mean", [30.0, 3e4])
def test_a_large_mean_costs_no_accuracy(shim_device, form, mean):
    given = arguments([(2, 8, 16, 16)], torch.float32, layout=form[0], mean=mean)
    found, true = by_kernels(partial(pkd, form=form[1]), shim_device(), given), truth(reference, given)
    loss, gradient = errors(found, true)
    assert gradient < 3e-8 * mean  # the mean itself is rounded to float32, as in torch
    assert loss < LOSS_TOLERANCE


def test_a_corner_unlike_the_rest_costs_no_accuracy(shim_device, form):
    given = arguments([(2, 8, 16, 16)], torch.float32, layout=form[0])
    given[0][0][0, :, 0, 0] += 50
    given[1][0][0, :, 0, 0] -= 25
    check(partial(pkd, form=form[1]), reference, shim_device(), given)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("which", [0, 1], ids=["student", "teacher"])
def test_what_is_not_finite_reaches_loss_and_gradient_of_its_channel(shim_device, form, bad, which):
    given = arguments([(2, 8, 8, 8)], torch.float16, layout=form[0])
    given[which][0][1, 2, 3, 0] = bad
    loss, gradients = pkd(shim_device(), *given, form=form[1])
    assert loss.isnan()
    assert gradients[0][:, 2].isnan().all()
    assert gradients[0].isnan().sum() == gradients[0][:, 2].numel()


@pytest.mark.parametrize("factor", [None, 1.0, 65536.0, -3.0])
def test_the_expected_upstream_gradient_is_folded_in(shim_device, form, factor):
    given = arguments([(2, 8, 8, 8)], torch.float32, layout=form[0])
    given[-1] = None if factor is None else torch.tensor(factor)
    check(partial(pkd, form=form[1]), reference, shim_device(), given)


def test_an_upstream_gradient_of_zero_is_read_as_one(shim_device, form):
    given = arguments([(2, 8, 8, 8)], torch.float32, layout=form[0])
    a, b = (
        by_kernels(partial(pkd, form=form[1]), shim_device(), [*given[:2], scale]) for scale in (torch.zeros(()), None)
    )
    assert same_bits(a, b)


def test_no_float16_gradient_is_lost_under_a_scale(shim_device, form):
    given = arguments([(2, 8, 8, 8)], torch.float16, layout=form[0])
    given[-1] = torch.tensor(65536.0 * given[0][0].numel() / (32 * 128 * 80 * 80))  # as large as those of that map
    gradient = pkd(shim_device(), *given, form=form[1])[1][0]
    assert (gradient == 0).float().mean() < 1e-3


def test_a_gradient_beyond_float16_becomes_infinite(shim_device, form):
    given = arguments([(2, 8, 4, 4)], torch.float16, layout=form[0])
    given[-1] = torch.tensor(1e9)
    assert pkd(shim_device(), *given, form=form[1])[1][0].isinf().any()


# ---- traffic and plans --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bytes_are_those_of_five_maps_or_by_clusters_of_three(shim_device, form, dtype):
    device, given = shim_device(), arguments([(2, 32, 40, 40)], dtype, layout=form[0])
    pkd(device, *given, form=form[1])
    units = sum(device.moved_bytes()) / given[0][0].nbytes
    assert units < {"plain": 5.05, "cluster": 3.05}[form[1]] + 0.1 * (form[0] == "channels_last")


def planned(shapes, facts, dtype=torch.float16, layout="nchw", form="auto"):
    """Levels of maps that need no memory, and the launches for them."""
    maps = [torch.empty(s, dtype=dtype, device="meta", memory_format=LAYOUTS[layout]) for s in shapes]
    levels = module.describe([LevelMaps(m, m, m) for m in maps])
    return levels, module.plan(facts, levels, form)


def covered(levels, launches):
    """For each level, how often each channel is launched."""
    counts = [torch.zeros(level.channels, dtype=torch.int32) for level in levels]
    for launch in launches:
        assert len(launch.parts) <= module.MAX_LEVELS
        for part in launch.parts:
            counts[part.level][part.begin : part.end] += 1
    return torch.cat(counts)


def test_a_detectors_maps_run_by_clusters_on_hopper(shim):
    from shim.device import H100

    levels, launches = planned(DETECTOR, H100)
    assert [launch.cluster for launch in launches] == [1, 2, 8]
    assert (covered(levels, launches) == 1).all()


def test_groups_of_channels_fit_the_l2_cache(shim):
    from shim.device import A100

    levels, launches = planned(DETECTOR, A100)
    assert not any(launch.cluster for launch in launches)
    assert all(sum(part.nbytes for part in launch.parts) <= module.L2_SHARE * A100.l2_bytes for launch in launches)
    assert len(launches) == 7 + 4 + 2
    assert (covered(levels, launches) == 1).all()


@pytest.mark.parametrize(
    ("facts", "layout", "shapes"),
    [("ORIN", "nchw", DETECTOR), ("A100", "channels_last", DETECTOR), ("A100", "nchw", LEVELS)],
)
def test_two_passes_are_two_launches_where_the_cache_is_small_or_the_maps_are(shim, facts, layout, shapes):
    from shim import device

    levels, launches = planned(shapes, getattr(device, facts), layout=layout)
    assert len(launches) == 1
    assert (covered(levels, launches) == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "shape", [(64, 1024, 20, 20), (64, 1024, 80, 80), (256, 2048, 160, 160), (1, 1, 4096, 4096)], ids=str
)
def test_any_size_has_a_plan(shim, shape, layout):
    from shim.device import A100, H100, ORIN

    for facts in (A100, H100, ORIN):
        levels, launches = planned([shape], facts, layout=layout)
        assert (covered(levels, launches) == 1).all()
        work = module._Workspace(_Nowhere(), levels)
        for launch in launches:
            blocks = module._fill(Args(), levels, work, launch.parts, launch.cluster)
            assert 0 < blocks < 1 << 31
        records = levels[0].tiles * levels[0].splits * levels[0].tile * module.MOMENTS * 4
        assert records < max(1 << 20, 2e-3 * levels[0].maps.student.nbytes)


class _Nowhere:
    def tickets(self, count):
        return torch.empty(count, dtype=torch.int32, device="meta")


def test_clusters_are_refused_where_there_are_none(shim_device):
    from shim.device import A100

    given = arguments([(2, 8, 8, 8)], torch.float16)
    device = shim_device(facts=A100)
    with pytest.raises(UsageError, match=r"8\.0"):
        pkd(device, *given, form="cluster")
    pkd(device, *given)
    assert not any("cluster" in name for name, _ in device.launches)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_clusters_are_refused_for_maps_that_do_not_fit(shim_device, layout):
    given = arguments([(2, 8, 20, 20) if layout == "nchw" else (2, 8, 8, 8)], torch.float16, layout=layout)
    with pytest.raises(UsageError, match="NCHW"):
        pkd(shim_device(facts=Facts((9, 0), 50 << 20, 1024)), *given, form="cluster")


def test_the_structs_are_those_of_the_source(shim):
    library = shim.build(SOURCE.path, SOURCE.defines)
    assert library.size_of("pkd_statistics_f32") == len(bytes(Args()))


def test_tickets_are_not_given_away_before_the_last_launch(shim_device, monkeypatch):
    """Each captured graph gets new ones, whose memory another tensor would take: with tests' poison, it is then NaN."""
    device, given = shim_device(), []

    def tickets(count):
        fresh = torch.zeros(count, dtype=torch.int32)
        given.append(weakref.ref(fresh))
        return fresh

    def launch(asked):
        assert all(ticket() is not None for ticket in given)
        queue(asked)

    queue = device.launch
    monkeypatch.setattr(device, "tickets", tickets)
    monkeypatch.setattr(device, "launch", launch)
    pkd(device, *arguments(LEVELS, torch.float32))
    assert given
