"""The model card: all that a user of a model file must know, as JSON beside engines or inside an ONNX file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from runtime.backends import BACKENDS, DEVICES
from runtime.errors import InputError
from runtime.files import write_json
from runtime.identity import SHOWN, identity_of

SCHEMA_VERSION = 1
CARD_FILE = "model.json"
METADATA_KEY = "edgestill"
"""Key of the card's JSON in an ONNX file's metadata."""
MAX_CARD_BYTES = 4 << 20

Input = Literal["canvas", "frame", "tensor"]
INPUT_NAMES = {"canvas": "canvas", "frame": "frame", "tensor": "images"}
"""Name of the graph's input in the files that edgestill exports."""
Output = Literal["boxes", "rows"]


class Batches(NamedTuple):
    """Least and most images of one call of a file; `most` is None where it takes any number."""

    least: int = 1
    most: int | None = 1

    def __str__(self) -> str:
        return str(self.least) if self.least == self.most else f"{self.least} to {self.most or 'any'}"


ONE_IMAGE = Batches()
USUAL_BATCHES = (1, 4, 8)
"""Smallest, usual and largest batch of the plan of a file with an open batch."""


@dataclass(frozen=True)
class FileDigest:
    """A file of a bundle by its name, with the hash and size of its content. Raises InputError on a wrong value."""

    file: str
    sha256: str
    bytes: int

    def __post_init__(self) -> None:
        named = self.file not in ("", "..") and Path(self.file).name == self.file
        _require(named, "artifacts.file", self.file, "a file name, no folder")
        _require(_is_digest(self.sha256), "artifacts.sha256", self.sha256, "64 lower-case hex digits")
        _require(self.bytes >= 0, "artifacts.bytes", self.bytes, "0 or more")


