"""Metadata of an ONNX file: edgestill's card, and the two keys that YOLOv5's tools read."""

from __future__ import annotations

import onnx

from runtime.card import METADATA_KEY, ModelCard
from runtime.errors import InputError


def metadata_of(card: ModelCard) -> dict[str, str]:
    """`edgestill` is the card as JSON; `names` (a dictionary as text) and `stride` are written as by YOLOv5 v7.0."""
    return {
        METADATA_KEY: card.to_json(),
        "names": str(dict(enumerate(card.names))),
        "stride": str(card.stride),
    }


def read_card(model: onnx.ModelProto, name: str) -> ModelCard:
    """The card inside a model; `name` is the file's, for the error. Raises `InputError` when there is none."""
    props = {entry.key: entry.value for entry in model.metadata_props}
    if METADATA_KEY not in props:
        raise InputError(f"{name} carries no edgestill card", "Give a model.onnx that `edgestill export` wrote")
    return ModelCard.from_json(props[METADATA_KEY], name)


def write_card(model: onnx.ModelProto, card: ModelCard) -> None:
    """Replace the metadata of `model` in place."""
    onnx.helper.set_model_props(model, metadata_of(card))


def opset_of(model: onnx.ModelProto) -> int:
    """Version of ONNX's own operator set that the model uses."""
    return next(entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx"))
