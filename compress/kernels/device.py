"""What a kernel's host half asks of the place it runs on: a GPU, or in the tests the CPU.

The host halves (`weighted_mse.py`, `cwd.py`, ...) plan: they allocate, choose the grid from the shapes, fill the
arguments and call `launch`. They never ask which device it is, so the tests run them unchanged on the host shim.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from runtime.errors import UsageError

MAX_LEVELS = 4
"""`kMaxLevels` of common.cuh."""
SUFFIX = {torch.float32: "_f32", torch.float16: "_f16", torch.bfloat16: "_bf16"}
"""Dtype of the maps -> ending of the kernel's name."""
VECTOR_BYTES = 16
"""What one thread moves at a time."""


class Facts(NamedTuple):
    """What the choice of kernels and launches may depend on."""

    capability: tuple[int, int]
    """Of the GPU, as (9, 0)."""
    l2_bytes: int
    shared_bytes: int
    """Dynamic shared memory that one block can ask for."""


class Device(Protocol):
    """Where kernels run."""

    @property
    def facts(self) -> Facts: ...

    def launch(
        self,
        source: str,
        kernel: str,
        args: ctypes.Structure,
        *,
        grid: int,
        block: int,
        shared: int = 0,
        cluster: int = 1,
        defines: tuple[str, ...] = (),
    ) -> None:
        """Queue one kernel of cuda/`source` on the current stream.

        `kernel` is an `extern "C"` entry point that takes the struct `args` by value. `grid` counts blocks, `block`
        the threads of each, `shared` bytes of dynamic shared memory. `cluster` blocks run together and see each
        other's shared memory; it divides `grid`. `defines`, as "NAME=value", specialise the source.
        """

    def tickets(self, count: int) -> Tensor:
        """`count` uint32 that are 0; each kernel leaves them 0. Valid for kernels queued on the current stream."""


def fields(kind: Any, names: str) -> tuple[tuple[str, Any], ...]:
    """Of a `ctypes.Structure`: one of each name, all of one kind."""
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
    """Whether 16-byte accesses cut every `run` elements of the first one evenly, and may start where each starts."""
    aligned = all(tensor.data_ptr() % VECTOR_BYTES == 0 for tensor in tensors)
    return aligned and run % vector(tensors[0].dtype) == 0


def is_channels_last(tensor: Tensor) -> bool:
    """Whether (N, C, H, W) lies in memory as (N, H, W, C). Maps that are dense both ways count as NCHW."""
    return not tensor.is_contiguous() and tensor.is_contiguous(memory_format=torch.channels_last)


def dense_pairs(students: Sequence[Tensor], teachers: Sequence[Tensor], *, nchw: bool) -> list[tuple[Tensor, Tensor]]:
    """Each level's maps in the student's dtype and one dense layout: NCHW, or channels last where the student is so and
    `nchw` does not forbid it.

    What is already so is not copied. Errors: UsageError for no level, more than MAX_LEVELS, levels of several dtypes,
    or a pair of unlike images.
    """
    if not 1 <= len(students) <= MAX_LEVELS or len(students) != len(teachers):
        raise UsageError(
            f"{len(students)} student and {len(teachers)} teacher maps",
            f"give one of each for every level, 1 to {MAX_LEVELS} levels",
        )
    if len({s.dtype for s in students}) != 1:
        raise UsageError(f"the levels have dtypes {[str(s.dtype) for s in students]}", "give all maps in one dtype")
    for s, t in zip(students, teachers, strict=True):
        if (s.shape[0], s.shape[2:]) != (t.shape[0], t.shape[2:]):
            raise UsageError(f"maps of shapes {tuple(s.shape)} and {tuple(t.shape)}", "compare maps of the same images")
    return [_dense_pair(s, t, nchw) for s, t in zip(students, teachers, strict=True)]


def _dense_pair(student: Tensor, teacher: Tensor, nchw: bool) -> tuple[Tensor, Tensor]:
    last = not nchw and is_channels_last(student)
    layout = torch.channels_last if last else torch.contiguous_format
    return student.contiguous(memory_format=layout), teacher.to(student.dtype).contiguous(memory_format=layout)


def share_blocks(sizes: Sequence[int], most: int, size_of_block: int) -> list[int]:
    """Deal blocks out in proportion to `sizes`: `most` in all, fewer where `size_of_block` needs no more, one each at
    least. Depends on nothing else: equal shapes give equal bits on every GPU.
    """
    blocks = min(most, ceil_div(sum(sizes), size_of_block))
    return [max(1, blocks * size // sum(sizes)) for size in sizes]


def set_blocks(levels: Iterable[Any], shares: Sequence[int]) -> None:
    """Write each level's share of a launch's blocks into its struct; they follow one another."""
    for level, first, blocks in zip(levels, accumulate(shares, initial=0), shares, strict=False):
        level.first_block, level.blocks = first, blocks
