"""How long the fused losses should take on a GPU, from what their launches move: `python -m compress.kernels.model`.

A kernel takes the time of its bytes at the bandwidth that its loads under way allow (Little's law: bytes under way over
latency, at most what one kernel that only reads and writes reaches), wave by wave, and at least that of its arithmetic.
To it come the start of the launch, and round trips to memory that nothing overlaps. Launches, grids and blocks are
those of the launchers themselves, run on the benchmark's maps without memory; registers and loads of a thread are those
of float16 on sm_90, which the tests compare with the machine code. Small maps and vectors of channels are left out:
below 3 %.

Nothing here was fitted to a measurement of these kernels. Where one disagrees, a row of `KERNELS` or `CARDS` is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.kernels.bench_case import DTYPES, SIZES, Case, arguments_of, plan
from compress.kernels.device import RESERVED_SHARED_BYTES, SUFFIX, VECTOR_BYTES, WARP, Facts, Launch, ceil_div
from compress.kernels.losses import FUSED
from compress.kernels.sass import disassemble, loads_under_way
from compress.kernels.toolchain import compile_for

DTYPE = "fp16"
ITEM_BYTES = DTYPES[DTYPE].itemsize
SECTOR_BYTES = 32
"""The least that a read of DRAM brings: a logit of objectness costs as much, since those of its row are not read."""
ARCHITECTURE = "sm_90"
LAUNCH_US = 2.3
"""From the end of a kernel of a CUDA graph to the full speed of the next."""
TRIP_US = 0.6
"""A read or an atomic operation of global memory, and the barrier behind it."""
LATENCY_US = 0.8
"""A read of DRAM when the bandwidth is used up: 18 KB under way for each multiprocessor of an H100 give 3 TB/s."""
L2_TB_S = 5.5
L2_KEPT = 0.6
"""Share of the L2 cache that still holds what the kernel before has read last; written gradients take the rest."""
EXPONENTIALS_PER_CLOCK = 16
"""Exponentials of a multiprocessor."""
TENSOR_SHARE = 0.25
"""Share of the tensor cores' peak that `mma.sync` reaches with eight warps on a multiprocessor, and barriers between
products."""
REGISTERS, THREADS, MOST_BLOCKS, SHARED_BYTES = 65536, 2048, 32, 228 << 10
"""Limits of a multiprocessor of sm_90."""
REGISTERS_TOGETHER = 8
"""A thread gets a multiple of so many registers."""


class Card(NamedTuple):
    """A GPU, as far as the model knows it."""

    multiprocessors: int
    clock_ghz: float
    stream_tb_s: float
    """Bandwidth that torch.add(s, t, out=g) reaches, reads and writes counted: 90 % of the data sheet."""
    tensor_tflop_s: float
    """Peak of dense float16 products."""
    l2_bytes: int


CARDS = {
    "H100": Card(132, 1.75, 3.0, 990.0, 50 << 20),
    "H200": Card(132, 1.75, 4.3, 990.0, 50 << 20),
}
FACTS = Facts((9, 0), 50 << 20, 227 << 10)
"""Facts of both."""


class Kernel(NamedTuple):
    """Facts of one kernel on which its speed depends, from its source and its machine code."""

    reads: int
    """Maps that it reads."""
    writes: int
    """Maps that it writes."""
    registers: int
    """Per thread, at most."""
    loads: int
    """Reads of 16 bytes that a thread has under way, at least."""
    static_shared: int = 0
    """Bytes per block, at most."""
    trips: int = 0
    """Round trips to memory before the first of these reads and after the last; for a cluster, those of each wave."""
    again: bool = False
    """Whether the kernel before has read the same maps, in the opposite order."""
    exponentials: float = 0.0
    """Per element of a map."""
    products: int = 0
    """Products of a matrix with each pixel's channels."""
    load_bytes: int = VECTOR_BYTES
    """Bytes of one of the loads."""
    passes: int = 0
    """Passes of a block over the gates of its image, which the cache holds."""


