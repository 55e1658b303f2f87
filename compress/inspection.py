"""Describe a model file without running anything in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.backends import SUFFIXES
from runtime.bundle import model_files
from runtime.card import METADATA_KEY, ModelCard
from runtime.errors import InputError
from runtime.files import sha256
from runtime.layers import facts_of, read_layers

Description = dict[str, Any]


def inspect_file(path: Path) -> Description:
    """The contents of a checkpoint, an ONNX file, a TensorRT plan, a model card or a bundle.

    Raises InputError when it is another file or there is none, EngineError when no card lists a plan.
    """
    if not path.exists():
        raise InputError(f"{path}: no such file")
    kind = "folder" if path.is_dir() else path.suffix.lower()
    if kind not in READERS:
        raise InputError(
            f"{path}: cannot tell what {kind or 'a file without suffix'} is", f"Known: {', '.join(READERS)}"
        )
    common = {} if path.is_dir() else {"bytes": path.stat().st_size, "sha256": sha256(path)}
    return {"file": str(path), **common, **READERS[kind](path)}


def _checkpoint(path: Path) -> Description:
    from compress.models.checkpoint import describe

    return describe(path)


def _onnx(path: Path) -> Description:
    from compress.graph.parts import op_counts
    from compress.graph.untrusted_onnx import read_model

    model = read_model(path)
    graph = model.graph
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    card = metadata.pop(METADATA_KEY, None)
    return {
        "format": "ONNX",
        "opset": {entry.domain or "ai.onnx": entry.version for entry in model.opset_import},
        "inputs": {value.name: _shape(value) for value in graph.input},
        "outputs": {value.name: _shape(value) for value in graph.output},
        "parameters": sum(math.prod(tensor.dims) for tensor in graph.initializer),
        "operators": dict(op_counts(graph).most_common()),
        "card": ModelCard.from_json(card, str(path)).to_dict() if card else None,
        "metadata": metadata,
    }


def _shape(value: Any) -> str:
    from onnx import TensorProto

    tensor = value.type.tensor_type
    sides = [side.dim_param or str(side.dim_value) for side in tensor.shape.dim]
    return f"{TensorProto.DataType.Name(tensor.elem_type).lower()} [{', '.join(sides)}]"


def _engine(path: Path) -> Description:
    """Description from the card alone, because an engine is native code."""
    file = model_files(path)[0]
    digest = sha256(path)
    known: Description = {"format": f"file for {file.spec.name}"}
    if file.artifact is not None:
        known |= {
            "intact": digest == file.artifact.sha256,
            "precision": file.artifact.precision,
            "targets": list(file.artifact.targets),
            "versions": dict(file.artifact.versions),
        }
    card = file.card.to_dict() if file.card else {}
    known["card"] = {key: value for key, value in card.items() if key != "artifacts"}
    return known | facts_of(read_layers(path, digest))


def _bundle(path: Path) -> Description:
    return {"format": "model card", "card": ModelCard.load(path).to_dict()}


READERS: Mapping[str, Callable[[Path], Description]] = {
    ".pt": _checkpoint,
    ".pth": _checkpoint,
    ".safetensors": _checkpoint,
    **dict.fromkeys(SUFFIXES, _engine),
    ".onnx": _onnx,
    ".json": _bundle,
    "folder": _bundle,
}


def _entry(entry: Mapping[str, Any], indent: str) -> str:
    """An entry of a list: in one line, if it is flat."""
    if any(isinstance(value, (Mapping, list, tuple)) for value in entry.values()):
        return as_text(entry, indent)
    return indent + "; ".join(f"{key}: {value}" for key, value in entry.items())


def as_text(description: Mapping[str, Any], indent: str = "") -> str:
    """A nested description as indented `key: value` lines; a flat entry of a list is one line."""
    lines = []
    for key, value in description.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", as_text(value, indent + "  ")]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}:", *(_entry(entry, indent + "  ") for entry in value)]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(lines)
