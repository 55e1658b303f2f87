from __future__ import annotations

from pathlib import Path

import pytest

from compress.kernels import model
from compress.kernels.bench_case import HEAD_LOSS, Case
from compress.kernels.device import Launch
from compress.kernels.losses import FUSED
from compress.kernels.model import CARDS, KERNELS, LATENCY_US, LAUNCH_US, SECTOR_BYTES, TRIP_US, Kernel
from compress.kernels.toolchain import FOLDER
from compress.kernels.weighted_mse import SOURCE, Args

H100 = CARDS["H100"]
STREAMING = Kernel(2, 1, registers=32, loads=4)
"""Eight blocks of 256 threads have 128 KB under way on each multiprocessor."""
CASES = model.cases()


def launch(grid=8 * H100.multiprocessors, block=256, **more):
    return Launch(SOURCE, "weighted_mse_f16", Args(), grid, block, **more)


@pytest.mark.parametrize(
    ("registers", "threads", "shared", "blocks"),
    [
        (32, 256, 0, 8),  # all 2048 threads
        (33, 256, 0, 6),  # 40 are taken
        (64, 256, 0, 4),
        (64, 512, 0, 2),
        (80, 256, 0, 3),
        (128, 256, 0, 2),
        (192, 256, 0, 1),
        (32, 512, 102 << 10, 2),
        (32, 512, 113 << 10, 2),  # with the reserved KB, exactly half
        (32, 512, 114 << 10, 1),
        (16, 32, 0, 32),  # the most there can be
    ],
)
def test_blocks_of_a_multiprocessor_are_bound_by_what_runs_out_first(registers, threads, shared, blocks):
    assert model.blocks_per_sm(registers, threads, shared) == blocks


@pytest.mark.parametrize(
    ("grid", "slots", "expected"),
    [(264, 264, [264]), (8, 264, [8]), (800, 264, [264, 264, 264, 8]), (528, 264, [264, 264])],
)
def test_blocks_run_in_waves(grid, slots, expected):
    assert model.waves(grid, slots) == expected


def test_bandwidth_is_bytes_under_way_over_latency_until_it_is_used_up():
    needed = 1e6 * H100.stream_tb_s * LATENCY_US
    assert model.bandwidth_tb_s(H100, needed / 2) == pytest.approx(H100.stream_tb_s / 2)
    assert model.bandwidth_tb_s(H100, needed) == pytest.approx(H100.stream_tb_s)
    assert model.bandwidth_tb_s(H100, 2 * needed) == H100.stream_tb_s
    assert 17e3 < needed / H100.multiprocessors < 20e3


def test_a_kernel_with_enough_under_way_takes_as_long_as_the_stream():
    map_bytes = 50e6
    found = model.estimate(H100, STREAMING, launch(), map_bytes)
    assert found.us == pytest.approx(LAUNCH_US + 3 * map_bytes / H100.stream_tb_s / 1e6)
    assert (found.blocks, found.waves, found.moved_bytes) == (8, 1.0, 3 * map_bytes)
    assert found.under_way_bytes == 8 * 256 * 4 * 16


def test_round_trips_come_to_it_for_clusters_in_every_wave():
    kernel = STREAMING._replace(trips=5)
    extra = lambda **more: (  # noqa: E731
        model.estimate(H100, kernel, launch(grid=16 * H100.multiprocessors, **more), 50e6).us
        - model.estimate(H100, STREAMING, launch(grid=16 * H100.multiprocessors, **more), 50e6).us
    )
    assert extra() == pytest.approx(5 * TRIP_US)
    assert extra(cluster=2) == pytest.approx(2 * 5 * TRIP_US)


def test_a_kernel_with_too_little_under_way_is_slower_in_proportion():
    one = STREAMING._replace(registers=128, loads=1)  # 8 KB
    memory = lambda kernel: model.estimate(H100, kernel, launch(grid=2 * 132), 50e6).us - LAUNCH_US  # noqa: E731
    assert memory(one) == pytest.approx(2 * memory(one._replace(loads=2)))