TOTAL = 3
"""Round trips of the last block: partial sum, ticket, and reading all partial sums."""
KERNELS = {
    "weighted_mse": Kernel(2, 1, registers=64, loads=4, static_shared=1 << 10, trips=TOTAL),
    "adapter_mse": Kernel(2, 1, registers=192, loads=7, static_shared=1 << 10, trips=2 + TOTAL, products=3),
    "adapter_sums": Kernel(0, 0, registers=64, loads=8, static_shared=4 << 10, trips=1),
    "cwd_rows": Kernel(2, 1, registers=64, loads=4, static_shared=2 << 10, trips=TOTAL, exponentials=2),
    "cwd_column_sums": Kernel(2, 0, registers=128, loads=4, static_shared=17 << 10, trips=TOTAL, exponentials=3),
    "cwd_columns": Kernel(
        2, 1, registers=128, loads=4, static_shared=1 << 10, trips=1 + TOTAL, again=True, exponentials=2
    ),
    "pkd_cluster": Kernel(2, 1, registers=64, loads=4, trips=TOTAL),
    "pkd_statistics_last": Kernel(2, 0, registers=128, loads=4, static_shared=11 << 10, trips=1 + TOTAL),
    "pkd_gradient_last": Kernel(2, 1, registers=128, loads=4, static_shared=2 << 10, trips=2, again=True),
    "fgd_sums": Kernel(2, 0, registers=64, loads=4, static_shared=33 << 10, trips=12),
    "fgd_gradient": Kernel(2, 1, registers=64, loads=2, static_shared=3 << 10, trips=1 + TOTAL, again=True),
    "soft_head_select": Kernel(
        0, 0, registers=64, loads=4, static_shared=5 << 10, trips=TOTAL, load_bytes=SECTOR_BYTES, passes=4
    ),
    "soft_head": Kernel(0, 1, registers=64, loads=2, static_shared=2 << 10, trips=5 + TOTAL, load_bytes=SECTOR_BYTES),
}
"""Every kernel of a loss without weights of pixels on these cards. `fgd_sums` has 12 round trips: a ticket, and for
each of two axes the partial sums and three passes over the attention. A block of `soft_head_select` goes over its gates
for each of three digits, and for their sum; one of `soft_head` reads gates, objectness, boxes and, twice, classes."""
LEFT_OUT = {("adapter_mse", size) for size in SIZES if size != "s8"}
"""Losses and sizes whose kernels the table has not: wider adapters go through torch's products."""


# ---- what is launched ----------------------------------------------------------------------------------------------


class _Recorder:
    """A `Device` that a launcher can plan for; nothing runs."""

    facts = FACTS

    def launch(self, launch: Launch) -> None:
        raise NotImplementedError

    def tickets(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device="meta")


def cases() -> list[Case]:
    """The benchmark's cases that the table has, the layouts of a loss one after the other."""
    every = (case for loss in FUSED for case in plan(loss) if case.dtype == DTYPE)
    return [case for case in every if (case.loss, case.size) not in LEFT_OUT]


def launches_of(case: Case) -> list[Launch]:
    """The launches of the forward pass, over maps that need no memory."""

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    with torch.no_grad():
        return list(FUSED[case.loss].launches(_Recorder(), *arguments_of(case, empty)))


def kernel_of(launch: Launch) -> str:
    """The kernel's name without the dtype of the maps."""
    return launch.kernel.removesuffix(SUFFIX[DTYPES[DTYPE]])


# ---- time ----------------------------------------------------------------------------------------------------------


