"""The host shim against numpy, torch, plain loops and planted faults."""

from __future__ import annotations

import itertools
import struct
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch

Array = npt.NDArray[Any]

SOURCE = Path(__file__).resolve().parent / "shim" / "selftest.cu"
GREEDY_SEEDS = (1, 4)
ALL_LANES = 0xFFFFFFFF
POISON = 0xFFFFFFFF


@pytest.fixture(scope="module")
def library(shim: ModuleType) -> Any:
    return shim.build(SOURCE)


def arrays(source: Array | None, target: Array | None, count: int = 0, mode: int = 0) -> bytes:
    """The struct Arrays; the arrays must outlive the launch."""
    addresses = (0 if array is None else array.ctypes.data for array in (source, target))
    return struct.pack("PPII", *addresses, count, mode)


# ---- half types -----------------------------------------------------------------------------------------------------


def convert(library: Any, mode: int, source: Array, target: npt.DTypeLike) -> Array:
    result = np.zeros(source.shape, target)
    library.launch("convert", 16, 64, arrays(source, result, source.size, mode))
    return result


def assert_same_bits(got: Array, expected: Array, is_nan: Array) -> None:
    np.testing.assert_array_equal(got[~is_nan], expected[~is_nan])


def floats_near(values: Array) -> Array:
    """262 144 floats: every value, the float above, the midpoint to the next 16-bit value, and random bits."""
    bits = values.view(np.uint32)
    midpoint = ((bits.astype(np.uint64) + np.roll(bits, -1)) // 2).astype(np.uint32)
    random = np.random.default_rng(0).integers(0, 2**32, bits.size, dtype=np.uint32)
    return np.concatenate([bits, bits + 1, midpoint, random]).view(np.float32)


HALVES = np.arange(65536, dtype=np.uint16)
FLOATS_OF_BFLOATS = (HALVES.astype(np.uint32) << 16).view(np.float32)


def test_every_half_becomes_the_float_that_numpy_gives(library: Any) -> None:
    expected = HALVES.view(np.float16).astype(np.float32)
    got = convert(library, 0, HALVES, np.float32)
    assert_same_bits(got.view(np.uint32), expected.view(np.uint32), np.isnan(expected))
    assert np.isnan(got[np.isnan(expected)]).all()


def test_floats_become_the_halves_that_numpy_gives(library: Any) -> None:
    source = floats_near(HALVES.view(np.float16).astype(np.float32))
    with np.errstate(over="ignore", invalid="ignore"):
        expected = source.astype(np.float16)
    got = convert(library, 1, source, np.uint16)
    assert_same_bits(got, expected.view(np.uint16), np.isnan(source))
    assert set(got[np.isnan(source)]) == {0x7FFF}


def test_every_bfloat_becomes_a_float(library: Any) -> None:
    got = convert(library, 2, HALVES, np.float32)
    np.testing.assert_array_equal(got.view(np.uint32), FLOATS_OF_BFLOATS.view(np.uint32))


def test_floats_become_the_bfloats_that_torch_gives(library: Any) -> None:
    source = floats_near(FLOATS_OF_BFLOATS)
    expected = torch.from_numpy(source).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)
    got = convert(library, 3, source, np.uint16)
    assert_same_bits(got, expected, np.isnan(source))
    assert set(got[np.isnan(source)]) == {0x7FFF}


def test_floats_round_to_integers_as_cuda_says(library: Any) -> None:
    source = np.array([0.5, 1.5, -0.5, -1.5, 2.5, 3e9, -3e9, 5e9, np.inf, -np.inf, np.nan, 7.0], np.float32)
    got = np.zeros((source.size, 8), np.uint32)
    library.launch("round_to_int", 1, 32, arrays(source, got, source.size))
    wide = np.nan_to_num(source.astype(np.float64), nan=0.0)
    ways = (np.rint, np.trunc, np.floor, np.ceil)
    signed = np.stack([np.clip(way(wide), -(2**31), 2**31 - 1) for way in ways], axis=1)
    unsigned = np.stack([np.clip(way(wide), 0, 2**32 - 1) for way in ways], axis=1)
    np.testing.assert_array_equal(got[:, :4].view(np.int32), signed)
    np.testing.assert_array_equal(got[:, 4:], unsigned)


