"""What a file holds, told without running anything in it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from runtime.bundle import candidates
from runtime.card import METADATA_KEY, ModelCard
from runtime.errors import InputError
from runtime.files import sha256

Facts = dict[str, Any]


def inspect_file(path: Path) -> Facts:
    """Facts of a checkpoint, an ONNX file, a TensorRT plan, a model card or a bundle. Raises InputError for others,
    EngineError for a plan that no card vouches for.
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


def _checkpoint(path: Path) -> Facts:
    from compress.models.checkpoint import describe

    return describe(path)


def _onnx(path: Path) -> Facts:
    from compress.graph.parts import op_counts
    from compress.graph.safe_load import read_model

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


def _plan(path: Path) -> Facts:
    """A plan is native code: only its sidecar is read."""
    _, _, card, artifact = candidates(path)[0]
    assert card is not None
    assert artifact is not None
    return {
        "format": "TensorRT plan",
        "intact": sha256(path) == artifact.sha256,
        "precision": artifact.precision,
        "targets": list(artifact.targets),
        "versions": dict(artifact.versions),
        "card": {key: value for key, value in card.to_dict().items() if key != "artifacts"},
    }


def _bundle(path: Path) -> Facts:
    return {"format": "model card", "card": ModelCard.load(path).to_dict()}


READERS: Mapping[str, Callable[[Path], Facts]] = {
    ".pt": _checkpoint,
    ".pth": _checkpoint,
    ".safetensors": _checkpoint,
    ".onnx": _onnx,
    ".plan": _plan,
    ".engine": _plan,
    ".trt": _plan,
    ".json": _bundle,
    "folder": _bundle,
}


def as_text(facts: Mapping[str, Any], indent: str = "") -> str:
    """Nested facts as indented `key: value` lines."""
    lines = []
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}{key}:", as_text(value, indent + "  ")]
        elif isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
            lines += [f"{indent}{key}:", *(as_text(entry, indent + "  ") + "\n" for entry in value)]
        else:
            lines.append(f"{indent}{key}: {value}")
    return "\n".join(line.rstrip("\n") for line in lines)
