"""Pearson distance (PKD): reference, launcher of kernel.cu, and the function that losses call."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from compress.kernels.device import (
    MAX_LEVELS,
    RESERVED_SHARED_BYTES,
    SUFFIX,
    VECTOR_BYTES,
    Device,
    Facts,
    Launch,
    Launches,
    LevelMaps,
    Maps,
    addresses,
    ceil_div,
    fields,
    fits_vectors,
    level_maps,
    pointer,
    power_of_2,
    share_blocks,
    vector,
    with_constants,
)
from compress.kernels.fused import FusedLoss, check_maps
from compress.kernels.reference_helpers import sum_of_levels, widened
from runtime.errors import UsageError

EPS = 1e-6
"""Added to each channel's variance, so that a constant channel has a finite gradient."""
THREADS = 256
CLUSTER_THREADS = 512
MOMENTS = COEFFICIENTS = 5
SPLIT_SAMPLES = 16384
"""Samples of a channel per block: its threads make 16 passes over float32; a detector's maps give 3000 blocks."""
MAX_SPLITS = 32
"""Most blocks of an NCHW channel: one warp adds up their results, one lane for each."""
LAST_BLOCKS_PER_SM = 2
"""Channels-last blocks that a multiprocessor runs at once, as 128 registers per thread allow; three would have 80, too
few for four loads of half types."""
LAST_BLOCKS = 128 * LAST_BLOCKS_PER_SM
"""Blocks of one channels-last launch: all that 128 multiprocessors run at once. Each costs a record of 1280 bytes."""
LAST_BLOCK_BYTES = 32 << 10
"""Least bytes of the student per channels-last block: 8 passes of its threads."""
VECTOR_COLUMNS, SCALAR_COLUMNS = 8, 32
"""Columns of a channels-last tile, in vectors of 16 bytes, or in single channels if those do not fit."""
L2_SHARE = 0.4
"""Share of the L2 cache for the maps of one group: an H100 keeps what all its multiprocessors read in both halves."""
MIN_GROUP_BYTES = 8 << 20
"""Least bytes of a group: a smaller one takes the GPU less time than its two launches take the host."""
CLUSTER_CAPABILITY = (9, 0)
CLUSTER_SIZES = (1, 2, 4, 8)
"""Sizes that every GPU with clusters supports."""
CLUSTER_HEAD_BYTES = 768
"""Bytes of shared memory before the maps that a block of a cluster keeps."""
SOURCE = with_constants(
    "pkd",
    EPS=EPS,
    THREADS=THREADS,
    CLUSTER_THREADS=CLUSTER_THREADS,
    MOMENTS=MOMENTS,
    COEFFICIENTS=COEFFICIENTS,
    VECTOR_COLUMNS=VECTOR_COLUMNS,
    SCALAR_COLUMNS=SCALAR_COLUMNS,
    LAST_BLOCKS_PER_SM=LAST_BLOCKS_PER_SM,
    CLUSTER_HEAD_BYTES=CLUSTER_HEAD_BYTES,
)

Form = Literal["auto", "plain", "grouped", "cluster"]


def pkd(students: Maps, teachers: Maps, *, scale: Tensor | None = None) -> Tensor:
    """1 - Pearson's r of each channel over (N, H, W), averaged over channels; the levels are added up.

    Computed as half the mean squared difference of the standardised channels, (x - mean) / sqrt(var + 1e-6) with the
    biased variance: equal to 1 - r except for that epsilon, and exactly 0 for equal maps, constant channels included.
    Source: Cao et al., NeurIPS 2022.

    Args:
        students, teachers: (N, C, H, W) per level, in any float dtype. Only students get a gradient.
        scale: () float32, the upstream gradient to expect; None is 1.

    Returns the loss () float32 (float64 for float64 maps). Raises UsageError for maps of unlike shapes.
    """
    check_maps(students, teachers)
    arguments = ([*students], [*teachers], scale)
    device = PKD.device(arguments)
    if device is None:
        return PKD.by_torch(arguments)
    return PKD.differentiable(device, PKD.run(device, arguments), arguments)


def reference(students: Maps, teachers: Maps) -> Tensor:
    """`pkd` in plain torch."""
    pairs = zip(students, teachers, strict=True)
    return sum_of_levels(0.5 * F.mse_loss(_standardised(widened(s)), _standardised(widened(t))) for s, t in pairs)


def _standardised(x: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, dim=(0, 2, 3), correction=0, keepdim=True)
    return (x - mean) * (variance + EPS).rsqrt()