@dataclass(frozen=True)
class Artifact(FileDigest):
    """A model file of a bundle. `backend` is a name of the table of backends, `targets` are the GPUs it was built for
    ("sm86"), `versions` those of the libraries that built it, `parts` further files that it cannot be loaded without,
    `identity` that of the model it was made from, where it is known, `batches` the images that one call takes,
    `devices` those that it is made for, empty for any.
    """

    precision: str
    backend: str
    targets: tuple[str, ...] = ()
    versions: Mapping[str, str] = field(default_factory=dict)
    parts: tuple[FileDigest, ...] = ()
    identity: str = ""
    batches: Batches = ONE_IMAGE
    devices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.backend in BACKENDS, "artifacts.backend", self.backend, tuple(BACKENDS))
        _require_batches("artifacts.batches", self.batches)
        _require_devices("artifacts.devices", self.devices)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, without the `DEFAULTS` that older readers do not know."""
        return _plain(_without_defaults(asdict(self)))


@dataclass(frozen=True)
class ModelCard:
    """The model's input, output, defaults and origin.

    `input`: "canvas" is uint8 BGR [B, H, W, 3] of `size_hw` that the host letterboxes; "frame" is uint8 BGR
    [B, H, W, 3] of `frame_hw`, letterboxed inside the graph; "tensor" is float RGB NCHW in 0..1 (YOLOv5's convention).
    `output`: "boxes" is float32 [B, K, 6] x1 y1 x2 y2 score class in canvas pixels (frame pixels for "frame"),
    rows with score 0 are empty, and `cutoff` [B], the score up to which boxes may be missing; "rows" is float32
    [B, N, 5 + C], and the host does the NMS. B is within `batches`. `weights` is the digest of the network, empty where
    it is not known. `backend` and `devices` are those that the file is made for, as it is slower or wrong in others;
    empty for any. `artifacts` are in order of preference. Raises InputError when a value is of the wrong kind.
    """

    name: str
    names: tuple[str, ...]
    size_hw: tuple[int, int]
    stride: int = 32
    input: Input = "canvas"
    output: Output = "boxes"
    conf: float = 0.25
    iou: float = 0.6
    max_det: int = 300
    candidates: int = 0
    nms_iterations: int = 0
    frame_hw: tuple[int, int] | None = None
    batches: Batches = ONE_IMAGE
    precision: str = "fp32"
    backend: str = ""
    devices: tuple[str, ...] = ()
    weights: str = ""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    artifacts: tuple[Artifact, ...] = ()

    def __post_init__(self) -> None:
        _require(len(self.names) > 0, "names", self.names, "one class or more")
        _require(len(self.size_hw) == 2 and min(self.size_hw) > 0, "size_hw", self.size_hw, "two positive sizes")
        _require(self.stride > 0, "stride", self.stride, "a positive number")
        _require(self.input in get_args(Input), "input", self.input, get_args(Input))
        _require(self.output in get_args(Output), "output", self.output, get_args(Output))
        _require(0 <= self.conf <= 1, "conf", self.conf, "0..1")
        _require(0 <= self.iou <= 1, "iou", self.iou, "0..1")
        _require(self.max_det > 0, "max_det", self.max_det, "1 or more")
        known = self.weights == "" or _is_digest(self.weights)
        _require(known, "weights", self.weights, "64 lower-case hex digits")
        sized = self.frame_hw is not None and len(self.frame_hw) == 2 and min(self.frame_hw) > 0
        _require(sized or self.input != "frame", "frame_hw", self.frame_hw, 'two positive sizes for input "frame"')
        _require_batches("batches", self.batches)
        _require(self.backend in ("", *BACKENDS), "backend", self.backend, tuple(BACKENDS))
        _require_devices("devices", self.devices)

    @property
    def input_name(self) -> str:
        return INPUT_NAMES[self.input]

    @property
    def input_shape(self) -> tuple[int | None, ...]:
        """Shape of the input; the first side is None where the batch is open."""
        return (self.batches.least if self.batches.least == self.batches.most else None, *self.image_shape)

    @property
    def image_shape(self) -> tuple[int, ...]:
        """Shape of one image of the input."""
        shapes: dict[str, tuple[int, ...]] = {
            "canvas": (*self.size_hw, 3),
            "frame": (*(self.frame_hw or ()), 3),
            "tensor": (3, *self.size_hw),
        }
        return shapes[self.input]

    @property
    def identity(self) -> str:
        """Digest of weights and settings, equal for all precisions of a model; empty where it is not known."""
        return identity_of(self)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values, `schema_version` first, without the `DEFAULTS` that older readers do not know."""
        values = {"schema_version": SCHEMA_VERSION, "identity": self.identity, **asdict(self)}
        values["artifacts"] = [artifact.to_dict() for artifact in self.artifacts]
        return _plain(_without_defaults(values))

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)

    @classmethod
    def from_dict(cls, data: object, source: str = "model card") -> ModelCard:
        """Raises InputError, which starts with `source`, when a value is unknown, missing or wrong."""
        try:
            values = _checked(data, cls, extra=("schema_version", "identity"))
            identity = values.pop("identity", "")
            version = values.pop("schema_version", None)
            _require(
                version == SCHEMA_VERSION, "schema_version", version, f"{SCHEMA_VERSION}, which this edgestill reads"
            )
            values["artifacts"] = tuple(_artifact(item) for item in values.get("artifacts", ()))
            card = cls(**values)
            _require_identity(card, identity)
            return card
        except InputError as error:
            raise InputError(f"{source}: {error.message}", error.hint) from error

    @classmethod
    def from_json(cls, text: str | bytes, source: str = "model card") -> ModelCard:
        try:
            data = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise InputError(f"{source}: not JSON: {error}") from error
        return cls.from_dict(data, source)

    def save(self, path: str | Path) -> None:
        write_json(path, self.to_dict())

    @classmethod
    def load(cls, path: str | Path) -> ModelCard:
        """From `model.json` or the folder it lies in."""
        path = Path(path)
        path = path / CARD_FILE if path.is_dir() else path
        try:
            with path.open("rb") as file:
                text = file.read(MAX_CARD_BYTES + 1)
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}", "Every engine and bundle has it") from error
        if len(text) > MAX_CARD_BYTES:
            raise InputError(f"{path}: larger than {MAX_CARD_BYTES} bytes, so not a model card")
        return cls.from_json(text, str(path))

    def artifact(self, file: str) -> Artifact | None:
        """The entry of that file, or None."""
        return next((artifact for artifact in self.artifacts if artifact.file == file), None)


