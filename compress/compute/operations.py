"""The operations that a computation gives to its device, counted by phase."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_GATHERS = {_aten.index_select, _aten.gather, _aten.index, _aten.embedding}
"""Read as many elements as they write."""
_SCATTERS = {
    _aten.index_add_, _aten.index_add, _aten.scatter_, _aten.scatter_add_, _aten.scatter_reduce_, _aten.index_put_,
}  # fmt: skip
"""Read and write as many elements of the first tensor as the last one has."""
_CREATE = {_aten.new_zeros, _aten.new_ones, _aten.new_full, _aten.zeros_like, _aten.ones_like, _aten.full_like}
"""Read nothing: their tensor only lends its shape or device."""
_ALLOCATE = {_aten.empty, _aten.empty_like, _aten.empty_strided, _aten.new_empty, _aten.new_empty_strided}
_NO_WORK = _ALLOCATE | {_aten.detach, _aten.lift_fresh, _aten._unsafe_view, _aten.alias, _aten.promote_types}
_HOST = {"prim", "profiler"}
"""Namespaces of operations that the host does for itself."""
BACKWARD = " backward"
"""End of the name of a phase's backward pass."""


@dataclass
class Work:
    """The operations of one phase."""

    operations: int = 0
    bytes: int = 0

    def __add__(self, other: Work) -> Work:
        return Work(self.operations + other.operations, self.bytes + other.bytes)


class OperationCount(TorchDispatchMode):
    """Counts ATen operations that work on memory, and the bytes that they read and write, by phase.

    A view or an allocation is none. An operation is what torch dispatches: a device may need several kernels for one.
    Gradients are counted under the phase that computed what they are the gradients of, with ` backward` behind its
    name. Bytes are those of whole tensors, or of the rows that a gather or scatter touches; caches are left out.
    """

    def __init__(self) -> None:
        super().__init__()
        self.work: dict[str, Work] = {}
        self._open = ["other"]
        self._starts, self._names = [0], ["other"]  # autograd numbers its nodes in the order of the forward pass

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count the operations of a `with` block under `name`, but for phases inside of it."""
        self._open.append(name)
        self._mark()
        try:
            yield
        finally:
            self._open.pop()
            self._mark()

    @property
    def total(self) -> Work:
        return sum(self.work.values(), Work())

    def _mark(self) -> None:
        self._starts.append(torch.autograd._get_sequence_nr())
        self._names.append(self._open[-1])

    def _phase(self) -> str:
        """The phase of an operation that runs now."""
        node = torch._C._current_autograd_node()
        if node is None:
            return self._open[-1]
        return self._names[bisect_right(self._starts, node._sequence_nr()) - 1] + BACKWARD

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if not (function.is_view or function.overloadpacket in _NO_WORK or function.namespace in _HOST):
            work = self.work.setdefault(self._phase(), Work())
            work.operations += 1
            work.bytes += moved_bytes(function.overloadpacket, (args, kwargs), result)
        return result


def moved_bytes(operation: Callable[..., Any], arguments: Any, result: Any) -> int:
    """Bytes that an operation reads and writes."""
    read, written = (
        [size_bytes(leaf) for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in (arguments, result)
    )
    if operation in _CREATE:
        read = []
    elif operation in _GATHERS:
        read[0] = min(read[0], sum(written))
    elif operation in _SCATTERS:
        read[0] = written[0] = min(read[0], read[-1])
    return sum(read) + sum(written)


def size_bytes(tensor: Tensor) -> int:
    """Bytes of the tensor's elements; those that are expanded count once."""
    distinct = [size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride]
    return torch.Size(distinct).numel() * tensor.element_size() if tensor.numel() else 0
