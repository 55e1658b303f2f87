"""From a path to the model files that may be loaded: the card of each one, and its bytes once their hash agrees.

A path is a portable file (ONNX), an engine with `model.json` beside it, or a bundle folder whose `model.json` lists the
files in order of preference. An engine is native code, so it is read only where the card knows its hash.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from runtime.backends import BACKENDS, BackendSpec, backend_of
from runtime.card import CARD_FILE, METADATA_KEY, Artifact, FileDigest, ModelCard
from runtime.errors import EngineError, InputError, UsageError
from runtime.identity import IN_A_FOLDER, SETTINGS, SHOWN, OccupiedError, difference, require_same

MAX_PREFIX_BYTES = 1 << 20


class ModelFile(NamedTuple):
    """A file that may be loaded. A foreign file has no `card`; `artifact` holds the hash, where one is known."""

    path: Path
    spec: BackendSpec
    card: ModelCard | None
    artifact: Artifact | None

    @property
    def devices(self) -> tuple[str, ...]:
        """The devices of its backend that the file is made for, the best first; empty where it suits any."""
        return tuple(device for device in self.card.devices if device in self.spec.devices) if self.card else ()


def model_files(path: str | Path, variant: str | None = None, backend: str = "auto") -> list[ModelFile]:
    """The model files at `path`, in order of preference. `variant` picks from a bundle by precision or file name.

    A `backend` that is named gets all that it can read, those files first that are listed for it. Raises InputError
    when there is no such file or card, EngineError when an engine has no card, UsageError when the variant is unknown
    or the backend reads none.
    """
    files = _model_files(Path(path), variant)
    return files if backend == "auto" else _read_by(BACKENDS[backend], files)


def _read_by(spec: BackendSpec, files: Sequence[ModelFile]) -> list[ModelFile]:
    own = [file for file in files if file.spec is spec]
    portable = [file for file in files if file.spec is not spec and file.spec.portable]
    others = [file for file in portable if file.path.suffix.lower() in spec.suffixes]
    if not own + others:
        raise UsageError(
            f"{files[0].path}: a file for {files[0].spec.name}, backend is {spec.name}",
            f"It reads {', '.join(spec.suffixes)}",
        )
    return [file._replace(spec=spec) for file in (*own, *others)]


def _model_files(path: Path, variant: str | None) -> list[ModelFile]:
    if path.is_dir():
        return _bundle_files(path, variant)
    if not path.is_file():
        raise InputError(f"{path}: no such file or folder", "Give an .onnx file, an engine or a bundle folder")
    if variant:
        raise UsageError(f"variant {variant!r} picks from a bundle, {path} is one file", "Leave it out")
    spec = backend_of(path)
    return [_lone_file(path, spec) if spec.portable else _engine_file(path, spec)]


def _lone_file(path: Path, first: BackendSpec) -> ModelFile:
    """With the backend that the file is made for, else the `first` that reads its suffix."""
    card = card_inside(path, first)
    own = BACKENDS[card.backend] if card and card.backend else first
    return ModelFile(path, own if path.suffix.lower() in own.suffixes else first, card, None)


def listed_files(path: Path) -> list[ModelFile]:
    """Every file that the card of a bundle, or beside an engine, lists; empty where no card lists `path`."""
    if path.is_dir():
        return model_files(path)
    (file,) = model_files(path)
    return model_files(path.parent) if file.artifact else []


def _bundle_files(folder: Path, variant: str | None) -> list[ModelFile]:
    card = ModelCard.load(folder)
    if not card.artifacts:
        raise InputError(f"{folder / CARD_FILE}: lists no artifacts", "Build the bundle again")
    chosen = [item for item in card.artifacts if variant in (None, item.precision, item.file, Path(item.file).stem)]
    if not chosen:
        known = ", ".join(dict.fromkeys(item.precision for item in card.artifacts))
        raise UsageError(f"{folder}: no variant {variant!r}", f"It has {known}")
    return [_listed_file(folder, card, artifact) for artifact in chosen]


def _listed_file(folder: Path, card: ModelCard, artifact: Artifact) -> ModelFile:
    own = replace(card, precision=artifact.precision, batches=artifact.batches, devices=artifact.devices)
    return ModelFile(folder / artifact.file, BACKENDS[artifact.backend], own, artifact)


def _engine_file(path: Path, spec: BackendSpec) -> ModelFile:
    refuse_foreign_prefix(path)
    if not (path.parent / CARD_FILE).is_file():
        raise EngineError(f"{path}: no {CARD_FILE} beside it, so its native code cannot be checked", spec.remedy)
    card = ModelCard.load(path.parent)
    artifact = card.artifact(path.name)
    if artifact is None:
        raise EngineError(f"{path}: the {CARD_FILE} beside it does not list it", spec.remedy)
    return _listed_file(path.parent, card, artifact)


def metadata_of(path: Path, spec: BackendSpec | None = None) -> dict[str, str]:
    """The text that a file of this backend carries; empty for a kind of file that carries none."""
    read = (spec or backend_of(path)).metadata.get(path.suffix.lower())
    return read(path) if read else {}


def card_inside(path: Path, spec: BackendSpec | None = None) -> ModelCard | None:
    """The card that edgestill wrote into the file. YOLOv5's own exports have none."""
    text = metadata_of(path, spec).get(METADATA_KEY)
    return ModelCard.from_json(text, str(path)) if text else None