# ---- launcher ----------------------------------------------------------------------------------------------------


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

    maps: LevelMaps
    vectorised: bool
    splits: int
    """Blocks for one channel, or for one tile of channels."""

    @property
    def channels(self) -> int:
        return self.maps.student.shape[1]

    @property
    def samples(self) -> int:
        return self.maps.student.numel() // self.channels

    @property
    def step(self) -> int:
        """Elements that a thread moves at a time."""
        return vector(self.maps.student.dtype) if self.vectorised else 1

    @property
    def width(self) -> int:
        """Channels last: steps that a block takes side by side, 128 bytes or as few as there are; a power of 2."""
        most = VECTOR_COLUMNS if self.vectorised else SCALAR_COLUMNS
        return min(most, power_of_2(ceil_div(self.channels, self.step)))

    @property
    def tile(self) -> int:
        """Channels of a block."""
        return self.width * self.step if self.maps.channels_last else 1

    @property
    def tiles(self) -> int:
        return ceil_div(self.channels, self.tile)


class ChannelRange(NamedTuple):
    """Channels [begin, end) of a level; all of them if channels last."""

    level: int
    begin: int
    end: int
    nbytes: int
    """Bytes of student and teacher."""


class Group(NamedTuple):
    """Ranges that are launched together: one cluster launch, or statistics and then gradient."""

    parts: list[ChannelRange]
    cluster: int = 0
    """Blocks of a cluster; 0 is the two-pass form."""


def launches(
    device: Device, students: Maps, teachers: Maps, scale: Tensor | None = None, *, form: Form = "auto"
) -> Launches:
    """One launch or two for each group of `plan`. The gradient has the student's layout.

    `form`: "plain" reads all maps twice, "grouped" does so for as many channels at a time as the L2 cache holds, with
    the same bits; "cluster" reads them once; "auto" is "cluster" for the levels that can have it and "grouped" for the
    rest. Raises UsageError when `form` is "cluster" and the GPU or a level does not allow it.
    """
    levels = describe(level_maps(students, teachers))
    work = _Workspace(device, levels)
    loss = levels[0].maps.student.new_empty((), dtype=torch.float32)
    groups = plan(device.facts, levels, form)
    for group in groups:
        args = Args(
            scale=pointer(scale),
            losses=work.losses,
            loss=pointer(loss) if group is groups[-1] else 0,
            ticket=work.ticket,
            channels=work.channels,
        )
        yield from _launches(levels, work, group, args)
    return loss, [level.maps.gradient for level in levels]


def describe(maps: Sequence[LevelMaps]) -> list[Level]:
    """The levels and their partition, which depends on the shapes alone."""
    students = [m.student for m in maps]
    shares = share_blocks([s.numel() for s in students], LAST_BLOCKS, LAST_BLOCK_BYTES // students[0].itemsize)
    return [_describe(m, share) for m, share in zip(maps, shares, strict=True)]


def _describe(maps: LevelMaps, share: int) -> Level:
    _, channels, height, width = maps.student.shape
    level = Level(maps, fits_vectors(channels if maps.channels_last else height * width, *maps), 1)
    splits = share // level.tiles if maps.channels_last else min(MAX_SPLITS, ceil_div(level.samples, SPLIT_SAMPLES))
    return level._replace(splits=max(1, splits))


# ---- what is launched ---------------------------------------------------------------------------------------------


def plan(facts: Facts, levels: Sequence[Level], form: Form) -> list[Group]:
    """Groups that cover every channel of every level once."""
    clusters = [_cluster(facts, level) if form in ("auto", "cluster") else 0 for level in levels]
    if form == "cluster":
        _check_clusters(facts, levels, clusters)
    whole = [ChannelRange(i, 0, level.channels, 2 * level.maps.student.nbytes) for i, level in enumerate(levels)]
    groups = [
        Group([whole[i] for i, c in enumerate(clusters) if c == size], size) for size in sorted({*clusters} - {0})
    ]
    twice = [part for part, cluster in zip(whole, clusters, strict=True) if not cluster]
    budget = math.inf if form == "plain" else _group_bytes(facts)
    # Channels last, a group of channels is a strip of each row: too narrow for whole cache lines to fit the L2 cache.
    groups += _grouped([part for part in twice if not levels[part.level].maps.channels_last], budget)
    groups += _grouped([part for part in twice if levels[part.level].maps.channels_last], math.inf)
    return groups


def _grouped(parts: Sequence[ChannelRange], budget: float) -> list[Group]:
    """`parts` cut into runs of channels of at most `budget` bytes, and as many as fit together again."""
    groups: list[list[ChannelRange]] = []
    for run in (run for part in parts for run in _split_range(part, budget)):
        if groups and len(groups[-1]) < MAX_LEVELS and sum(p.nbytes for p in groups[-1]) + run.nbytes <= budget:
            groups[-1].append(run)
        else:
            groups.append([run])
    return [Group(parts) for parts in groups]


def _split_range(part: ChannelRange, budget: float) -> Iterator[ChannelRange]:
    """Even runs of channels within `budget`; the whole if not even one channel fits."""
    channels, channel_bytes = part.end, part.nbytes // part.end
    most = int(min(channels, budget / channel_bytes)) or channels
    runs = ceil_div(channels, most)
    for i in range(runs):
        begin, end = channels * i // runs, channels * (i + 1) // runs
        yield ChannelRange(part.level, begin, end, channel_bytes * (end - begin))


def _group_bytes(facts: Facts) -> float:
    budget = L2_SHARE * facts.l2_bytes
    return budget if budget >= MIN_GROUP_BYTES else math.inf


def _cluster(facts: Facts, level: Level) -> int:
    """Blocks of the smallest cluster that holds a channel, two blocks per multiprocessor if that can be; 0 for none."""
    if facts.capability < CLUSTER_CAPABILITY or level.maps.channels_last or not level.vectorised:
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
            "Leave out form='cluster'",
        )
    for level, cluster in zip(levels, clusters, strict=True):
        if not cluster:
            raise UsageError(
                f"PKD by clusters of maps {tuple(level.maps.student.shape)}: NCHW, 16-byte rows and at most "
                f"{CLUSTER_SIZES[-1]} x {facts.shared_bytes} bytes per channel are possible",
                "Leave out form='cluster'",
            )


