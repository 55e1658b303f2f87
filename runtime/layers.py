"""The layers of an engine as TensorRT built them: their types, the operators that each fuses, and the bytes it moves.

TensorRT-RTX prints them while it builds, without a GPU; TensorRT's EngineInspector gives them as JSON where the engine
can be loaded. Both use the same words. They are kept in a file beside the plan, so that they can be read anywhere.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from pathlib import Path
from typing import Any

from runtime.errors import EngineError, InputError
from runtime.files import read_json, write_json

FP16 = "fp16"
"""The precision with whose plan an INT8 plan is compared."""
SUFFIX = ".layers.json"
"""Follows the whole name of the plan."""
IN_LOG = "Layers:\n"
"""First line of the message with which a builder prints the layers."""
TYPES: Mapping[str, tuple[str, float]] = {
    **dict.fromkeys(("float", "fp32"), ("Float", 4)),
    **dict.fromkeys(("half", "fp16"), ("Half", 2)),
    **dict.fromkeys(("bfloat16", "bf16"), ("BFloat16", 2)),
    **dict.fromkeys(("fp8", "fp8e4m3", "float8"), ("FP8", 1)),
    "int64": ("Int64", 8),
    "int32": ("Int32", 4),
    "int8": ("Int8", 1),
    "uint8": ("UInt8", 1),
    "bool": ("Bool", 1),
    "int4": ("Int4", 0.5),
}
"""Word for a type in lower case -> its name here, and bytes of an element."""
ROW = re.compile(
    r"Name: (?P<name>.*?), LayerType: (?P<kind>[^,]*), Inputs: \[(?P<inputs>|.*?\})\]"
    r"(?:, Constants: \[(?:|.*?\})\])?, Outputs: \[(?P<outputs>|.*?\})\](?P<rest>.*)"
)
TENSOR = re.compile(r"\{ Name: .*?Dimensions: \[(?P<shape>[-\d,]*)\].*?Datatype: (?P<type>[^,}]*)")
OPERATOR = re.compile(r"\[ONNX Layer: ([^\]]*)\]")
CONVOLUTION_KIND, CONVOLUTION_NAME = re.compile("conv|correlation", re.IGNORECASE), re.compile(r"__myl_\w*?(Corr|Fc)")
"""TensorRT-RTX names a kernel by its operations: "Corr" is a convolution, and so is "Fc", a matrix product, but for
those of NMS, which have kernels of their own where a call takes several images."""
NMS_OPERATOR = "nms."
"""Begins the names of the operators of NMS in the files that edgestill exports."""
SYNCHRONISATION = ("signal", "wait")
"""Kinds of rows that compute nothing: one stream waits for another."""


@dataclass(frozen=True)
class TensorType:
    """Type and shape of a tensor; -1 is an open side."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size of its values; those of one image, where the batch is open."""
        return int(prod(max(side, 1) for side in self.shape) * TYPES[self.dtype.lower()][1])

    def __str__(self) -> str:
        return f"{self.dtype} [{','.join(map(str, self.shape))}]"


@dataclass(frozen=True)
class EngineLayer:
    """One kernel of the engine. `operators` are the nodes of the ONNX file that it computes."""

    name: str
    kind: str
    operators: tuple[str, ...]
    inputs: tuple[TensorType, ...]
    outputs: tuple[TensorType, ...]

    @property
    def moved_bytes(self) -> int:
        """Bytes of the activations that it reads and writes."""
        return sum(tensor.bytes for tensor in (*self.inputs, *self.outputs))

    @property
    def is_convolution(self) -> bool:
        if any(operator.startswith(NMS_OPERATOR) for operator in self.operators):
            return False
        return bool(CONVOLUTION_KIND.search(self.kind) or CONVOLUTION_NAME.match(self.name))

    @property
    def types(self) -> str:
        """For example "Half -> Half": types of the first input and output."""
        return " -> ".join(tensors[0].dtype if tensors else "none" for tensors in (self.inputs, self.outputs))

    def to_row(self) -> dict[str, Any]:
        """Texts and numbers for people."""
        return {
            "name": self.name,
            "kind": self.kind,
            "inputs": ", ".join(map(str, self.inputs)),
            "outputs": ", ".join(map(str, self.outputs)),
            "moved_bytes": self.moved_bytes,
            "operators": ", ".join(self.operators),
        }


def moved_bytes(layers: Iterable[EngineLayer]) -> int:
    """Bytes of activations that the engine reads and writes for one call, of one image where its batch is open."""
    return sum(layer.moved_bytes for layer in layers)


def convolution_types(layers: Iterable[EngineLayer]) -> dict[str, int]:
    """Types -> number of convolutions, the most first: {"Half -> Half": 57}."""
    return dict(Counter(layer.types for layer in layers if layer.is_convolution).most_common())


