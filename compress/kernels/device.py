"""Code that all launchers share: the launch, its device, and the maps as kernels read them.

A launcher allocates, chooses the grid from the shapes, fills the arguments and yields launches. It never
checks which device it is on, a GPU or in the tests the CPU, so the tests run it unchanged on the host shim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Generator, Iterable, Sequence
from functools import lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from compress.kernels.toolchain import Source
from runtime.errors import UsageError

MAX_LEVELS = 4
"""Most pyramid levels of one launch: P3 to P6."""
MAX_ELEMENTS = (1 << 31) - 1
"""Most elements of a map: kernels count them in 32 bits."""
WARP = 32
"""Threads."""
SUFFIX = {torch.float32: "_f32", torch.float16: "_f16", torch.bfloat16: "_bf16"}
"""Dtype of the maps -> ending of the kernel's name."""
VECTOR_BYTES = 16
"""Bytes that one thread moves at a time."""
RESERVED_SHARED_BYTES = 1024
"""Shared memory of a multiprocessor that the system takes for each block."""


class Facts(NamedTuple):
    """Facts of a GPU on which the choice of kernels and launches may depend."""

    capability: tuple[int, int]
    """The GPU's compute capability, as (9, 0)."""
    l2_bytes: int
    shared_bytes: int
    """Dynamic shared memory that one block can ask for."""


class Launch(NamedTuple):
    """One kernel to queue."""

    source: Source
    kernel: str
    """An `extern "C"` entry point of the source."""
    args: ctypes.Structure
    """The struct that the kernel takes by value; it may be changed again once the kernel is queued."""
    grid: int
    """Blocks."""
    block: int
    """Threads of a block."""
    shared: int = 0
    """Bytes of dynamic shared memory of a block."""
    cluster: int = 1
    """Blocks that run together and see each other's shared memory; divides `grid`. 8 at most, which every GPU with
    clusters can run."""


class Device(Protocol):
    """Where kernels run."""

    @property
    def facts(self) -> Facts: ...

    def launch(self, launch: Launch) -> None:
        """Queue one kernel on the current stream."""

    def tickets(self, count: int) -> Tensor:
        """`count` uint32 that are 0; each kernel leaves them 0. Valid for kernels queued on the current stream."""


Maps = Sequence[Tensor]
"""One tensor a pyramid level."""
Result = tuple[Tensor, list[Tensor]]
"""A loss () float32, and the gradient of each tensor that learns, in the order of the arguments."""
Launches = Generator[Launch, None, Result]
"""The launcher at work: it yields one launch after another, and its return value is there after the last.

As long as it is not finished it holds every tensor whose address it wrote into a launch."""


def with_constants(folder: str, **constants: float) -> Source:
    """The source in `folder`, compiled with these constants and those of common.cuh."""
    return Source(folder).replaced(MAX_LEVELS=MAX_LEVELS, WARP=WARP, VECTOR_BYTES=VECTOR_BYTES, **constants)


def fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Fields of a `ctypes.Structure`: one of each name, all of one kind."""
    return tuple((name, kind) for name in names.split())


def pointer(tensor: Tensor | None) -> int:
    """Device address for a `c_void_p` field; 0, the null pointer, for None."""
    return 0 if tensor is None else tensor.data_ptr()


def vector(dtype: torch.dtype) -> int:
    """Elements in 16 bytes."""
    return VECTOR_BYTES // dtype.itemsize


def ceil_div(count: int, size: int) -> int:
    """How many pieces of `size` hold `count`."""
    return -(-count // size)


def power_of_2(least: int) -> int:
    """The smallest power of 2 that is at least `least`."""
    return 1 << (least - 1).bit_length()


def fits_vectors(run: int, *tensors: Tensor) -> bool:
    """True if all tensors are 16-byte aligned and `run` elements of the first one are a multiple of 16 bytes."""
    aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
    return aligned and run % vector(tensors[0].dtype) == 0


def is_channels_last(tensor: Tensor) -> bool:
    """Whether (N, C, H, W) is stored as (N, H, W, C). Maps that are dense both ways count as NCHW."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