def blocks_per_sm(registers: int, threads: int, shared_bytes: int) -> int:
    """Blocks that a multiprocessor of sm_90 runs at once."""
    held = math.ceil(registers / REGISTERS_TOGETHER) * REGISTERS_TOGETHER
    by_registers = REGISTERS // (held * WARP) // (threads // WARP)
    return min(by_registers, THREADS // threads, SHARED_BYTES // (shared_bytes + RESERVED_SHARED_BYTES), MOST_BLOCKS)


def bandwidth_tb_s(card: Card, bytes_under_way: float) -> float:
    """Bandwidth of the whole card when it has so many bytes of reads under way."""
    return min(card.stream_tb_s, bytes_under_way / LATENCY_US / 1e6)


def waves(grid: int, slots: int) -> list[int]:
    """Blocks of each wave when `slots` of them run at once."""
    full, rest = divmod(grid, slots)
    return [slots] * full + ([rest] if rest else [])


class Estimate(NamedTuple):
    """One launch on one card."""

    launch: Launch
    blocks: int
    """That a multiprocessor runs at once."""
    moved_bytes: float
    """Bytes of the maps, those that the L2 cache still holds included."""
    under_way_bytes: int
    """Bytes of one multiprocessor."""
    waves: float
    us: float


def estimate(card: Card, kernel: Kernel, launch: Launch, map_bytes: float) -> Estimate:
    """The time of a launch over maps of `map_bytes` each."""
    blocks = blocks_per_sm(kernel.registers, launch.block, kernel.static_shared + launch.shared)
    block_bytes = launch.block * kernel.loads * kernel.load_bytes
    moved = (kernel.reads + kernel.writes) * map_bytes + _other_bytes(launch)
    kept = min(kernel.reads * map_bytes, L2_KEPT * card.l2_bytes) if kernel.again else 0.0
    from_dram = moved - kept * (1 - card.stream_tb_s / L2_TB_S)
    turns = waves(launch.grid, blocks * card.multiprocessors)
    memory_us = sum(turn / launch.grid * from_dram / bandwidth_tb_s(card, turn * block_bytes) for turn in turns) / 1e6
    trips = kernel.trips + (kernel.passes * _turns_of_a_pass(launch, kernel.loads) if kernel.passes else 0)
    trips_us = TRIP_US * trips * (len(turns) if launch.cluster > 1 else 1)
    arithmetic_us = _arithmetic_us(card, kernel, launch, map_bytes)
    us = LAUNCH_US + max(memory_us, arithmetic_us) + trips_us
    under_way = min(blocks, launch.grid / card.multiprocessors) * block_bytes
    return Estimate(launch, blocks, moved, round(under_way), launch.grid / (blocks * card.multiprocessors), us)


def _arithmetic_us(card: Card, kernel: Kernel, launch: Launch, map_bytes: float) -> float:
    elements = map_bytes / ITEM_BYTES
    exponentials = (
        kernel.exponentials * elements / (card.multiprocessors * EXPONENTIALS_PER_CLOCK * card.clock_ghz * 1e3)
    )
    flop = 2 * kernel.products * elements * _channels(launch, "STUDENT") if kernel.products else 0.0
    return exponentials + flop / (TENSOR_SHARE * card.tensor_tflop_s * 1e6)


def _channels(launch: Launch, of: str) -> int:
    """From the defines of the adapter's build."""
    return int(dict(define.split("=") for define in launch.source.defines)[f"{of}_CHANNELS"])


def _other_bytes(launch: Launch) -> int:
    """Bytes beside whole maps: the blocks' shares of an adapter's gradient, which one kernel writes and another adds
    up; what is read of a head's rows.
    """
    levels = launch.args.levels[: launch.args.count]
    if launch.source.folder == "adapter_mse":
        blocks = sum(level.blocks for level in levels)
        return 4 * blocks * _channels(launch, "TEACHER") * (_channels(launch, "STUDENT") + 1)
    if launch.source.folder == "soft_head":
        return sum(_row_bytes(level, gates_alone=kernel_of(launch) == "soft_head_select") for level in levels)
    return 0


def _row_bytes(level: Any, *, gates_alone: bool) -> int:
    """Bytes read of a head's level: the gates' objectness alone, or student's and teacher's, and the top rows whole."""
    rows, top = level.anchor_count * level.pixels, level.top
    if gates_alone:
        return level.images * rows * SECTOR_BYTES
    return 2 * level.images * ((rows - top) * SECTOR_BYTES + top * level.logits * ITEM_BYTES)


def _turns_of_a_pass(launch: Launch, loads: int) -> int:
    """Reads of a thread, one after the other, that go over the gates of the largest image, `loads` at a time."""
    rows = max(level.anchor_count * level.pixels for level in launch.args.levels[: launch.args.count])
    return ceil_div(rows, loads * launch.block)


def estimates(card: Card, case: Case, kernels: Mapping[str, Kernel] = KERNELS) -> list[Estimate]:
    """Each launch of a forward pass."""
    launches = launches_of(case)
    weights = Counter[str]()  # launches of one kernel share the maps, as clusters by what they hold of them
    for launch in launches:
        weights[launch.kernel] += launch.grid * max(launch.shared, 1)
    return [
        estimate(
            card,
            kernels[kernel_of(launch)],
            launch,
            case.map_bytes * launch.grid * max(launch.shared, 1) / weights[launch.kernel],
        )
        for launch in launches
    ]


def loss_us(card: Card, case: Case) -> float:
    """Forward and backward in a CUDA graph; the backward pass finds that its gradient needs no correction."""
    return sum(one.us for one in estimates(card, case)) + LAUNCH_US + TRIP_US


def stream_us(card: Card, case: Case) -> float:
    """torch.add(s, t, out=g) over maps as large: the least that a loss can do that reads all of them."""
    return LAUNCH_US + 3 * case.map_bytes / card.stream_tb_s / 1e6


# ---- tables --------------------------------------------------------------------------------------------------------


def losses_table() -> str:
    """Microseconds of every loss on every card, and in brackets its share of the stream's speed over maps as large as
    its own, in per cent. The stream's row is of feature maps.
    """
    columns = [(card, size) for card in CARDS for size in SIZES]
    rows = [["us (% of stream)", *(f"{card} {size}" for card, size in columns)]]
    rows.append(["stream", *(f"{stream_us(CARDS[card], Case('cwd', size, DTYPE)):.0f}" for card, size in columns)])
    known = set(cases())
    for loss, layout in dict.fromkeys((case.loss, case.layout) for case in cases()):
        of_columns = [(CARDS[card], Case(loss, size, DTYPE, layout)) for card, size in columns]
        cells = (_cell(card, case) if case in known else "-" for card, case in of_columns)
        rows.append([f"{loss}, {layout}", *cells])
    return _aligned(rows)


def _cell(card: Card, case: Case) -> str:
    us = loss_us(card, case)
    return f"{us:.0f} ({100 * stream_us(card, case) / us:.0f})"


def kernels_table(kernels: Mapping[str, Kernel] = KERNELS) -> str:
    """Every kernel over the maps of stride 8: what a multiprocessor has of it, and its time on every card."""
    head = ["kernel, stride 8", "blocks", "threads", "registers", "a SM", "waves", "loads", "KB under way", "MB"]
    rows = [[*head, *(f"{card} us" for card in CARDS)]]
    for case in (case for case in cases() if case.size == "s8"):
        by_card = [estimates(card, case, kernels) for card in CARDS.values()]
        for one, *others in zip(*by_card, strict=True):
            name, launch = kernel_of(one.launch), one.launch
            sizes = (launch.grid, launch.block, kernels[name].registers, one.blocks)
            rates = (
                f"{one.waves:.2f}",
                kernels[name].loads,
                f"{one.under_way_bytes / 1e3:.0f}",
                f"{one.moved_bytes / 1e6:.0f}",
            )
            times = (f"{other.us:.1f}" for other in (one, *others))
            rows.append([f"{name}, {case.layout}", *map(str, (*sizes, *rates)), *times])
    return _aligned(rows)


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    first, *others = widths
    return "\n".join(
        row[0].ljust(first) + "".join(cell.rjust(2 + width) for cell, width in zip(row[1:], others, strict=True))
        for row in rows
    )


def found_kernels() -> dict[str, Kernel]:
    """`KERNELS` with the registers and loads of the machine code compiled here for sm_90, the worse of two builds.

    Raises UnavailableError when the compiler or NVIDIA's disassembler is not installed.
    """
    found: dict[str, Kernel] = {}
    launches = [launch for case in cases() if case.size == "s8" for launch in launches_of(case)]
    for source in dict.fromkeys(launch.source for launch in launches):
        compiled = compile_for(source, ARCHITECTURE)
        loads, resources = loads_under_way(disassemble(compiled.code)), compiled.resources
        for entry in dict.fromkeys(launch.kernel for launch in launches if launch.source == source):
            name, took = entry.removesuffix(SUFFIX[DTYPES[DTYPE]]), resources[entry]
            assumed = KERNELS[name]
            under_way = loads[entry] if assumed.load_bytes == VECTOR_BYTES else assumed.loads
            one = assumed._replace(registers=took.registers, static_shared=took.shared_bytes, loads=under_way)
            before = found.get(name, one)
            found[name] = one._replace(
                registers=max(before.registers, one.registers),
                static_shared=max(before.static_shared, one.static_shared),
                loads=min(before.loads, one.loads),
            )
    return found


if __name__ == "__main__":
    print(f"{losses_table()}\n\n{kernels_table()}")
