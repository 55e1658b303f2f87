"""How long the fused losses should take on a GPU, from what their launches move: `python -m compress.kernels.model`.

A kernel takes the time of its bytes at the bandwidth that its loads under way allow (Little's law: bytes under way over
latency, at most what one kernel that only reads and writes reaches), wave by wave, and at least that of its arithmetic.
To it come the start of the launch, and round trips to memory that nothing overlaps. Launches, grids and blocks are
those of the launchers themselves, run on maps without memory; registers and loads of a thread are those of float16 on
sm_90, which the tests compare with the machine code. Small maps and vectors of channels are left out: below 3 %.

Nothing here was fitted to a measurement of these kernels. Where one disagrees, a row of `KERNELS` or `CARDS` is wrong.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.kernels.bench_case import LAYOUTS, LEVELS, SIZES
from compress.kernels.device import RESERVED_SHARED_BYTES, SUFFIX, VECTOR_BYTES, WARP, Facts, Launch
from compress.kernels.losses import FUSED
from compress.kernels.sass import disassemble, loads_under_way
from compress.kernels.toolchain import compile_for

DTYPE = torch.float16
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
}
"""Every kernel of a feature loss without weights of pixels on these cards. `fgd_sums` has 12 round trips: a ticket, and
for each of two axes the partial sums and three passes over the attention."""
MODELLED = {
    "weighted_mse": tuple(SIZES),
    "adapter_mse": ("s8",),  # wider maps go through torch's products
    "cwd": tuple(SIZES),
    "pkd": tuple(SIZES),
    "fgd": tuple(SIZES),
}
"""Losses whose kernels the table has, and the sizes of their maps."""


# ---- what is launched ----------------------------------------------------------------------------------------------


class _Recorder:
    """A `Device` that a launcher can plan for; nothing runs."""

    facts = FACTS

    def launch(self, launch: Launch) -> None:
        raise NotImplementedError

    def tickets(self, count: int) -> Tensor:
        return torch.empty(count, dtype=torch.int32, device="meta")


def launches_of(loss: str, size: str, layout: str) -> list[Launch]:
    """The launches of the forward pass over maps of `SIZES` that need no memory."""
    with torch.no_grad():
        return list(FUSED[loss].launches(_Recorder(), *_arguments(loss, size, layout)))


def _arguments(loss: str, size: str, layout: str) -> list[Any]:
    shapes = [LEVELS[level] for level in SIZES[size]]
    empty = lambda *shape: torch.empty(shape, device="meta")  # noqa: E731
    maps = [empty(*shape).to(DTYPE, memory_format=LAYOUTS[layout]) for shape in shapes]
    values: Mapping[str, Any] = {
        "students": maps,
        "teachers": maps,
        "matrices": [empty(c, c) for _, c, _, _ in shapes],
        "biases": [empty(c) for _, c, _, _ in shapes],
        "weights": [],
        "masks": [empty(n, h, w) for n, _, h, w in shapes],
        "tau": 1.0,
        "gamma": 1.0,
        "temperature": 0.5,
    }
    return [*(values[name] for name in FUSED[loss].parameters), None]


def kernel_of(launch: Launch) -> str:
    """The kernel's name without the dtype of the maps."""
    return launch.kernel.removesuffix(SUFFIX[DTYPE])


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
    block_bytes = launch.block * kernel.loads * VECTOR_BYTES
    moved = (kernel.reads + kernel.writes) * map_bytes + _partial_bytes(launch)
    kept = min(kernel.reads * map_bytes, L2_KEPT * card.l2_bytes) if kernel.again else 0.0
    from_dram = moved - kept * (1 - card.stream_tb_s / L2_TB_S)
    turns = waves(launch.grid, blocks * card.multiprocessors)
    memory_us = sum(turn / launch.grid * from_dram / bandwidth_tb_s(card, turn * block_bytes) for turn in turns) / 1e6
    trips_us = TRIP_US * kernel.trips * (len(turns) if launch.cluster > 1 else 1)
    arithmetic_us = _arithmetic_us(card, kernel, launch, map_bytes)
    us = LAUNCH_US + max(memory_us, arithmetic_us) + trips_us
    under_way = min(blocks, launch.grid / card.multiprocessors) * block_bytes
    return Estimate(launch, blocks, moved, round(under_way), launch.grid / (blocks * card.multiprocessors), us)


def _arithmetic_us(card: Card, kernel: Kernel, launch: Launch, map_bytes: float) -> float:
    elements = map_bytes / DTYPE.itemsize
    exponentials = (
        kernel.exponentials * elements / (card.multiprocessors * EXPONENTIALS_PER_CLOCK * card.clock_ghz * 1e3)
    )
    flop = 2 * kernel.products * elements * _channels(launch, "STUDENT") if kernel.products else 0.0
    return exponentials + flop / (TENSOR_SHARE * card.tensor_tflop_s * 1e6)