# ---- warps ----------------------------------------------------------------------------------------------------------


def source_lane(op: int, lane: int, operand: int, width: int) -> int:
    """Whose value a lane gets, from the CUDA programming guide."""
    first = lane // width * width
    if op == 0:
        return first + operand % width
    if op == 1:
        return lane - operand if lane - operand >= first else lane
    if op == 2:
        return lane + operand if lane + operand < first + width else lane
    return lane ^ operand if lane ^ operand < first + width else lane


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("dtype", ["float", "int", "unsigned", "double"])
def test_shuffles_move_the_lanes_that_the_guide_names(library: Any, dtype: str, seed: int) -> None:
    kind = {"float": np.float32, "int": np.int32, "unsigned": np.uint32, "double": np.float64}[dtype]
    for op, operand, width in itertools.product(range(4), (0, 1, 5, 16, 31), (32, 16, 8, 1)):
        got = np.zeros(32, kind)
        args = struct.pack("PIiiI", got.ctypes.data, op, operand, width, ALL_LANES)
        library.launch(f"shuffle_{dtype}", 1, 32, args, seed=seed)
        expected = [100 + source_lane(op, lane, operand, width) for lane in range(32)]
        assert got.tolist() == expected, (op, operand, width)


def test_a_shuffle_from_outside_the_mask_gives_poison(library: Any) -> None:
    got = np.zeros(32, np.float32)
    args = struct.pack("PIiiI", got.ctypes.data, 3, 16, 32, 0x0000FFFF)
    library.launch("shuffle_float", 1, 32, args)
    assert np.isnan(got[:16]).all()
    assert not got[16:].any()


@pytest.mark.parametrize("seed", range(6))
def test_votes_of_half_warps_and_blocks(library: Any, seed: int) -> None:
    got = np.zeros((2, 96, 8), np.uint32)
    library.launch("votes", 2, 96, arrays(None, got), seed=seed)
    thirds = sum(1 << lane for lane in range(0, 32, 3))
    for thread in range(96):
        low = thread % 32 < 16
        expected = [thirds & (0xFFFF if low else 0xFFFF0000), not low, low, thread % 32 ^ 1, 0xAAAAAAAA, 20, 1, 0]
        assert got[:, thread].tolist() == [expected, expected]


# ---- blocks ---------------------------------------------------------------------------------------------------------

ROUNDS, GRID, BLOCK = 4, 3, 256


def block_sums(library: Any, seed: int, cluster: int = 1) -> tuple[Array, Any]:
    values = np.random.default_rng(1).integers(-1000, 1000, GRID * BLOCK).astype(np.float32)
    got = np.zeros((ROUNDS, GRID, BLOCK), np.float32)
    counters = library.launch("block_sums", GRID, BLOCK, arrays(values, got, ROUNDS), cluster=cluster, seed=seed)
    rolled = np.stack([np.roll(values, -37 * i) for i in range(ROUNDS)])
    expected = rolled.reshape(got.shape).sum(axis=2, keepdims=True)  # whole numbers: exact in any order
    return got == expected, counters


@pytest.mark.parametrize("seed", range(6))
def test_a_right_reduction_is_right_under_every_schedule(library: Any, seed: int) -> None:
    right, counters = block_sums(library, seed)
    assert right.all()
    assert counters.read == counters.written == ROUNDS * GRID * BLOCK * 4
    assert counters.barriers == ROUNDS * GRID * 2
    assert counters.shuffles == ROUNDS * GRID * BLOCK // 32 * 10
    assert counters.atomics == counters.cluster_barriers == counters.matrix == 0


@pytest.mark.parametrize("barrier", ["REUSE", "READ"])
def test_the_greedy_schedule_shows_a_dropped_barrier(shim: ModuleType, barrier: str) -> None:
    line = f"__syncthreads();  // {barrier}"
    text = SOURCE.read_text()
    assert text.count(line) == 1
    mutant = shim.build(SOURCE, optimise="-O0", text=text.replace(line, ""))
    assert not any(block_sums(mutant, seed)[0].all() for seed in GREEDY_SEEDS)


