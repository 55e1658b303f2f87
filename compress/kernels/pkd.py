"""Host half of cuda/pkd.cu: see there for formula, traffic and tiling."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    SUFFIX,
    VECTOR_BYTES,
    Device,
    Facts,
    ceil_div,
    dense_pairs,
    fields,
    fits_vectors,
    is_channels_last,
    pointer,
    power_of_2,
    share_blocks,
    vector,
)
from runtime.errors import UsageError

SOURCE = "pkd.cu"
THREADS = 256
CLUSTER_THREADS = 512
MOMENTS = COEFFICIENTS = 5
SPLIT_SAMPLES = 16384
"""Of a channel, for one block: 16 passes of its threads over float32, and 3000 blocks for a detector's three maps."""
MAX_SPLITS = 32
"""Of an NCHW channel: the lanes of the warp that adds them up."""
LAST_BLOCKS = 384
"""Of one channels-last launch: 3 a multiprocessor on 128 of them, which 80 registers a thread allow; every block more
costs a record of 1280 bytes."""
LAST_BLOCK_BYTES = 32 << 10
"""Of the student, for one channels-last block at least: 8 passes of its threads."""
VECTOR_COLUMNS, SCALAR_COLUMNS = 8, 32
"""Of a channels-last tile: see `kTile` of pkd.cu."""
L2_SHARE = 0.4
"""Of the L2 cache, for the maps of one group: an H100 keeps what all its multiprocessors read in both halves."""
MIN_GROUP_BYTES = 8 << 20
"""A smaller group cannot keep a GPU busy for longer than its two launches take."""
CLUSTER_CAPABILITY = (9, 0)
CLUSTER_SIZES = (1, 2, 4, 8)
"""What every GPU with clusters can run."""
CLUSTER_HEAD_BYTES = 768
"""`kHeadFloats` of pkd.cu."""
RESERVED_SHARED_BYTES = 1024
"""What the system takes of a multiprocessor's shared memory for each block."""

Form = Literal["auto", "plain", "grouped", "cluster"]


class _LevelArgs(ctypes.Structure):
    _fields_ = (
        *fields(ctypes.c_void_p, "student teacher gradient records coefficients losses tickets"),
        *fields(ctypes.c_uint32, "images channels pixels first_block splits width vectorised"),
    )


class Args(ctypes.Structure):
    _fields_ = (
        ("levels", _LevelArgs * MAX_LEVELS),
        *fields(ctypes.c_void_p, "scale losses loss ticket"),
        ("channels", ctypes.c_uint32),
        ("count", ctypes.c_int32),
    )