class LevelMaps(NamedTuple):
    """One level: maps (N, C, H, W) in one dtype and one dense layout; an adapter's teacher may have another C."""

    student: Tensor
    teacher: Tensor
    gradient: Tensor
    """The student's gradient, to be written."""

    @property
    def channels_last(self) -> bool:
        return is_channels_last(self.student)

    def describe(self, level: Any, run: int, *others: Tensor) -> None:
        """Write what every kernel's struct of a level has: addresses, and whether 16-byte accesses fit `run` elements
        that lie together, here and in the other maps that the kernel reads beside them.
        """
        level.student, level.teacher, level.gradient = map(pointer, self)
        level.vectorised = fits_vectors(run, *self, *others)


def dense_pairs(students: Maps, teachers: Maps, *, nchw: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Each level's maps in the student's dtype and one dense layout: NCHW, or channels last if the student is so and
    `nchw` does not forbid it. What is already so is not copied.

    Raises UsageError as `check_levels` does.
    """
    check_levels(students, teachers)
    return [_dense_pair(s, t, nchw) for s, t in zip(students, teachers, strict=True)]


def check_levels(students: Maps, teachers: Maps) -> None:
    """Raises UsageError for no level, more than MAX_LEVELS of them, or students of several dtypes."""
    if not 1 <= len(students) <= MAX_LEVELS or len(students) != len(teachers):
        raise UsageError(
            f"{len(students)} student and {len(teachers)} teacher maps",
            f"Give one of each for every level, 1 to {MAX_LEVELS} levels",
        )
    if len({s.dtype for s in students}) != 1:
        raise UsageError(f"the levels have dtypes {[str(s.dtype) for s in students]}", "Give all maps in one dtype")


def _dense_pair(student: Tensor, teacher: Tensor, nchw: bool) -> tuple[Tensor, Tensor]:
    last = not nchw and is_channels_last(student)
    layout = torch.channels_last if last else torch.contiguous_format
    return student.contiguous(memory_format=layout), teacher.to(student.dtype).contiguous(memory_format=layout)


def level_maps(students: Maps, teachers: Maps, *, nchw: bool = False) -> list[LevelMaps]:
    """`dense_pairs`, each with a gradient of the student to be written."""
    return [LevelMaps(s, t, torch.empty_like(s)) for s, t in dense_pairs(students, teachers, nchw=nchw)]


def share_blocks(sizes: Sequence[int], most: int, size_of_block: int) -> list[int]:
    """Divide blocks in proportion to `sizes`: `most` in all, fewer if `size_of_block` needs no more, at least one
    each. The result depends on nothing else, so equal shapes give equal bits on every GPU.
    """
    blocks = min(most, ceil_div(sum(sizes), size_of_block))
    return [max(1, blocks * size // sum(sizes)) for size in sizes]


@lru_cache
def cuts(strips: tuple[int, ...], work: tuple[int, ...], most: int, least: int) -> tuple[int, ...]:
    """Into how many blocks each strip of each level is cut, one at least: so that the largest block is as small as
    `most` blocks allow, and no smaller than `least` needs it.

    `strips` is their number by level, `work` the elements of one. The result depends on the arguments alone, as that of
    `share_blocks`.
    """
    pieces = [1] * len(strips)
    while True:
        sizes = [one / count for one, count in zip(work, pieces, strict=True)]
        largest = max(range(len(sizes)), key=sizes.__getitem__)
        blocks = sum(number * count for number, count in zip(strips, pieces, strict=True))
        if sizes[largest] <= least or blocks + strips[largest] > most:
            return tuple(pieces)
        pieces[largest] += 1


def addresses(workspace: Tensor, sizes: Sequence[int]) -> list[int]:
    """The address of each of the parts, `sizes` elements of the workspace one after another."""
    starts = accumulate(sizes[:-1], initial=0)
    return [pointer(workspace) + workspace.itemsize * start for start in starts]


def set_blocks(levels: Iterable[Any], shares: Sequence[int]) -> None:
    """Write each level's share of a launch's blocks into its struct; they follow one another."""
    for level, first, blocks in zip(levels, accumulate(shares, initial=0), shares, strict=False):
        level.first_block, level.blocks = first, blocks
