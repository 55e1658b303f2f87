"""Read a pickle as data: a stack machine of 43 opcodes that imports and calls nothing that the file names.

In: the bytes of a pickle. Out: plain values, `Stub` for every object, `TensorRef` for every tensor. A name that no
YOLOv5 checkpoint uses is refused, and so is everything that costs more than its size in bytes (see the limits).
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

MAX_OPCODES = 3_000_000
"""The largest official checkpoint has 90,000, with its optimiser 300,000; each costs at most some 250 bytes."""
MAX_LONG_BYTES = 64
MAX_DIMENSIONS = 16
MAX_BRIEF = 80

SCALARS = (str, int, float, bool, bytes, type(None))
"""Types that may be a key: their hash costs no more than their bytes (that of nested tuples can cost 2^depth)."""


class PickleError(ValueError):
    """The bytes are no pickle of this subset, or name what no checkpoint needs. One line."""


def brief(value: Any) -> str:
    """A short, printable line for a value from a file; of nested values only the type (their text could be endless)."""
    flat = isinstance(value, (list, tuple)) and len(value) <= MAX_DIMENSIONS and all(type(v) is int for v in value)
    if not flat and not isinstance(value, SCALARS):
        return f"a {type(value).__name__}"
    text = (value if isinstance(value, str) else str(value))[:200].encode("unicode_escape").decode()
    return text if len(text) <= MAX_BRIEF else f"{text[: MAX_BRIEF - 3]}..."


class Global(NamedTuple):
    """A name in the file. It is never imported."""

    module: str
    name: str

    def __str__(self) -> str:
        return f"{self.module}.{self.name}"


@dataclass(eq=False)
class Stub:
    """An object in the file: its class by name, what it would have been made of, and its attributes."""

    type: Global
    args: tuple[Any, ...] = ()
    state: dict[str, Any] = field(default_factory=dict)
    raw_state: Any = None
    """A state that is no table of attributes (NumPy arrays)."""


class StorageRef(NamedTuple):
    """A flat array of numbers that is stored outside the pickle."""

    key: str
    dtype: str
    elements: int


class TensorRef(NamedTuple):
    """A view of a storage: every element is inside the storage, and there are no more of them than the storage has."""

    storage: StorageRef
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    @property
    def span(self) -> tuple[int, int]:
        """First element in the storage, and the first behind the last; of a tensor that has elements."""
        reach = sum((side - 1) * step for side, step in zip(self.shape, self.stride, strict=True))
        return self.offset, self.offset + reach + 1


STORAGE_DTYPES: dict[str, str] = {
    "HalfStorage": "float16",
    "BFloat16Storage": "bfloat16",
    "FloatStorage": "float32",
    "DoubleStorage": "float64",
    "ByteStorage": "uint8",
    "CharStorage": "int8",
    "ShortStorage": "int16",
    "IntStorage": "int32",
    "LongStorage": "int64",
    "BoolStorage": "bool",
}

_BUILTINS = ("builtins", "__builtin__")
_NUMPY_CORE = ("numpy.core.multiarray", "numpy._core.multiarray")
_INERT = {
    *(Global("torch", name) for name in (*STORAGE_DTYPES, *STORAGE_DTYPES.values(), "float", "half", "long", "device")),
    *(Global(module, name) for module in _NUMPY_CORE for name in ("_reconstruct", "scalar")),
    *(Global("numpy", name) for name in ("dtype", "ndarray", "float32", "float64", "int64")),
    *(
        Global(module, name)
        for module in ("pathlib", "pathlib._local")  # the second since Python 3.13
        for name in ("PosixPath", "WindowsPath", "PurePosixPath", "PureWindowsPath", "Path")
    ),
    Global("argparse", "Namespace"),
}
_INERT_MODULES = ("torch.nn.modules.", "models.", "utils.", "ultralytics.")
"""Classes of these become stubs whatever their name; YOLOv5's own folders are `models` and `utils`."""


