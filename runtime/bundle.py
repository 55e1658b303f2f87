"""From a path to files that may be loaded: the card that describes each one, and its bytes once their hash agrees.

A path is an ONNX file, an engine with `model.json` beside it, or a bundle folder whose `model.json` lists the files in
order of preference. An engine is native code, so it is read only where the card knows its hash.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from runtime.backends import kind_of
from runtime.card import CARD_FILE, METADATA_KEY, Artifact, ModelCard
from runtime.errors import EngineError, InputError, UsageError
from runtime.onnx_file import read_metadata

REBUILD = "Build it again from its ONNX file with `python -m runtime build`"
MAX_PREFIX_BYTES = 1 << 20


class Candidate(NamedTuple):
    """A file that may be loaded. Foreign ONNX files have no `card`; `artifact` holds the hash, where one is known."""

    path: Path
    backend: str
    card: ModelCard | None
    artifact: Artifact | None


def candidates(path: str | Path, variant: str | None = None) -> list[Candidate]:
    """What `path` offers, in order of preference. `variant` picks from a bundle by precision or file name.

    Raises InputError when there is no such file or card, EngineError for an engine without one, UsageError on an
    unknown variant.
    """
    path = Path(path)
    if path.is_dir():
        return _of_bundle(path, variant)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder", "Give an .onnx file, an engine or a bundle folder")
    if variant:
        raise UsageError(f"variant {variant!r} picks from a bundle, {path} is one file", "Leave it out")
    return [_of_onnx(path) if kind_of(path) == "onnx" else _of_engine(path)]


def _of_bundle(folder: Path, variant: str | None) -> list[Candidate]:
    card = ModelCard.load(folder)
    if not card.artifacts:
        raise InputError(f"{folder / CARD_FILE}: lists no artifacts", "Build the bundle again")
    chosen = [item for item in card.artifacts if variant in (None, item.precision, item.file, Path(item.file).stem)]
    if not chosen:
        known = ", ".join(dict.fromkeys(item.precision for item in card.artifacts))
        raise UsageError(f"{folder}: no variant {variant!r}", f"It has {known}")
    return [_listed(folder, card, artifact) for artifact in chosen]


def _listed(folder: Path, card: ModelCard, artifact: Artifact) -> Candidate:
    own = replace(card, precision=artifact.precision)
    return Candidate(folder / artifact.file, artifact.backend, own, artifact)


def _of_onnx(path: Path) -> Candidate:
    """With the card inside the file. Conventional YOLOv5 exports have none: their card is made from the session."""
    return Candidate(path, "onnx", _card_inside(path), None)


def _card_inside(path: Path) -> ModelCard | None:
    text = read_metadata(path).get(METADATA_KEY)
    return ModelCard.from_json(text, str(path)) if text else None


def card_of(path: Path) -> ModelCard:
    """The card inside an ONNX file that edgestill wrote. Raises InputError for any other file."""
    card = _card_inside(path)
    if card is None:
        raise InputError(f"{path} carries no edgestill card", "Give a model.onnx that `edgestill export` wrote")
    return card


def _of_engine(path: Path) -> Candidate:
    refuse_foreign_prefix(path)
    if not (path.parent / CARD_FILE).is_file():
        raise EngineError(f"{path}: no {CARD_FILE} beside it, so nobody vouches for this native code", REBUILD)
    card = ModelCard.load(path.parent)
    artifact = card.artifact(path.name)
    if artifact is None:
        raise EngineError(f"{path}: the {CARD_FILE} beside it does not list it", REBUILD)
    return _listed(path.parent, card, artifact)


def refuse_foreign_prefix(path: Path) -> None:
    """Ultralytics puts a 4-byte length and JSON before the plan; no TensorRT tool reads such a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(4), "little")
        text = file.read(length) if 0 < length <= MAX_PREFIX_BYTES else b""
    if text.startswith(b"{") and _is_json(text):
        raise EngineError(
            f"{path}: starts with {length} bytes of Ultralytics metadata, expected a raw TensorRT plan", REBUILD
        )


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_checked(candidate: Candidate) -> bytes | None:
    """The file's bytes after their hash agreed with the card; None where no hash is known (never for an engine).

    The bytes that were hashed are the bytes that get loaded: the file is read once. Raises InputError when it is
    missing, EngineError when it is not the file that was built.
    """
    path, artifact = candidate.path, candidate.artifact
    if artifact is None:
        return None
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) != artifact.bytes:
        raise EngineError(
            f"{path}: has {len(data)} bytes, its card says {artifact.bytes}: changed or cut short", REBUILD
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != artifact.sha256:
        raise EngineError(
            f"{path}: sha256 is {digest[:16]}…, its card says {artifact.sha256[:16]}…: changed since built", REBUILD
        )
    return data
