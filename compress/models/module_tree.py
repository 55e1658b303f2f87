"""Read the network inside a checkpoint's module tree, and refuse one that differs in anything its output depends on.

In: the tree of `Stub`s. Out: an `Architecture` and the tensors by their state-dict names. The file's network is never
run: edgestill builds its own from the layer table and compares it with the file's, module by module.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from compress.config import SCALES
from compress.models.activations import ACTIVATIONS
from compress.models.architecture import LAYOUTS, MAX_CLASSES, Architecture
from compress.models.blocks import BatchNorm2d, Block
from compress.models.network import YOLOv5, network_on_meta_device
from compress.models.pickle_reader import PickleError, Stub, TensorRef, attributes, brief
from runtime.errors import UsageError

MAX_MODULES = 20_000
MAX_DEPTH = 32
MAX_NAME = 64
COUNTERS = ("total_ops", "total_params")
"""Buffers that a FLOP counter left in some old files."""
REBUILT = ("anchor_grid",)
"""Buffers of releases up to 5.0 that follow from `anchors`: the anchors in pixels."""
READABLE = "detection models of YOLOv5 2.0 to 7.0 can be read (the P6 ones from 6.0 on)"

COMPARED: dict[type[nn.Module], tuple[str, ...]] = {
    nn.Conv2d: ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    BatchNorm2d: ("eps",),
    nn.MaxPool2d: ("kernel_size", "stride", "padding"),
    nn.LeakyReLU: ("negative_slope",),
}
"""Attributes that the output depends on and that no tensor shows; `Block.compared` has those of the blocks."""


class SavedNetwork(NamedTuple):
    """A network as a file holds it."""

    architecture: Architecture
    tensors: Mapping[str, TensorRef]


def read_network(root: Stub, read: Callable[[TensorRef], Tensor]) -> SavedNetwork:
    """The network of a module tree; `read` fetches a tensor from the file.

    Raises PickleError naming the first thing that is not as in a YOLOv5 detection model.
    """
    if root.type.module.startswith("ultralytics"):
        raise PickleError(f"it is a network of the ultralytics package, whose heads have no anchors; {READABLE}")
    modules = dict(named_modules(root))
    layers = _layers(modules)
    layout = _layout(layers)
    tensors = {key: ref for key, ref in named_tensors(modules) if key.split(".")[-1] not in (*COUNTERS, *REBUILT)}
    common = {
        "names": _names(root, modules),
        "anchors": _anchors_px(tensors, layout, read),
        "layout": layout,
        "activation": _activation(modules),
    }
    architecture = _fitting(_multiples(root), common, tensors)
    _compare(modules, network_on_meta_device(architecture))
    return SavedNetwork(architecture, tensors)


def named_modules(root: Stub) -> Iterator[tuple[str, Stub]]:
    """The modules depth first, in torch's order. Raises PickleError when they are nested too deep or too many."""
    yield from _walk(root, "", 0, [MAX_MODULES])


def _walk(module: Stub, name: str, depth: int, budget: list[int]) -> Iterator[tuple[str, Stub]]:
    budget[0] -= 1
    if depth > MAX_DEPTH or budget[0] < 0:
        raise PickleError(f"its modules are nested deeper than {MAX_DEPTH} or are more than {MAX_MODULES}")
    yield name, module
    for child, sub in _children(module, "_modules").items():
        if isinstance(sub, Stub):
            yield from _walk(sub, f"{name}.{child}" if name else child, depth + 1, budget)


def _children(module: Stub, kind: str) -> Mapping[str, Any]:
    found = attributes(module).get(kind)
    table = found if isinstance(found, dict) else {}
    for name in table:
        if not isinstance(name, str) or len(name) > MAX_NAME:
            raise PickleError(f"a module has a part named {brief(name)}")
    return table


def named_tensors(modules: Mapping[str, Stub]) -> Iterator[tuple[str, TensorRef]]:
    """Parameters, then persistent buffers, of each module in turn: the order of torch's state dict."""
    for name, module in modules.items():
        hidden = attributes(module).get("_non_persistent_buffers_set")
        hidden = hidden if isinstance(hidden, (set, list)) else ()
        tensors = dict(_children(module, "_parameters"))
        tensors.update((key, ref) for key, ref in _children(module, "_buffers").items() if key not in hidden)
        for key, ref in tensors.items():
            if isinstance(ref, TensorRef):
                yield f"{name}.{key}", ref


class _LayerInFile(NamedTuple):
    block: str
    source: tuple[int, ...]


def _layers(modules: Mapping[str, Stub]) -> list[_LayerInFile]:
    sequence = modules.get("model")
    listed = _children(sequence, "_modules") if sequence else {}
    if not listed:
        raise PickleError(f"it holds no YOLOv5 network; {READABLE}")
    return [_LayerInFile(layer.type.name, _source(layer)) for layer in listed.values() if isinstance(layer, Stub)]


def _source(layer: Stub) -> tuple[int, ...]:
    source = layer.state.get("f", -1)
    return tuple(source) if isinstance(source, (list, tuple)) else (source,)