def test_the_order_of_blocks_changes_and_an_ordered_total_does_not(library: Any) -> None:
    expected = np.float32(0)
    for i in range(100):
        expected += np.float32(1) / np.float32(i + 3)
    places = {}
    for seed in range(6):
        ticket, got = np.zeros(1, np.uint32), np.zeros(1 + 2 * 100, np.float32)
        library.launch("last_block_total", 100, 32, arrays(ticket, got), seed=seed)
        assert ticket[0] == 0
        assert got[0] == expected
        places[seed] = tuple(got[101:])
    assert places[0] == tuple(range(100))
    assert len(set(places.values())) == 6


def test_blocks_of_a_plain_kernel_may_be_resident_together(library: Any) -> None:
    for seed in range(6):
        assert block_sums(library, seed, cluster=GRID)[0].all()


def test_atomics(library: Any) -> None:
    words = np.zeros(9, np.uint32)
    words[2], words[4], words[8] = 77, 2, np.uint32(2**32 - 1000)
    counters = library.launch("atomics", 2, 50, arrays(None, words))
    assert words[:7].tolist() == [200, 99, 0, 100 % 7, (2 - 100) % 7, 9, 100]
    assert words[7:8].view(np.float32)[0] == 50
    assert words[8] == 0  # max over -99..0, from -1000
    assert counters.atomics == 9 * 100


@pytest.mark.parametrize("mode", [0, 1], ids=["dynamic", "static"])
def test_a_block_finds_poison_in_its_shared_memory(library: Any, mode: int) -> None:
    got = np.zeros((4, 8), np.uint32)
    library.launch("untouched", 4, 8, arrays(None, got, mode=mode), shared=32)
    assert (got == POISON).all()


def test_an_asynchronous_copy_is_poison_until_it_is_waited_for(library: Any) -> None:
    source, got = np.arange(1, 33, dtype=np.float32), np.zeros((2, 32), np.float32)
    counters = library.launch("copy_to_shared", 1, 32, arrays(source, got, 20), shared=128)
    assert np.isnan(got[0]).all()
    np.testing.assert_array_equal(got[1], np.where(source <= 20, source, 0))
    assert counters.read == 20 * 4


# ---- clusters -------------------------------------------------------------------------------------------------------


