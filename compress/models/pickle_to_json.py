"""Turn the values of a pickle into plain JSON: options, dates, NumPy numbers, paths."""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from compress.models.pickle_reader import Global, Stub, TensorRef

MAX_VALUES = 50_000
"""Most values of one document: shared references can make a small file expand without limit."""
MAX_ELEMENTS = 1000
MAX_DEPTH = 32
MAX_TEXT = 10_000

Read = Callable[[TensorRef], Tensor]
NUMBERS = {"f4": "f", "f8": "d", "i4": "i", "i8": "q", "u1": "B", "b1": "?"}
"""NumPy's type codes -> those of `struct`."""


def to_json(value: Any, read: Read) -> Any:
    """`value` as JSON holds it; what JSON does not know becomes text, what is too large is left out (null).

    `read` fetches a tensor of the file.
    """
    return _convert(value, read, [MAX_VALUES], 0)


def _convert(value: Any, read: Read, budget: list[int], depth: int) -> Any:
    budget[0] -= 1
    if budget[0] < 0 or depth > MAX_DEPTH:
        return None
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    if isinstance(value, str):
        return value[:MAX_TEXT]
    if value is None or isinstance(value, (bool, int)):
        return value
    if isinstance(value, Mapping):
        return {str(key)[:MAX_TEXT]: _convert(item, read, budget, depth + 1) for key, item in value.items()}
    if isinstance(value, TensorRef):
        return _tensor(value, read)
    if isinstance(value, Stub):
        return _object(value, read, budget, depth + 1)
    if isinstance(value, Global):
        return str(value)
    if isinstance(value, (list, tuple, set)):
        return [_convert(item, read, budget, depth + 1) for item in value]
    return repr(value)[:80]


def _tensor(ref: TensorRef, read: Read) -> Any:
    return read(ref).tolist() if math.prod(ref.shape) <= MAX_ELEMENTS else None


def _object(stub: Stub, read: Read, budget: list[int], depth: int) -> Any:
    if stub.type.module.startswith("pathlib"):
        return "/".join(part.rstrip("/\\") for part in stub.args[:MAX_DEPTH] if isinstance(part, str))[:MAX_TEXT]
    if stub.type.name == "scalar" and len(stub.args) == 2:
        return _first(_numbers(*stub.args))
    if stub.type.name == "_reconstruct" and isinstance(stub.raw_state, tuple) and len(stub.raw_state) == 5:
        return _numbers(stub.raw_state[2], stub.raw_state[4])
    if stub.type.name == "Namespace":
        return _convert(stub.state, read, budget, depth)
    return str(stub.type)


def _numbers(dtype: Any, raw: Any) -> list[Any] | None:
    """Numbers of a little-endian NumPy array, flat; None for other kinds."""
    code = dtype.args[0] if isinstance(dtype, Stub) and dtype.args else None
    layout = NUMBERS.get(code) if isinstance(code, str) else None
    if layout is None or not isinstance(raw, bytes) or len(raw) % struct.calcsize(layout):
        return None
    values = [item[0] for item in struct.iter_unpack(f"<{layout}", raw[: MAX_ELEMENTS * struct.calcsize(layout)])]
    return [value if math.isfinite(value) else str(value) for value in values]


def _first(values: list[Any] | None) -> Any:
    return values[0] if values else None