def _set(items: Sequence[Any] = ()) -> set[Any]:
    return {_key(item) for item in items}


def _mapping(items: Any = ()) -> dict[Any, Any]:
    pairs = items.items() if isinstance(items, dict) else items
    return {_key(key): value for key, value in pairs}


def _encode(text: str, encoding: str = "") -> bytes:
    """Protocol 2 writes bytes as text in latin1."""
    if encoding != "latin1":
        raise PickleError(f"bytes in encoding {encoding!r}")
    return text.encode("latin1")


def _tensor(storage: Any, offset: Any, shape: Any, stride: Any, *_: Any) -> TensorRef:
    """A tensor whose shape and strides are checked: wrong ones could read outside the storage, or fill memory."""
    if not isinstance(storage, StorageRef) or not isinstance(shape, tuple) or not isinstance(stride, tuple):
        raise PickleError("a tensor without storage or shape")
    numbers = (offset, *shape, *stride)
    whole = all(type(number) is int and 0 <= number < 1 << 62 for number in numbers)
    if not whole or len(shape) != len(stride) or len(shape) > MAX_DIMENSIONS:
        raise PickleError(f"a tensor of shape {brief(shape)} and strides {brief(stride)}")
    made = TensorRef(storage, offset, shape, stride)
    count = math.prod(shape)
    if count and (made.span[1] > storage.elements or count > storage.elements):
        raise PickleError(
            f"a tensor of shape {brief(shape)}, strides {brief(stride)} and offset {offset} "
            f"reaches beyond its storage of {storage.elements} elements"
        )
    return made


def _first(value: Any, *_: Any) -> Any:
    return value


CALLS: dict[Global, Callable[..., Any]] = {
    Global("collections", "OrderedDict"): _mapping,
    Global("torch", "Size"): tuple,
    Global("torch._utils", "_rebuild_tensor_v2"): _tensor,
    Global("torch._utils", "_rebuild_parameter"): _first,
    Global("torch._utils", "_rebuild_parameter_with_state"): _first,
    Global("_codecs", "encode"): _encode,
    **{Global(module, "set"): _set for module in _BUILTINS},
    **{Global(module, "frozenset"): _set for module in _BUILTINS},
    **{Global(module, "list"): list for module in _BUILTINS},
    **{Global(module, "tuple"): tuple for module in _BUILTINS},
    **{Global(module, "dict"): _mapping for module in _BUILTINS},
}
"""The only names that have a meaning, and the functions of this module that give it."""


def find_name(module: str, name: str) -> Global:
    """The name, if a YOLOv5 checkpoint may hold it. Raises PickleError otherwise, before anything is done with it."""
    found = Global(module, name)
    known = found in CALLS or found in _INERT or module.startswith(_INERT_MODULES)
    if not known:
        raise PickleError(f"it names {brief(str(found))}, which no YOLOv5 checkpoint does: it may be an attack")
    return found


def _key(value: Any) -> Any:
    if not isinstance(value, SCALARS):
        raise PickleError(f"a key of type {type(value).__name__}")
    return value


class _Machine:
    """The stack machine; `data` is anything whose slices are bytes."""

    def __init__(self, data: Any, start: int) -> None:
        self.data, self.at = data, start
        self.stack: list[Any] = []
        self.below: list[list[Any]] = []
        self.memo: dict[int, Any] = {}
        self.storages: dict[str, StorageRef] = {}

    def run(self) -> Any:
        for _ in range(MAX_OPCODES):
            opcode = self.take(1)
            if opcode == b".":
                return self.stack.pop()
            action = OPCODES.get(opcode)
            if action is None:
                raise PickleError(f"opcode 0x{opcode.hex()} at byte {self.at - 1}")
            action(self)
        raise PickleError(f"it has more than {MAX_OPCODES} opcodes")

    def take(self, count: int) -> bytes:
        taken = self.data[self.at : self.at + count]
        if len(taken) != count:
            raise PickleError("it ends in the middle")
        self.at += count
        return taken

    def unpack(self, layout: str) -> Any:
        return struct.unpack(f"<{layout}", self.take(struct.calcsize(layout)))[0]

    def line(self) -> str:
        end = self.data.find(b"\n", self.at, self.at + 512)
        if end < 0:
            raise PickleError("a name without an end")
        text = self.take(end - self.at).decode()
        self.at += 1
        return text

    def pop_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.below.pop()
        return items

    def push(self, value: Any) -> None:
        self.stack.append(value)