def exchange(library: Any, mode: int, seed: int, cluster: int = 4) -> tuple[Array, Array, Any]:
    got = np.zeros((8, 64), np.float32)
    counters = library.launch("exchange", 8, 64, arrays(None, got, mode=mode), shared=256, cluster=cluster, seed=seed)
    values = (np.float32(1) / np.arange(1, 513, dtype=np.float32)).reshape(8 // cluster, cluster, 64)
    swapped = values[:, :, np.arange(64) ^ 1]
    expected = np.zeros((8 // cluster, 64), np.float32)
    for rank in range(cluster):
        expected += np.float32(rank + 1) * swapped[:, rank]
    return got, np.repeat(expected, cluster, axis=0), counters


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("cluster", [1, 4, 8])
@pytest.mark.parametrize("mode", [0, 1], ids=["dynamic", "static"])
def test_the_blocks_of_a_cluster_read_each_other(library: Any, mode: int, cluster: int, seed: int) -> None:
    got, expected, counters = exchange(library, mode, seed, cluster)
    np.testing.assert_array_equal(got, expected)
    assert counters.cluster_barriers == 2 * 8 // cluster


@pytest.mark.parametrize("mode", [0, 1], ids=["dynamic", "static"])
def test_a_read_before_the_cluster_barrier_gives_poison(library: Any, mode: int) -> None:
    assert all(np.isnan(exchange(library, mode + 2, seed)[0]).any() for seed in range(6))


def test_a_block_that_leaves_before_its_peers_have_read_is_reported(shim: ModuleType, library: Any) -> None:
    for seed in GREEDY_SEEDS:
        with pytest.raises(shim.ShimError, match="has exited"):
            exchange(library, 4, seed)


@pytest.mark.parametrize("seed", range(6))
def test_resident_blocks_may_poll_for_each_other(library: Any, seed: int) -> None:
    for writer in range(3):
        flags = np.zeros(4, np.uint32)
        library.launch("handshake", 3, 32, arrays(None, flags, mode=writer), cluster=3, seed=seed)
        assert flags.tolist() == [1, *(int(block != writer) for block in range(3))]


# ---- matrix instructions --------------------------------------------------------------------------------------------


def to_bits(values: Array, dtype: torch.dtype) -> Array:
    return torch.from_numpy(values).to(dtype).view(torch.int16).numpy().view(np.uint16)


@pytest.mark.parametrize(("kernel", "dtype"), [("half", torch.float16), ("bfloat", torch.bfloat16)])
def test_mma_is_the_matrix_product_in_the_layout_of_the_ptx_isa(library: Any, kernel: str, dtype: torch.dtype) -> None:
    rng = np.random.default_rng(2)
    for seed in range(6):
        a, b, c = (rng.integers(-8, 9, shape).astype(np.float32) for shape in ((16, 16), (16, 8), (16, 8)))
        a_bits, b_bits = to_bits(a, dtype), to_bits(b, dtype)
        a_parts, b_parts = np.zeros((32, 8), np.uint16), np.zeros((32, 4), np.uint16)
        d = np.zeros((32, 4), np.float32)
        for lane in range(32):  # element indices as the ISA prints them
            group, in_group = lane >> 2, lane % 4
            for i in range(8):
                row = group if i < 2 or 4 <= i < 6 else group + 8
                a_parts[lane, i] = a_bits[row, in_group * 2 + (i & 1) + (8 if i >= 4 else 0)]
            for i in range(4):
                b_parts[lane, i] = b_bits[in_group * 2 + (i & 1) + (8 if i >= 2 else 0), group]
                d[lane, i] = c[group if i < 2 else group + 8, in_group * 2 + (i & 1)]
        args = struct.pack("PPP", a_parts.ctypes.data, b_parts.ctypes.data, d.ctypes.data)
        library.launch(f"multiply_{kernel}", 1, 32, args, seed=seed)
        expected = c + a @ b
        for lane, i in itertools.product(range(32), range(4)):
            assert d[lane, i] == expected[(lane >> 2) + (0 if i < 2 else 8), lane % 4 * 2 + (i & 1)]


@pytest.mark.parametrize("transposed", [0, 1])
def test_ldmatrix_gives_each_lane_its_pair_of_every_matrix(library: Any, transposed: int) -> None:
    tile = np.arange(256, dtype=np.uint16).reshape(4, 8, 8)
    got = np.zeros((32, 4), np.uint32)
    counters = library.launch("load_fragments", 1, 32, arrays(tile, got, mode=transposed), shared=512)
    matrices = tile.transpose(0, 2, 1) if transposed else tile
    pairs = got.view(np.uint16).reshape(8, 4, 4, 2)  # row, column pair, matrix, element
    np.testing.assert_array_equal(pairs.transpose(2, 0, 1, 3).reshape(4, 8, 8), matrices)
    assert counters.matrix == 1


def test_a_tile_product_through_shared_memory(library: Any) -> None:
    rng = np.random.default_rng(3)
    a, b = rng.integers(-8, 9, (16, 16)).astype(np.float16), rng.integers(-8, 9, (16, 8)).astype(np.float16)
    tiles, got = np.concatenate([a.ravel(), b.ravel()]), np.zeros((16, 8), np.float32)
    for seed in range(6):
        library.launch("tile_product", 1, 32, arrays(tiles, got), shared=16 * 24 * 2 + 16 * 8 * 2, seed=seed)
        np.testing.assert_array_equal(got, a.astype(np.float32) @ b.astype(np.float32))


# ---- faults ---------------------------------------------------------------------------------------------------------

FAULTS = {  # kernel: (blocks, threads, cluster, what the error says)
    "early_return_before_barrier": (1, 64, 1, "divergent barrier"),
    "barriers_at_two_lines": (1, 64, 1, "divergent barrier"),
    "barrier_in_one_warp_only": (1, 64, 1, "divergent barrier|exited"),
    "shuffle_against_barrier": (
        1,
        64,
        1,
        "deadlock.*__shfl_xor_sync.*__syncthreads|deadlock.*__syncthreads.*__shfl_xor",
    ),
    "mask_names_exited_lane": (1, 32, 1, "exited"),
    "mask_without_caller": (1, 32, 1, "calling lane .* is not in mask"),
    "full_mask_shuffle": (1, 48, 1, "lanes that do not exist"),
    "shuffle_meets_ballot": (1, 32, 1, "divergent warp"),
    "return_before_cluster_barrier": (2, 32, 2, "divergent barrier"),
    "cluster_load_of_global": (2, 32, 2, "not in shared memory"),
    "cluster_load_of_rank": (2, 32, 2, "rank 2 of a cluster of 2"),
    "misaligned_load": (1, 1, 1, "misaligned address"),
    "misaligned_store": (1, 1, 1, "misaligned address"),
    "trap": (1, 32, 1, r"__trap.*thread 3"),
    "copy_not_waited_for": (1, 1, 1, "returned before its copy_async"),
    "copy_to_global": (1, 1, 1, "target is not in shared memory"),
    "endless_poll": (1, 32, 1, "deadlock.*__nanosleep"),
    "ldmatrix_misaligned": (1, 32, 1, "multiple of 16"),
    "ldmatrix_of_global": (1, 32, 1, "not in shared memory"),
}


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("kernel", FAULTS)
def test_a_fault_is_reported_under_every_schedule(shim: ModuleType, library: Any, kernel: str, seed: int) -> None:
    grid, block, cluster, message = FAULTS[kernel]
    memory = np.zeros(64, np.float32)
    args = arrays(memory, memory, 2)
    with pytest.raises(shim.ShimError, match=message):
        library.launch(kernel, grid, block, args, shared=256, cluster=cluster, seed=seed)
    test_a_right_reduction_is_right_under_every_schedule(library, seed)  # nothing is left behind


def test_the_full_mask_is_right_in_whole_warps(library: Any) -> None:
    library.launch("full_mask_shuffle", 1, 64, arrays(None, None))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"grid": 0}, "grid 0"),
        ({"block": 1025}, "block 1025"),
        ({"grid": 3, "cluster": 2}, "cluster 2"),
        ({"shared": 227 * 1024 + 1}, "232449 bytes"),
    ],
)
def test_a_launch_beyond_the_hardware_is_refused(
    shim: ModuleType, library: Any, options: dict[str, int], message: str
) -> None:
    with pytest.raises(shim.ShimError, match=message):
        library.launch("trap", args=arrays(None, None), **{"grid": 1, "block": 32} | options)