def card_of(path: Path) -> ModelCard:
    """The card inside an ONNX file that edgestill wrote. Raises InputError when there is none."""
    card = card_inside(path)
    if card is None:
        raise InputError(f"{path} carries no edgestill card", "Give a model.onnx that `edgestill export` wrote")
    return card


def folder_card(folder: Path, model: Path) -> ModelCard:
    """The card that will list files made of the ONNX file `model` in `folder`: the one there, else the model's own.

    Raises InputError when `model` carries no card, OccupiedError when the card there is of another model.
    """
    own, beside = card_of(model), folder / CARD_FILE
    if not beside.is_file():
        return replace(own, artifacts=(), backend="", devices=())
    card = ModelCard.load(beside)
    hint, common = "Choose another folder with --out", (*SETTINGS, *IN_A_FOLDER)
    require_same((own, model), (card, beside), hint, settings=common, error=OccupiedError)
    return card


def card_with(
    folder: Path, model: Path, made: Sequence[Artifact], order: Callable[[Artifact], Any] | None = None
) -> ModelCard:
    """The card of `folder` with files made of the ONNX file `model` before those that it lists; it is not written.

    It is read again, as another build may have added to it meanwhile. `order` sorts the whole list.
    """
    card, names = folder_card(folder, model), {artifact.file for artifact in made}
    listed = (*made, *(artifact for artifact in card.artifacts if artifact.file not in names))
    return replace(card, artifacts=tuple(sorted(listed, key=order)) if order else listed)


def refuse_foreign_prefix(path: Path) -> None:
    """Ultralytics puts a 4-byte length and JSON before the plan; no TensorRT tool reads such a file."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(4), "little")
        text = file.read(length) if 0 < length <= MAX_PREFIX_BYTES else b""
    if text.startswith(b"{") and _is_json(text):
        raise EngineError(
            f"{path}: starts with {length} bytes of Ultralytics metadata, expected a raw TensorRT plan",
            backend_of(path).remedy,
        )


def _is_json(text: bytes) -> bool:
    try:
        return isinstance(json.loads(text), dict)
    except (ValueError, RecursionError):
        return False


def read_checked(file: ModelFile) -> dict[str, bytes]:
    """Bytes of the file and of its parts by name, after their hashes agreed with the card; empty where none is known.

    The bytes that were hashed are the bytes that get loaded: each file is read once. Raises InputError when one is
    missing, EngineError when one is not the file that was built, or is of another model than the card.
    """
    contents = {
        item.file: _read_checked(file.path.parent / item.file, item, file.spec.remedy) for item in _digests(file)
    }
    _refuse_another_model(file)
    return contents


def problems(file: ModelFile) -> list[str]:
    """The files of a listed model that are missing or are not as the card says, a line for each; empty when all are."""
    found: list[str] = []
    for digest in _digests(file):
        try:
            _read_checked(file.path.parent / digest.file, digest, file.spec.remedy)
        except (EngineError, InputError) as error:
            found.append(str(error))
    try:
        if not found:
            _refuse_another_model(file)
    except (EngineError, InputError) as error:
        found.append(str(error))
    return found


def _refuse_another_model(file: ModelFile) -> None:
    """Raises EngineError when a listed file says of itself that it is of another model than its card."""
    if file.artifact is None or file.card is None:
        return
    inside = card_inside(file.path, file.spec)
    if inside is not None and inside.identity not in ("", file.card.identity):
        raise EngineError(
            f"{file.path}: is another model than its card says: {difference(inside, file.card)}", file.spec.remedy
        )
    if file.artifact.identity not in ("", file.card.identity):
        raise EngineError(
            f"{file.path}: was made of model {file.artifact.identity[:SHOWN]}, its card is of "
            f"{file.card.identity[:SHOWN] or 'an unknown one'}",
            file.spec.remedy,
        )


def _digests(file: ModelFile) -> tuple[FileDigest, ...]:
    return (file.artifact, *file.artifact.parts) if file.artifact else ()


def _read_checked(path: Path, expected: FileDigest, remedy: str) -> bytes:
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}", remedy) from error
    if len(data) != expected.bytes:
        raise EngineError(
            f"{path}: has {len(data)} bytes, its card says {expected.bytes}: changed or cut short", remedy
        )
    digest = hashlib.sha256(data).hexdigest()
    if digest != expected.sha256:
        raise EngineError(
            f"{path}: sha256 is {digest[:16]}…, its card says {expected.sha256[:16]}…: changed since built", remedy
        )
    return data