def _channels(launch: Launch, of: str) -> int:
    """From the defines of the adapter's build."""
    return int(dict(define.split("=") for define in launch.source.defines)[f"{of}_CHANNELS"])


def _partial_bytes(launch: Launch) -> int:
    """Bytes of the blocks' shares of an adapter's gradient, which one kernel writes and another adds up, else 0."""
    if launch.source.folder != "adapter_mse":
        return 0
    blocks = sum(level.blocks for level in launch.args.levels[: launch.args.count])
    return 4 * blocks * _channels(launch, "TEACHER") * (_channels(launch, "STUDENT") + 1)


def estimates(card: Card, loss: str, size: str, layout: str, kernels: Mapping[str, Kernel] = KERNELS) -> list[Estimate]:
    """Each launch of a forward pass."""
    launches = launches_of(loss, size, layout)
    map_bytes = DTYPE.itemsize * sum(math.prod(LEVELS[level]) for level in SIZES[size])
    weights = Counter[str]()  # launches of one kernel share the maps, as clusters by what they hold of them
    for launch in launches:
        weights[launch.kernel] += launch.grid * max(launch.shared, 1)
    return [
        estimate(
            card,
            kernels[kernel_of(launch)],
            launch,
            map_bytes * launch.grid * max(launch.shared, 1) / weights[launch.kernel],
        )
        for launch in launches
    ]


def loss_us(card: Card, loss: str, size: str, layout: str) -> float:
    """Forward and backward in a CUDA graph; the backward pass finds that its gradient needs no correction."""
    return sum(one.us for one in estimates(card, loss, size, layout)) + LAUNCH_US + TRIP_US


def stream_us(card: Card, size: str) -> float:
    """torch.add(s, t, out=g): the least that a fused loss can do."""
    elements = sum(math.prod(LEVELS[level]) for level in SIZES[size])
    return LAUNCH_US + 3 * DTYPE.itemsize * elements / card.stream_tb_s / 1e6


# ---- tables --------------------------------------------------------------------------------------------------------


def losses_table() -> str:
    """Microseconds of every loss on every card, and in brackets the share of the stream's speed, in per cent."""
    columns = [(card, size) for card in CARDS for size in SIZES]
    rows = [["us (% of stream)", *(f"{card} {size}" for card, size in columns)]]
    rows.append(["stream", *(f"{stream_us(CARDS[card], size):.0f}" for card, size in columns)])
    for loss, layout in product(MODELLED, LAYOUTS):
        rows.append([f"{loss}, {layout}", *(_cell(CARDS[card], loss, size, layout) for card, size in columns)])
    return _aligned(rows)


def _cell(card: Card, loss: str, size: str, layout: str) -> str:
    if size not in MODELLED[loss]:
        return "-"
    us = loss_us(card, loss, size, layout)
    return f"{us:.0f} ({100 * stream_us(card, size) / us:.0f})"


def kernels_table(kernels: Mapping[str, Kernel] = KERNELS) -> str:
    """Every kernel over the maps of stride 8: what a multiprocessor has of it, and its time on every card."""
    head = ["kernel, stride 8", "blocks", "threads", "registers", "a SM", "waves", "loads", "KB under way", "MB"]
    rows = [[*head, *(f"{card} us" for card in CARDS)]]
    for loss, layout in product(MODELLED, LAYOUTS):
        by_card = [estimates(card, loss, "s8", layout, kernels) for card in CARDS.values()]
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
            rows.append([f"{name}, {layout}", *map(str, (*sizes, *rates)), *times])
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
    launches = [launch for loss, layout in product(MODELLED, LAYOUTS) for launch in launches_of(loss, "s8", layout)]
    for source in dict.fromkeys(launch.source for launch in launches):
        compiled = compile_for(source, ARCHITECTURE)
        loads, resources = loads_under_way(disassemble(compiled.code)), compiled.resources
        for entry in dict.fromkeys(launch.kernel for launch in launches if launch.source == source):
            name, took = entry.removesuffix(SUFFIX[DTYPE]), resources[entry]
            before = found.get(name, KERNELS[name]._replace(registers=0, static_shared=0, loads=loads[entry]))
            found[name] = before._replace(
                registers=max(before.registers, took.registers),
                static_shared=max(before.static_shared, took.shared_bytes),
                loads=min(before.loads, loads[entry]),
            )
    return found


if __name__ == "__main__":
    print(f"{losses_table()}\n\n{kernels_table()}")
