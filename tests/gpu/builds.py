"""Compile every kernel that the tests, the sanitizers and the benchmark use, on all cores: `builds.py [ARCHITECTURE]`.

The last line names the kernels, without their dtypes.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from itertools import chain, product
from types import SimpleNamespace

import shapes
import torch
from shim.oracle import LAYOUTS, laid

from compress.kernels import adapter_mse, bench_case
from compress.kernels.device import SUFFIX, Facts
from compress.kernels.losses import SOURCES
from compress.kernels.toolchain import Source
from compress.kernels.warm import architecture_here, warm

SHARED_BYTES = 227 << 10
"""Shared memory of a block on sm_90; a GPU with less compiles builds that it does not use."""


def adapters() -> Iterator[tuple[tuple[int, ...], int]]:
    """A student's map and the teacher's channels, for every adapter."""
    lists = [shapes.SHAPES, shapes.LEVELS, shapes.DETECTOR, shapes.MEDIUM, shapes.EXTREME, shapes.OPCHECK]
    for shape in chain(*lists, *shapes.SANITIZED.values(), bench_case.LEVELS.values()):
        for own in {shape, shapes.even(shape)}:
            yield own, own[1]
    for student, teacher in (*shapes.SELECTIONS, *shapes.UNLIKE):
        yield (1, student, 8, 8), teacher


def sources(architecture: str) -> set[Source]:
    """All builds."""
    facts = facts_of(architecture)
    kinds = {_kind(facts, *adapter, layout) for adapter, layout in product(adapters(), LAYOUTS)}
    return {*SOURCES, *(adapter_mse.source_of(kind) for kind in kinds if kind)}


def facts_of(architecture: str) -> Facts:
    digits = architecture.removeprefix("sm_")
    return Facts((int(digits[:-1]), int(digits[-1])), l2_bytes=50 << 20, shared_bytes=SHARED_BYTES)


def _kind(facts: Facts, shape: tuple[int, ...], teacher: int, layout: str) -> adapter_mse._Kind | None:
    images, _, *sides = shape
    maps = (torch.empty(size, dtype=torch.float16, device="meta") for size in (shape, (images, teacher, *sides)))
    problem = adapter_mse._Problem(*(laid(m, layout) for m in maps), *(torch.empty(0),) * 2, None)
    return adapter_mse._kind(SimpleNamespace(facts=facts), problem)


def families(kernels: Iterable[str]) -> list[str]:
    """The names of kernels without the dtype that they end with."""
    endings = tuple(SUFFIX.values())
    return sorted({name.rsplit("_", 1)[0] if name.endswith(endings) else name for name in kernels})


def main(architecture: str) -> None:
    started, wanted = time.monotonic(), sources(architecture)
    found = families(warm(wanted, architecture))
    print(f"{len(wanted)} builds for {architecture} in {time.monotonic() - started:.1f} s")
    print(*found)


if __name__ == "__main__":
    main(sys.argv[1] if sys.argv[1:] else architecture_here())