def test_arguments_of_the_wrong_size_are_refused(library: Any) -> None:
    assert library.size_of("trap") == 24
    with pytest.raises(ValueError, match="takes 24 bytes of arguments, got 23"):
        library.launch("trap", 1, 32, bytes(23))


def test_a_kernel_that_is_not_there_is_named(library: Any) -> None:
    with pytest.raises(ValueError, match="has no kernel no_such"):
        library.launch("no_such", 1, 32, b"")


def test_a_kernel_is_not_mistaken_for_a_function_of_libc(library: Any) -> None:
    got = np.zeros(8, np.uint32)
    library.launch("ftok", 1, 8, arrays(None, got))
    assert got.tolist() == list(range(8))


def test_a_large_cluster_fits(library: Any) -> None:
    got = np.zeros((16, 1024), np.uint32)
    library.launch("untouched", 16, 8, arrays(None, got), shared=200 * 1024, cluster=16)
    for seed in range(3):
        flags = np.zeros(17, np.uint32)
        library.launch("handshake", 16, 1024, arrays(None, flags, mode=3), cluster=16, seed=seed)
        assert flags.sum() == 16


# ---- building -------------------------------------------------------------------------------------------------------


def test_a_build_is_kept_until_something_changes(shim: ModuleType) -> None:
    paths = [
        shim.build(SOURCE).path,
        shim.build(SOURCE, text=SOURCE.read_text()).path,
        shim.build(SOURCE, ["X=1"], optimise="-O0").path,
        shim.build(SOURCE, ["X=2"], optimise="-O0").path,
    ]
    assert paths[0] == paths[1]
    assert len(set(paths)) == 3