DEFAULTS: Mapping[str, object] = {
    "identity": "",
    "weights": "",
    "parts": (),
    "batches": ONE_IMAGE,
    "backend": "",
    "devices": (),
}
"""Values of the keys that the first cards had not: written only where they differ, as older readers refuse the keys."""


def _without_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key not in DEFAULTS or value != DEFAULTS[key]}


def _require(condition: bool, key: str, value: object, expected: object) -> None:
    if not condition:
        raise InputError(f"{key} is {value!r}, expected {expected}")


def _require_batches(key: str, batches: Batches) -> None:
    least, most = batches
    _require(1 <= least <= (least if most is None else most), key, list(batches), "[least, most], most null if any")


def _require_devices(key: str, devices: tuple[str, ...]) -> None:
    _require(set(devices) <= set(DEVICES[1:]), key, list(devices), f"some of {', '.join(DEVICES[1:])}")


def _require_identity(card: ModelCard, written: str) -> None:
    """Settings that were edited by hand do not change the graph, so the card would no longer describe it."""
    if written and written != card.identity:
        raise InputError(
            f"identity is {written[:SHOWN]}, but weights and settings make {card.identity[:SHOWN] or 'none'}",
            "The card was changed by hand: export again with the settings that you want",
        )


def _is_digest(text: str) -> bool:
    return len(text) == 64 and set(text) <= set("0123456789abcdef")


def _artifact(data: object) -> Artifact:
    values = _checked(data, Artifact)
    values["parts"] = tuple(FileDigest(**_checked(item, FileDigest)) for item in values.get("parts", ()))
    return Artifact(**values)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _strings(value: object) -> tuple[str, ...]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(item, str) for item in value):
        raise TypeError
    return tuple(value)


def _sizes(value: object) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return tuple(_whole(item) for item in value)


def _batches(value: object) -> Batches:
    least, most = value if isinstance(value, (list, tuple)) and len(value) == 2 else (None, None)
    return Batches(_whole(least), None if most is None else _whole(most))


def _whole(value: object) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError
    return value


def _number(value: object) -> float:
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise TypeError
    return float(value)


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise TypeError
    return value


def _mapping(value: object) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise TypeError
    return value


def _items(value: object) -> list[Any]:
    if not isinstance(value, (list, tuple)):
        raise TypeError
    return list(value)


READERS_BY_KIND = {
    "text": (_text, ("name", "input", "output", "precision", "file", "sha256", "backend", "weights", "identity")),
    "a list of texts": (_strings, ("names", "targets", "devices")),
    "a list of whole numbers": (_sizes, ("size_hw", "frame_hw")),
    "a whole number, and another one or null": (_batches, ("batches",)),
    "a whole number": (_whole, ("stride", "max_det", "candidates", "nms_iterations", "bytes", "schema_version")),
    "a number": (_number, ("conf", "iou")),
    "an object": (_mapping, ("provenance", "versions")),
    "a list": (_items, ("artifacts", "parts")),
}
READERS = {key: (kind, reader) for kind, (reader, keys) in READERS_BY_KIND.items() for key in keys}


def _checked(data: object, owner: type[Any], extra: tuple[str, ...] = ()) -> dict[str, Any]:
    """The values of a JSON object, each in the kind that `owner` has for that key."""
    if not isinstance(data, dict):
        raise InputError(f"is {type(data).__name__}, expected an object")
    known = {item.name: item for item in fields(owner)}
    unknown = sorted(set(data) - set(known) - set(extra))
    if unknown:
        raise InputError(f"unknown key {unknown[0]!r}", f"Known are {', '.join(sorted(known))}")
    required = set(REQUIRED[owner])
    if absent := sorted(required - set(data)):
        raise InputError(f"{absent[0]} is missing")
    return {key: _read(key, value) for key, value in data.items()}


REQUIRED = {
    ModelCard: ("schema_version", "name", "names", "size_hw", "stride", "input", "output"),
    Artifact: ("file", "sha256", "bytes", "precision", "backend"),
    FileDigest: ("file", "sha256", "bytes"),
}


def _read(key: str, value: object) -> Any:
    if key == "frame_hw" and value is None:
        return None
    kind, reader = READERS[key]
    try:
        return reader(value)
    except TypeError:
        raise InputError(f"{key} is {value!r}, expected {kind}") from None