# ---- launching ----------------------------------------------------------------------------------------------------


class _Workspace:
    """Device addresses of what the kernels pass to each other, float32 except for the tickets."""

    def __init__(self, device: Device, levels: Sequence[Level]) -> None:
        self.firsts = [0, *accumulate(level.channels for level in levels)]
        self.channels = self.firsts[-1]
        records = [level.tiles * level.splits * level.tile * MOMENTS for level in levels]
        sizes = [self.channels, COEFFICIENTS * self.channels, *records]
        self._tensor = levels[0].maps.student.new_empty(sum(sizes), dtype=torch.float32)
        self.losses, self.coefficients, *self.records = addresses(self._tensor, sizes)
        self._counters = device.tickets(self.channels + 1)  # kept: a captured graph's are ours alone
        self.tickets, self.ticket = addresses(self._counters, [self.channels, 1])


def _launches(levels: Sequence[Level], work: _Workspace, group: Group, args: Args) -> Iterator[Launch]:
    maps = levels[group.parts[0].level].maps
    suffix = SUFFIX[maps.student.dtype]
    if group.cluster:
        shared = max(_cluster_shared_bytes(levels[part.level], group.cluster) for part in group.parts)
        grid = _fill(args, levels, work, group.parts, group.cluster)
        yield Launch(SOURCE, f"pkd_cluster{suffix}", args, grid, CLUSTER_THREADS, shared, group.cluster)
        return
    last = "_last" if maps.channels_last else ""
    grid = _fill(args, levels, work, group.parts)
    yield Launch(SOURCE, f"pkd_statistics{last}{suffix}", args, grid, THREADS)
    grid = _fill(args, levels, work, group.parts[::-1])  # what was read last is still in the L2 cache
    yield Launch(SOURCE, f"pkd_gradient{last}{suffix}", args, grid, THREADS)


def _fill(
    args: Args, levels: Sequence[Level], work: _Workspace, parts: Sequence[ChannelRange], cluster: int = 0
) -> int:
    """Describe the parts; returns the number of blocks."""
    block = 0
    for entry, part in zip(args.levels, parts, strict=False):
        level = levels[part.level]
        images, channels, height, width = level.maps.student.shape
        first, skipped = work.firsts[part.level] + part.begin, part.begin * height * width * level.maps.student.itemsize
        entry.student, entry.teacher, entry.gradient = (pointer(tensor) + skipped for tensor in level.maps)
        entry.records = work.records[part.level] + 4 * MOMENTS * part.begin * level.splits
        entry.coefficients, entry.losses = work.coefficients + 4 * COEFFICIENTS * first, work.losses + 4 * first
        entry.tickets = work.tickets + 4 * first
        entry.images, entry.channels, entry.pixels = images, channels, height * width
        entry.first_block, entry.splits = block, cluster or level.splits
        entry.width, entry.vectorised = level.width, level.vectorised
        block += entry.splits * (level.tiles if level.maps.channels_last else part.end - part.begin)
    args.count = len(parts)
    return block


PKD = FusedLoss(
    "pkd", "Tensor[] students, Tensor[] teachers", function=pkd, source=SOURCE, launches=launches, reference=reference
)