def _layout(layers: Sequence[_LayerInFile]) -> str:
    """The layout with these layers. Raises PickleError that names the first layer unlike that of the closest layout."""
    tables = {name: [_LayerInFile(row.block, row.source) for row in table.layers] for name, table in LAYOUTS.items()}
    for name, table in tables.items():
        if table == list(layers):
            return name
    nearest = max(tables.values(), key=lambda table: _common(layers, table))
    index = _common(layers, nearest)
    found, expected = (_described(rows, index) for rows in (layers, nearest))
    raise PickleError(f"its layer {index} is {found} instead of {expected}; {READABLE}")


def _common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Length of the common beginning."""
    pairs = zip(one, other, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))


def _described(rows: Sequence[_LayerInFile], index: int) -> str:
    if index >= len(rows):
        return "nothing"
    block, source = rows[index]
    return f"{brief(block)} from {brief(list(source))}"


def _anchors_px(tensors: Mapping[str, TensorRef], layout: str, read: Callable[[TensorRef], Tensor]) -> Any:
    """Files hold anchors in units of their level's stride."""
    table = LAYOUTS[layout]
    ref = tensors.get(f"model.{len(table.layers) - 1}.anchors")
    if ref is None or len(ref.shape) != 3 or ref.shape[0] != len(table.strides):
        raise PickleError(f"its anchors are not those of {len(table.strides)} levels; {READABLE}")
    return read(ref).double() * torch.tensor(table.strides).view(-1, 1, 1)


def _names(root: Stub, modules: Mapping[str, Stub]) -> tuple[str, ...]:
    """Class names: a list up to 6.2, a table from 7.0 on; numbered if the file has none.

    YAML made numbers and booleans of names such as 0, 1.5 and no; they become text again.
    """
    names = root.state.get("names")
    if isinstance(names, dict):
        names = [names.get(index) for index in range(len(names))]
    if isinstance(names, list) and names and all(isinstance(name, str | int | float) for name in names):
        return tuple(map(str, names))
    nc = attributes(modules.get(f"model.{_last(modules)}")).get("nc")
    if names or type(nc) is not int or not 0 < nc <= MAX_CLASSES:
        raise PickleError("its class names are no list of texts")
    return tuple(f"class{index}" for index in range(nc))


def _last(modules: Mapping[str, Stub]) -> int:
    return len(_children(modules["model"], "_modules")) - 1


def _activation(modules: Mapping[str, Stub]) -> str:
    """The stem's activation; that all others are the same is compared later."""
    kind = next((module.type.name for name, module in modules.items() if name.endswith(".act")), "nothing")
    if kind not in ACTIVATIONS:
        raise PickleError(f"its activation is {brief(kind)}; {', '.join(ACTIVATIONS)} can be read")
    return kind


def _multiples(root: Stub) -> list[tuple[Any, Any]]:
    """Depth and width multiples to try: those that the file states, else every scale's."""
    table = root.state.get("yaml", root.state.get("md"))
    stated = (table.get("depth_multiple"), table.get("width_multiple")) if isinstance(table, dict) else (None, None)
    return [stated, *SCALES.values()] if None not in stated else [*SCALES.values()]


def _fitting(
    multiples: Sequence[tuple[Any, Any]], common: Mapping[str, Any], tensors: Mapping[str, TensorRef]
) -> Architecture:
    """The first architecture with exactly these tensors. Shapes tell the scale; file names can be wrong."""
    problems = []
    shapes = {key: ref.shape for key, ref in tensors.items()}
    for depth, width in multiples:
        try:
            architecture = Architecture(depth=depth, width=width, **common)
        except UsageError as error:
            problems.append(str(error))
            continue
        problem = mismatch(shapes, architecture)
        if problem is None:
            return architecture
        problems.append(problem)
    raise PickleError(f"{problems[0]}; {READABLE}")


def mismatch(shapes: Mapping[str, Sequence[int]], architecture: Architecture) -> str | None:
    """The first difference between tensors of these names and shapes and those of the architecture; None without."""
    expected = {key: tuple(value.shape) for key, value in network_on_meta_device(architecture).state_dict().items()}
    for key, shape in expected.items():
        if key not in shapes:
            return f"tensor {key} is missing"
        if tuple(shapes[key]) != shape:
            return f"tensor {key} has shape {tuple(shapes[key])} instead of {shape}"
    extra = next((key for key in shapes if key not in expected), None)
    return f"tensor {brief(extra)} is not part of the network" if extra is not None else None


def _compare(modules: Mapping[str, Stub], network: YOLOv5) -> None:
    for name, module in network.named_modules():
        stub = modules.get(name)
        kind = type(module).__name__
        if not name or stub is None:
            continue
        if stub.type.name != kind:
            raise PickleError(f"its module {name} is {brief(stub.type.name)} instead of {kind}; {READABLE}")
        for attribute in module.compared if isinstance(module, Block) else COMPARED.get(type(module), ()):
            found, expected = stub.state.get(attribute), getattr(module, attribute)
            if attribute in stub.state and _pair(found) != _pair(expected):
                raise PickleError(f"its module {name} has {attribute} {brief(found)} instead of {expected}; {READABLE}")


def _pair(value: Any) -> Any:
    """Sizes may be given once for both directions."""
    return (value, value) if isinstance(value, (int, float)) else value