class Level(NamedTuple):
    """One level's maps, and how blocks share them."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor
    channels_last: bool
    vectorised: bool
    splits: int
    """Blocks for one channel, or for one tile of channels."""

    @property
    def channels(self) -> int:
        return self.student.shape[1]

    @property
    def samples(self) -> int:
        return self.student.numel() // self.channels

    @property
    def step(self) -> int:
        """Elements that a thread moves at a time."""
        return vector(self.student.dtype) if self.vectorised else 1

    @property
    def width(self) -> int:
        """Channels last: steps that a block takes side by side, 128 bytes or as few as there are; a power of 2."""
        most = VECTOR_COLUMNS if self.vectorised else SCALAR_COLUMNS
        return min(most, power_of_2(ceil_div(self.channels, self.step)))

    @property
    def tile(self) -> int:
        """Channels of a block."""
        return self.width * self.step if self.channels_last else 1

    @property
    def tiles(self) -> int:
        return ceil_div(self.channels, self.tile)


class Part(NamedTuple):
    """Channels [begin, end) of a level; all of them where channels last."""

    level: int
    begin: int
    end: int
    nbytes: int
    """Of student and teacher."""


class Launch(NamedTuple):
    """Parts that go together: one cluster launch, or statistics and then gradient."""

    parts: list[Part]
    cluster: int = 0
    """Blocks of a cluster; 0 is the two-pass form."""


def pkd(
    device: Device,
    students: Sequence[Tensor],
    teachers: Sequence[Tensor],
    scale: Tensor | None = None,
    *,
    form: Form = "auto",
) -> tuple[Tensor, list[Tensor]]:
    """Loss () float32, and for each level `scale` times its gradient in the student's dtype and layout.

    `scale` () float32 is the upstream gradient to expect; None is 1. `form`: "plain" reads all maps twice, "grouped"
    does so for as many channels at a time as the L2 cache holds, with the same bits; "cluster" reads them once; "auto"
    is "cluster" for the levels that can have it and "grouped" for the rest.

    Errors: UsageError where `form` is "cluster" and the GPU or a level cannot have it.
    """
    pairs = dense_pairs(students, teachers, nchw=False)
    levels = describe(pairs)
    work = _Workspace(device, levels)
    loss = levels[0].student.new_empty((), dtype=torch.float32)
    launches = plan(device.facts, levels, form)
    for launch in launches:
        args = Args(
            scale=pointer(scale),
            losses=work.losses,
            loss=pointer(loss) if launch is launches[-1] else 0,
            ticket=work.ticket,
            channels=work.channels,
        )
        _run(device, levels, work, launch, args)
    return loss, [level.gradient for level in levels]


def describe(pairs: Sequence[tuple[Tensor, Tensor]]) -> list[Level]:
    """The levels, with gradients to be written and the partition, which depends on the shapes alone."""
    levels = []
    shares = share_blocks([s.numel() for s, _ in pairs], LAST_BLOCKS, LAST_BLOCK_BYTES // pairs[0][0].itemsize)
    for (s, t), share in zip(pairs, shares, strict=True):
        gradient, last = torch.empty_like(s), is_channels_last(s)
        row = s.shape[1] if last else s.shape[2] * s.shape[3]
        level = Level(s, t, gradient, last, fits_vectors(row, s, t, gradient), 1)
        splits = share // level.tiles if last else min(MAX_SPLITS, ceil_div(level.samples, SPLIT_SAMPLES))
        levels.append(level._replace(splits=max(1, splits)))
    return levels


# ---- what is launched ---------------------------------------------------------------------------------------------


def plan(facts: Facts, levels: Sequence[Level], form: Form) -> list[Launch]:
    """Launches that cover every channel of every level once."""
    clusters = [_cluster(facts, level) if form in ("auto", "cluster") else 0 for level in levels]
    if form == "cluster":
        _check_clusters(facts, levels, clusters)
    whole = [Part(i, 0, level.channels, 2 * level.student.nbytes) for i, level in enumerate(levels)]
    launches = [
        Launch([whole[i] for i, c in enumerate(clusters) if c == size], size) for size in sorted({*clusters} - {0})
    ]
    twice = [part for part, cluster in zip(whole, clusters, strict=True) if not cluster]
    budget = math.inf if form == "plain" else _group_bytes(facts)
    # Channels last, a group of channels is a strip of each row: too narrow for whole cache lines to fit the L2 cache.
    launches += _groups([part for part in twice if not levels[part.level].channels_last], budget)
    launches += _groups([part for part in twice if levels[part.level].channels_last], math.inf)
    return launches


def _groups(parts: Sequence[Part], budget: float) -> list[Launch]:
    """`parts` cut into runs of channels of at most `budget` bytes, and as many as fit together again."""
    groups: list[list[Part]] = []
    for run in (run for part in parts for run in _cut(part, budget)):
        if groups and len(groups[-1]) < MAX_LEVELS and sum(p.nbytes for p in groups[-1]) + run.nbytes <= budget:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [Launch(group) for group in groups]


def _cut(part: Part, budget: float) -> Iterator[Part]:
    """Even runs of channels within `budget`; the whole where not even one channel fits."""
    channels, channel_bytes = part.end, part.nbytes // part.end
    most = int(min(channels, budget / channel_bytes)) or channels
    runs = ceil_div(channels, most)
    for i in range(runs):
        begin, end = channels * i // runs, channels * (i + 1) // runs
        yield Part(part.level, begin, end, channel_bytes * (end - begin))


def _group_bytes(facts: Facts) -> float:
    budget = L2_SHARE * facts.l2_bytes
    return budget if budget >= MIN_GROUP_BYTES else math.inf


def _cluster(facts: Facts, level: Level) -> int:
    """Blocks of the smallest cluster that holds a channel, two blocks a multiprocessor if that can be; 0 for none."""
    if facts.capability < CLUSTER_CAPABILITY or level.channels_last or not level.vectorised:
        return 0
    for most in ((facts.shared_bytes - RESERVED_SHARED_BYTES) // 2, facts.shared_bytes):
        for size in CLUSTER_SIZES:
            if _cluster_shared_bytes(level, size) <= most:
                return size
    return 0


def _cluster_shared_bytes(level: Level, cluster: int) -> int:
    vectors = level.samples // level.step
    return CLUSTER_HEAD_BYTES + 2 * VECTOR_BYTES * ceil_div(vectors, cluster)


def _check_clusters(facts: Facts, levels: Sequence[Level], clusters: Sequence[int]) -> None:
    if facts.capability < CLUSTER_CAPABILITY:
        have, need = (".".join(map(str, c)) for c in (facts.capability, CLUSTER_CAPABILITY))
        raise UsageError(
            f"PKD by clusters on a GPU of compute capability {have}, which has none; they came with {need}",
            "leave out form='cluster'",
        )
    for level, cluster in zip(levels, clusters, strict=True):
        if not cluster:
            raise UsageError(
                f"PKD by clusters of maps {tuple(level.student.shape)}: NCHW, 16-byte rows and at most "
                f"{CLUSTER_SIZES[-1]} x {facts.shared_bytes} bytes a channel are possible",
                "leave out form='cluster'",
            )


# ---- launching ----------------------------------------------------------------------------------------------------


class _Workspace:
    """Device addresses of what the kernels hand on to each other, float32 but for the tickets."""

    def __init__(self, device: Device, levels: Sequence[Level]) -> None:
        self.firsts = [0, *accumulate(level.channels for level in levels)]
        self.channels = self.firsts[-1]
        records = [0, *accumulate(level.tiles * level.splits * level.tile * MOMENTS for level in levels)]
        floats = self.channels * (1 + COEFFICIENTS) + records[-1]
        self._tensor = levels[0].student.new_empty(floats, dtype=torch.float32)
        self.losses = pointer(self._tensor)
        self.coefficients = self.losses + 4 * self.channels
        self.records = [self.coefficients + 4 * (self.channels * COEFFICIENTS + at) for at in records]
        self._counters = device.tickets(self.channels + 1)  # kept: a captured graph's are ours alone
        self.tickets = pointer(self._counters)
        self.ticket = self.tickets + 4 * self.channels


def _run(device: Device, levels: Sequence[Level], work: _Workspace, launch: Launch, args: Args) -> None:
    like = levels[launch.parts[0].level]
    suffix = SUFFIX[like.student.dtype]
    if launch.cluster:
        shared = max(_cluster_shared_bytes(levels[part.level], launch.cluster) for part in launch.parts)
        grid = _fill(args, levels, work, launch.parts, launch.cluster)
        device.launch(
            SOURCE,
            f"pkd_cluster{suffix}",
            args,
            grid=grid,
            block=CLUSTER_THREADS,
            shared=shared,
            cluster=launch.cluster,
        )
        return
    last = "_last" if like.channels_last else ""
    grid = _fill(args, levels, work, launch.parts)
    device.launch(SOURCE, f"pkd_statistics{last}{suffix}", args, grid=grid, block=THREADS)
    grid = _fill(args, levels, work, launch.parts[::-1])  # what was read last is still in the L2 cache
    device.launch(SOURCE, f"pkd_gradient{last}{suffix}", args, grid=grid, block=THREADS)


def _fill(args: Args, levels: Sequence[Level], work: _Workspace, parts: Sequence[Part], cluster: int = 0) -> int:
    """Describe the parts; returns the number of blocks."""
    block = 0
    for entry, part in zip(args.levels, parts, strict=False):
        level = levels[part.level]
        images, channels, height, width = level.student.shape
        first, skipped = work.firsts[part.level] + part.begin, part.begin * height * width * level.student.itemsize
        entry.student, entry.teacher = pointer(level.student) + skipped, pointer(level.teacher) + skipped
        entry.gradient = pointer(level.gradient) + skipped
        entry.records = work.records[part.level] + 4 * MOMENTS * part.begin * level.splits
        entry.coefficients, entry.losses = work.coefficients + 4 * COEFFICIENTS * first, work.losses + 4 * first
        entry.tickets = work.tickets + 4 * first
        entry.images, entry.channels, entry.pixels = images, channels, height * width
        entry.first_block, entry.splits = block, cluster or level.splits
        entry.width, entry.vectorised = level.width, level.vectorised
        block += entry.splits * (level.tiles if level.channels_last else part.end - part.begin)
    args.count = len(parts)
    return block
