"""The identity of a model: one digest of its weights and of every setting that changes its detections.

`edgestill export` computes it, the card inside an ONNX file holds it, flavours and plans inherit it, and whoever puts
files together or writes into a folder compares it. The precision is no part of it: FP32 and its flavours are one model.
`conf` is no part of it, since every call may choose one, nor are `batches`, since each image has the same detections.
Files that edgestill did not export, or exported before models had an identity, have "": they run, but are never taken
for the same model as another file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError

if TYPE_CHECKING:
    from runtime.card import ModelCard

ROWS_SETTINGS = ("names", "size_hw", "stride", "iou", "max_det")
"""Settings that both files of an export have in common: boxes, and rows whose NMS is the host's."""
SETTINGS = (*ROWS_SETTINGS, "input", "output", "frame_hw", "candidates", "nms_iterations")
IN_A_FOLDER = ("batches",)
"""Settings in which the files of one folder agree too, as the files of several batches would have the same names."""
SHOWN = 12
"""Digits of an identity that are shown to people."""


class OccupiedError(InputError):
    """A folder that is to be written into holds another model."""


def weights_digest(structure: Any, tensors: Mapping[str, NDArray[Any]]) -> str:
    """Hex sha256 of a network: its structure as JSON values, and name, type, shape and values of every tensor."""
    whole = hashlib.sha256(json.dumps(structure, sort_keys=True).encode())
    for name, values in sorted(tensors.items()):
        whole.update(f"\0{name} {values.dtype.str} {list(values.shape)}\0".encode())
        whole.update(np.ascontiguousarray(values).tobytes())
    return whole.hexdigest()


def identity_of(card: ModelCard) -> str:
    """Hex sha256 of the card's weights and settings; empty if the weights are not known."""
    if not card.weights:
        return ""
    values = {"weights": card.weights, **{key: getattr(card, key) for key in SETTINGS}, "iou": float(card.iou)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def require_same(
    found: tuple[ModelCard, str | Path],
    expected: tuple[ModelCard, str | Path],
    hint: str,
    *,
    settings: Sequence[str] = SETTINGS,
    error: type[InputError] = InputError,
) -> None:
    """Raises `error` when two cards, each with the name of its file, are not of one model in these settings."""
    (card, name), (other, other_name) = found, expected
    for unknown, of in ((card, name), (other, other_name)):
        if not unknown.weights:
            raise error(
                f"{of} has no identity, so it cannot be told which model it is", "Export it again into another folder"
            )
    if differing := difference(card, other, settings):
        raise error(f"{name} is another model than {other_name}: {differing}", hint)


def difference(card: ModelCard, other: ModelCard, settings: Sequence[str] = SETTINGS) -> str:
    """In which of these settings `card` differs from `other`, and whether its weights do; empty when in none."""
    changed = {key: (getattr(card, key), getattr(other, key)) for key in settings}
    parts = ["other weights"] if card.weights != other.weights else []
    parts += [_part(key, *values) for key, values in changed.items() if values[0] != values[1]]
    return ", ".join(parts)


def _part(key: str, value: Any, other: Any) -> str:
    return "other class names" if key == "names" else f"{key} {_text(value)} instead of {_text(other)}"


def _text(value: Any) -> str:
    return "x".join(map(str, value)) if type(value) is tuple else "none" if value is None else f"{value}"