def test_headers_beside_the_source_are_found_tracked_and_replaced(shim: ModuleType, tmp_path: Path) -> None:
    source = tmp_path / "answer.cu"
    header = tmp_path / "answer.cuh"
    source.write_text(
        '#include "answer.cuh"\nstruct Args { int* out; };\n'
        'extern "C" __global__ void answer(const Args args) { *args.out = ANSWER; }\nSHIM_KERNEL(answer, Args)\n'
    )
    got = np.zeros(1, np.int32)
    for value in (1, 2):
        header.write_text(f'#include "shim.h"\n#define ANSWER {value}\n')
        shim.build(source, optimise="-O0").launch("answer", 1, 1, struct.pack("P", got.ctypes.data))
        assert got[0] == value
    other = shim.build(source, optimise="-O0", headers={"answer.cuh": '#include "shim.h"\n#define ANSWER 3\n'})
    other.launch("answer", 1, 1, struct.pack("P", got.ctypes.data))
    assert got[0] == 3


def test_a_source_that_does_not_compile_says_why(shim: ModuleType) -> None:
    with pytest.raises(shim.ShimError, match=r"(?s)selftest\.cu does not compile.*selftest\.cu:2.*nonsense"):
        shim.build(SOURCE, text='#include "shim.h"\nnonsense;\n', optimise="-O0")


def test_the_portable_switch_agrees_with_the_assembly(shim: ModuleType) -> None:
    portable = shim.build(SOURCE, ["SHIM_UCONTEXT"], optimise="-O0")
    for seed in range(3):
        assert block_sums(portable, seed)[0].all()
        got, expected, _ = exchange(portable, 0, seed)
        np.testing.assert_array_equal(got, expected)
    with pytest.raises(shim.ShimError, match="deadlock"):
        portable.launch("shuffle_against_barrier", 1, 64, arrays(None, None))


# ---- children: crashes and sanitizers -------------------------------------------------------------------------------

CHILD = """
import ctypes, struct, sys
from pathlib import Path
from shim import host
source, kernel, count, sanitize = sys.argv[1:]
library = host.build(Path(source), optimise="-O0", sanitize=True) if sanitize else host.build(Path(source))
malloc = ctypes.CDLL(None).malloc
malloc.restype = ctypes.c_void_p
start, out = malloc(64), malloc(64)  # multiples of 16
for seed in range(3):
    args = struct.pack("PPII", start + 4, out, int(count), 0)
    library.launch(kernel, 2, 64, args, shared=64, seed=seed)
print("finished")
"""


def child(shim: ModuleType, kernel: str, count: int, sanitize: bool) -> Any:
    return shim.run_child(CHILD, str(SOURCE), kernel, str(count), "1" if sanitize else "", sanitize=sanitize)


@pytest.mark.parametrize(("kernel", "count"), [("wild_pointer", 8), ("deep_recursion", 10_000)])
def test_a_memory_fault_ends_the_child_and_not_the_tests(shim: ModuleType, kernel: str, count: int) -> None:
    done = child(shim, kernel, count, sanitize=False)
    assert done.returncode < 0, done.stderr
    assert "finished" not in done.stdout


@pytest.mark.parametrize(
    ("kernel", "count", "message"),
    [
        ("write_at", 16, "heap-buffer-overflow"),
        ("write_dynamic_at", 16, "heap-buffer-overflow"),
        ("write_stack_at", 4, "stack-buffer-overflow|out of bounds"),
        ("shift_by", 40, "shift exponent 40 is too large"),
        ("read_vector", 0, "misaligned address"),
        ("write_at", 15, ""),
        ("write_dynamic_at", 15, ""),
        ("write_stack_at", 3, ""),
        ("shift_by", 3, ""),
    ],
)
def test_a_sanitizer_sees_what_the_shim_cannot(shim: ModuleType, kernel: str, count: int, message: str) -> None:
    if not shim.can_sanitize():
        pytest.skip("the compiler has no libasan")
    done = child(shim, kernel, count, sanitize=True)
    if message:
        assert done.returncode
        assert any(part in done.stderr for part in message.split("|")), done.stderr[-3000:]
    else:
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stdout.endswith("finished\n")