def facts_of(layers: Sequence[EngineLayer]) -> dict[str, Any]:
    """Sums over the layers, and their rows, as plain values; empty where they are not known."""
    if not layers:
        return {}
    return {
        "convolutions": convolution_types(layers),
        "moved_bytes": moved_bytes(layers),
        "layers": [layer.to_row() for layer in layers],
    }


def moves_more(layers: Sequence[EngineLayer], fp16: Sequence[EngineLayer]) -> str:
    """Why an INT8 engine is no gain over the FP16 engine of the same model; empty where it moves fewer bytes.

    Also where the layers of either are not known, or no convolution reads INT8.
    """
    if not fp16 or not any(layer.is_convolution and layer.types.startswith("Int8") for layer in layers):
        return ""
    own, other = moved_bytes(layers), moved_bytes(fp16)
    return "" if own < other else f"its INT8 moves {own / 1e6:.1f} MB a call, FP16 moves {other / 1e6:.1f}"


def layers_in_log(text: str) -> tuple[EngineLayer, ...]:
    """From the builder's message. Raises EngineError when a line of it is not understood."""
    return _computing(_from_line(line) for line in text.splitlines() if line.startswith("Name: "))


def layers_in_json(text: str) -> tuple[EngineLayer, ...]:
    """From EngineInspector's JSON. Raises EngineError when it has names only, or is not understood."""
    try:
        return _computing(
            EngineLayer(
                layer["Name"],
                layer["LayerType"],
                _operators(layer.get("Metadata", "")),
                *(tuple(_tensor_of(tensor) for tensor in layer[key]) for key in ("Inputs", "Outputs")),
            )
            for layer in json.loads(text)["Layers"]
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineError(f"EngineInspector's layers are not understood: {error!r}") from error


def _computing(layers: Iterable[EngineLayer]) -> tuple[EngineLayer, ...]:
    return tuple(layer for layer in layers if layer.kind not in SYNCHRONISATION)


def _from_line(line: str) -> EngineLayer:
    found = ROW.fullmatch(line)
    if found is None:
        raise EngineError(f"a layer is not understood: {line[:200]}")
    inputs, outputs = (
        tuple(_tensor(tensor["type"], tensor["shape"].split(",")) for tensor in TENSOR.finditer(found[key]))
        for key in ("inputs", "outputs")
    )
    return EngineLayer(found["name"], found["kind"], _operators(found["rest"]), inputs, outputs)


def _tensor_of(entry: Mapping[str, Any]) -> TensorType:
    return _tensor(entry.get("Datatype") or entry["Format/Datatype"], entry["Dimensions"])


def _tensor(type_text: str, shape: Iterable[Any]) -> TensorType:
    """`type_text` is a type, or a sentence with one: "Channel major FP16 format where channel % 8 == 0"."""
    known = [TYPES[word][0] for word in re.findall(r"\w+", type_text.lower()) if word in TYPES]
    if not known:
        raise EngineError(f"a tensor's type is not understood: {type_text[:60]!r}")
    return TensorType(known[0], tuple(int(side) for side in shape if side != ""))


def _operators(metadata: str) -> tuple[str, ...]:
    return tuple(dict.fromkeys(OPERATOR.findall(metadata)))


def layers_file(plan: Path) -> Path:
    return plan.with_name(plan.name + SUFFIX)


def save_layers(plan: Path, digest: str, layers: Sequence[EngineLayer]) -> None:
    """Write the layers of the plan with this sha256 into the file beside it."""
    write_json(layers_file(plan), {"sha256": digest, "layers": [asdict(layer) for layer in layers]})


def read_layers(plan: Path, digest: str) -> tuple[EngineLayer, ...]:
    """The layers of the plan with this sha256; empty where the file beside it is absent or of another build.

    Raises InputError when the file is damaged.
    """
    file = layers_file(plan)
    if not file.is_file():
        return ()
    document = read_json(file, "Build the engine again")
    try:
        return tuple(map(layer_of, document["layers"])) if document["sha256"] == digest else ()
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{file}: not a list of layers: {error!r}", "Build the engine again") from error


def layer_of(values: Mapping[str, Any]) -> EngineLayer:
    """The layer that `asdict` made plain. Raises KeyError or TypeError when a value is missing or of another kind."""
    inputs, outputs = (
        tuple(TensorType(TYPES[tensor["dtype"].lower()][0], tuple(map(int, tensor["shape"]))) for tensor in values[key])
        for key in ("inputs", "outputs")
    )
    return EngineLayer(str(values["name"]), str(values["kind"]), tuple(map(str, values["operators"])), inputs, outputs)