def test_a_last_wave_of_few_blocks_costs_time():
    whole, more = (model.estimate(H100, STREAMING, launch(grid=grid), 50e6).us for grid in (1056, 1056 + 8))
    assert more > 1.05 * whole


def test_what_the_cache_still_holds_costs_less_but_not_nothing():
    first, again = (model.estimate(H100, STREAMING._replace(again=a), launch(), 50e6).us for a in (False, True))
    kept = model.L2_KEPT * H100.l2_bytes
    saved = kept / 1e6 * (1 / H100.stream_tb_s - 1 / model.L2_TB_S)
    assert first - again == pytest.approx(saved)


def test_arithmetic_bounds_a_kernel_that_moves_little():
    kernel = STREAMING._replace(exponentials=100)
    elements = 25e6
    clock = 1e3 * H100.clock_ghz * model.EXPONENTIALS_PER_CLOCK * H100.multiprocessors
    assert model.estimate(H100, kernel, launch(), 2 * elements).us == pytest.approx(LAUNCH_US + 100 * elements / clock)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_launch_has_a_row_and_no_loss_that_reads_whole_maps_is_faster_than_the_stream(case):
    assert {model.kernel_of(one) for one in model.launches_of(case)} <= set(KERNELS)
    h100, h200 = (model.loss_us(CARDS[card], case) for card in ("H100", "H200"))
    assert model.stream_us(H100, case) < h100 or case.loss == HEAD_LOSS
    assert h200 < h100


def test_every_row_is_a_kernel_that_is_launched():
    assert {model.kernel_of(one) for case in CASES for one in model.launches_of(case)} == set(KERNELS)
    assert {case.loss for case in CASES} == set(FUSED)


def test_launches_of_one_kernel_move_all_maps_once():
    case = Case("pkd", "all", "fp16", "nchw")
    found = model.estimates(H100, case)
    assert len(found) == 3
    assert sum(one.moved_bytes for one in found) == pytest.approx(3 * case.map_bytes)


def test_of_a_head_only_the_top_rows_are_read_whole():
    case = Case(HEAD_LOSS, "s8", "fp16")
    (images, anchors, height, width, logits), select, compare = *case.shapes, *model.estimates(H100, case)
    rows, top = images * anchors * height * width, 1000 * images
    assert select.moved_bytes == rows * SECTOR_BYTES
    assert compare.moved_bytes == case.map_bytes + 2 * ((rows - top) * SECTOR_BYTES + top * 2 * logits)


def test_a_pass_over_the_gates_takes_as_many_turns_as_the_largest_image_needs():
    small, large = (model.estimates(H100, Case(HEAD_LOSS, size, "fp16"))[0] for size in ("s32", "s8"))
    turns = KERNELS["soft_head_select"].passes * (5 - 1)  # 19 200 rows and 1200, 4096 at once
    memory_us = (large.moved_bytes - small.moved_bytes) / H100.stream_tb_s / 1e6
    assert large.us - small.us == pytest.approx(turns * TRIP_US + memory_us)


def test_channels_last_all_blocks_run_at_once_and_have_enough_under_way():
    needed = 1e6 * H100.stream_tb_s * LATENCY_US / H100.multiprocessors
    feature_maps = (case for case in CASES if case.loss in ("weighted_mse", "cwd", "pkd", "fgd"))
    for case in (case for case in feature_maps if case.size in ("s8", "all") and case.layout == "channels_last"):
        for one in model.estimates(H100, case):
            assert 0.9 < one.waves <= 1.0, one.launch.kernel
            assert one.under_way_bytes >= needed, one.launch.kernel


def test_the_table_of_the_readme_is_that_of_the_model():
    assert model.losses_table() in (Path(FOLDER) / "README.md").read_text()