def _call(machine: _Machine) -> None:
    """REDUCE and NEWOBJ, which are the same here: a name with arguments."""
    args, name = machine.stack.pop(), machine.stack.pop()
    if not isinstance(name, Global) or not isinstance(args, tuple):
        raise PickleError(f"a call of {type(name).__name__}")
    machine.push(CALLS[name](*args) if name in CALLS else Stub(name, args))


def _build(machine: _Machine) -> None:
    """Set the attributes of a stub; those of an OrderedDict (torch's `_metadata`) are not needed."""
    state = machine.stack.pop()
    target = machine.stack[-1]
    if isinstance(target, Stub):
        for part in state if isinstance(state, tuple) and len(state) == 2 else (state,):
            if isinstance(part, dict):
                target.state.update(part)
            elif part is not None:
                target.raw_state = state
    elif not isinstance(target, dict):
        raise PickleError(f"attributes for a {type(target).__name__}")


def _set_items(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not dict:
        raise PickleError(f"items for a {type(target).__name__}")
    target.update((_key(key), value) for key, value in zip(items[::2], items[1::2], strict=True))


def _append(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not list:
        raise PickleError(f"elements for a {type(target).__name__}")
    target.extend(items)


def _add(machine: _Machine, items: Sequence[Any]) -> None:
    target = machine.stack[-1]
    if type(target) is not set:
        raise PickleError(f"members for a {type(target).__name__}")
    target.update(map(_key, items))


def _persistent(machine: _Machine) -> None:
    """Storages by reference; classes whose source is in the file (legacy format) by name."""
    given = machine.stack.pop()
    kind = given[0] if isinstance(given, tuple) and given else None
    if kind == "module" and isinstance(given[1], Global):
        machine.push(given[1])
        return
    if kind != "storage" or not isinstance(given[1], Global):
        raise PickleError(f"a reference to {brief(kind)}")
    dtype, key, count = STORAGE_DTYPES.get(given[1].name), given[2], given[4]
    if dtype is None or not isinstance(key, str) or type(count) is not int or not 0 <= count < 1 << 48:
        raise PickleError(f"a storage {brief(key)} of {brief(count)} {brief(given[1].name)}")
    storage = StorageRef(key, dtype, count)
    if machine.storages.setdefault(storage.key, storage) != storage:
        raise PickleError(f"storage {brief(storage.key)} twice, with different types or sizes")
    machine.push(storage)


def _long(machine: _Machine, size: int) -> None:
    if not 0 <= size <= MAX_LONG_BYTES:
        raise PickleError(f"an integer of {size} bytes")
    machine.push(int.from_bytes(machine.take(size), "little", signed=True))


def _constant(value: Any) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(value)


def _fresh(make: Callable[[], Any]) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(make())


def _number(layout: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.unpack(layout))


def _text(size: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.unpack(size)).decode("utf-8", "surrogatepass"))


def _bytes(size: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.take(machine.unpack(size)))


def _tuple_of(count: int) -> Callable[[_Machine], None]:
    def make(machine: _Machine) -> None:
        if len(machine.stack) < count:
            raise PickleError("a tuple of more than there is")
        machine.stack[-count:] = [tuple(machine.stack[-count:])]

    return make


def _put(index: str) -> Callable[[_Machine], None]:
    def put(machine: _Machine) -> None:
        machine.memo[machine.unpack(index)] = machine.stack[-1]

    return put


def _get(index: str) -> Callable[[_Machine], None]:
    return lambda machine: machine.push(machine.memo[machine.unpack(index)])


def _memoize(machine: _Machine) -> None:
    machine.memo[len(machine.memo)] = machine.stack[-1]


def _mark(machine: _Machine) -> None:
    machine.below.append(machine.stack)
    machine.stack = []


def _global(machine: _Machine) -> None:
    module = machine.line()
    machine.push(find_name(module, machine.line()))


def _stack_global(machine: _Machine) -> None:
    name, module = machine.stack.pop(), machine.stack.pop()
    machine.push(find_name(str(module), str(name)))


def _protocol(machine: _Machine) -> None:
    version = machine.unpack("B")
    if not 2 <= version <= 5:
        raise PickleError(f"protocol {version}")


def _closed(machine: _Machine, make: Callable[[Any], Any]) -> None:
    items = machine.pop_mark()
    machine.push(make(items))


OPCODES: dict[bytes, Callable[[_Machine], None]] = {
    b"\x80": _protocol,
    b"\x95": lambda machine: machine.unpack("Q"),  # a frame: only a hint for readers of streams
    b"(": _mark,
    b"N": _constant(None),
    b"\x88": _constant(True),
    b"\x89": _constant(False),
    b")": _constant(()),
    b"]": _fresh(list),
    b"}": _fresh(dict),
    b"\x8f": _fresh(set),
    b"J": _number("i"),
    b"K": _number("B"),
    b"M": _number("H"),
    b"G": lambda machine: machine.push(struct.unpack(">d", machine.take(8))[0]),
    b"\x8a": lambda machine: _long(machine, machine.unpack("B")),
    b"\x8b": lambda machine: _long(machine, machine.unpack("i")),
    b"X": _text("I"),
    b"\x8c": _text("B"),
    b"B": _bytes("I"),
    b"C": _bytes("B"),
    b"\x85": _tuple_of(1),
    b"\x86": _tuple_of(2),
    b"\x87": _tuple_of(3),
    b"t": lambda machine: _closed(machine, tuple),
    b"l": lambda machine: _closed(machine, list),
    b"a": lambda machine: _append(machine, [machine.stack.pop()]),
    b"e": lambda machine: _append(machine, machine.pop_mark()),
    b"s": lambda machine: _set_items(machine, [machine.stack.pop(), machine.stack.pop()][::-1]),
    b"u": lambda machine: _set_items(machine, machine.pop_mark()),
    b"\x90": lambda machine: _add(machine, machine.pop_mark()),
    b"q": _put("B"),
    b"r": _put("I"),
    b"\x94": _memoize,
    b"h": _get("B"),
    b"j": _get("I"),
    b"c": _global,
    b"\x93": _stack_global,
    b"R": _call,
    b"\x81": _call,
    b"b": _build,
    b"Q": _persistent,
}
"""Binary opcodes of protocols 2 to 4, less those that no checkpoint uses (extensions, text forms, old instances)."""


_DAMAGE = (IndexError, KeyError, TypeError, ValueError, AttributeError, OverflowError, struct.error)


class Pickle(NamedTuple):
    """The content of a pickle."""

    value: Any
    end: int
    """The first byte after it."""
    storages: Mapping[str, StorageRef]


def read_pickle(data: Any, start: int = 0) -> Pickle:
    """The pickle at `start` in `data` (bytes or mmap). Raises PickleError for anything that no checkpoint holds."""
    machine = _Machine(data, start)
    try:
        return Pickle(machine.run(), machine.at, machine.storages)
    except PickleError:
        raise
    except _DAMAGE as error:
        raise PickleError(f"it is damaged at byte {machine.at} ({type(error).__name__})") from error


def attributes(value: Any) -> Mapping[str, Any]:
    """Attributes of a stub; none for anything else."""
    return value.state if isinstance(value, Stub) else {}
