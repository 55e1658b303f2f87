"""Read YOLOv5 checkpoints (.pt) and our own models (.safetensors); write the latter.

Both become a `Checkpoint`: an architecture, float32 tensors that fit it, and plain metadata. A file's kind is found
by its bytes, not by its name. Nothing in a file is executed.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from compress.models.architecture import LAYOUTS, Architecture
from compress.models.complexity import complexity
from compress.models.module_tree import mismatch, read_network
from compress.models.network import YOLOv5, network_on_meta_device
from compress.models.pickle_reader import PickleError, Stub, brief
from compress.models.pickle_to_json import to_json
from compress.models.torch_file import is_torch_file, open_torch_file
from runtime.errors import InputError, one_line
from runtime.files import atomic_write
from runtime.identity import weights_digest

HEADER_KEY = "edgestill"
SCHEMA_VERSION = 1
MAX_HEADER_BYTES = 100_000_000
"""The limit of safetensors itself."""
FORMATS = {
    "zip": "YOLOv5 checkpoint (torch zip)",
    "legacy": "YOLOv5 checkpoint (torch before 1.6)",
    "safetensors": "edgestill model (safetensors)",
}
FAKE_SCALES = "log_scales"
"""Tensor of a network that rounds as its INT8 file does; its other tensors are those of folded BatchNorms."""
GIVE = "Give a YOLOv5 checkpoint (.pt) or a model that edgestill wrote (.safetensors)"


@dataclass(frozen=True)
class Checkpoint:
    """A network with its weights, in memory."""

    architecture: Architecture
    state_dict: dict[str, Tensor]
    """Exactly the tensors of the architecture, floats as float32, on the CPU, in torch's order."""
    meta: dict[str, Any]
    """Plain JSON: for our files, the `meta` of `save_model`; for YOLOv5's, date, epoch, options and the like."""
    format: str
    """A key of `FORMATS`."""

    @property
    def imgsz(self) -> int | None:
        """Pixels of the images that it was trained with; None where the file does not say it."""
        options = self.meta.get("opt")
        given = self.meta.get("imgsz", options.get("imgsz") if isinstance(options, dict) else None)
        return given if type(given) is int and given > 0 else None


def load(path: str | Path) -> Checkpoint:
    """Read a checkpoint. Raises InputError (one line) when the file is not a sound detection checkpoint."""
    path = Path(path)
    head = _head(path)
    if is_torch_file(head):
        return _load_torch(path)
    if _is_safetensors(head):
        return _load_safetensors(path)
    raise InputError(f"{path} {_what_instead(head)}", GIVE)


def load_model(path: str | Path) -> YOLOv5:
    """The network in a file: see `network_of`. Raises the errors of `load`."""
    return network_of(load(path))


def network_of(checkpoint: Checkpoint) -> YOLOv5:
    """The network of a checkpoint: float32, on the CPU, in evaluation mode. Draws no random numbers."""
    with torch.device("meta"):
        model = YOLOv5(checkpoint.architecture)
    model.load_state_dict(checkpoint.state_dict, assign=True)
    return model.eval()


def save_model(model: YOLOv5, path: str | Path, meta: Mapping[str, Any] | None = None) -> None:
    """Publish the weights with their architecture and `meta` (anything that JSON holds) as .safetensors.

    Equal weights and metadata make equal bytes. Raises EdgestillError when the file cannot be written.
    """
    header = {"schema_version": SCHEMA_VERSION, "architecture": model.arch.to_json(), "meta": dict(meta or {})}
    tensors = {key: value.detach().cpu().contiguous() for key, value in model.state_dict().items()}
    # one key only: safetensors writes several in an order that changes from run to run
    metadata = {HEADER_KEY: json.dumps(header, ensure_ascii=False, allow_nan=False, sort_keys=True)}
    with atomic_write(path) as temporary:
        temporary.write_bytes(save(tensors, metadata))  # safetensors' own writer reports a full disk as another error


def network_digest(architecture: Architecture, state_dict: Mapping[str, Tensor]) -> str:
    """Hex sha256 of the network, equal for all files that hold it: names, counters and metadata are left out."""
    structure = {key: value for key, value in architecture.to_json().items() if key != "names"}
    tensors = {key: value.cpu().numpy() for key, value in state_dict.items() if value.is_floating_point()}
    return weights_digest(structure, tensors)


@torch.no_grad()
def transfer(state_dict: Mapping[str, Tensor], model: YOLOv5) -> tuple[list[str], list[str]]:
    """Copy into `model` every tensor whose name and shape agree; anchors stay, they belong to the architecture.

    Returns two lists of the model's tensor names: copied, and left as they were.
    """
    copied, left = [], []
    for key, own in model.state_dict().items():
        if key.endswith(".anchors"):
            continue
        given = state_dict.get(key)
        if given is not None and given.shape == own.shape:
            own.copy_(given)
            copied.append(key)
        else:
            left.append(key)
    return copied, left


def describe(path: str | Path, imgsz: int = 640) -> dict[str, Any]:
    """Everything worth knowing about a .pt or .safetensors file, as JSON; costs are for `imgsz` squared pixels.

    `scale` is the name of the depth and width that the tensors have, whatever the file is called. Raises InputError
    when `load` refuses the file.
    """
    checkpoint = load(path)
    architecture = checkpoint.architecture
    cost = complexity(architecture, (imgsz, imgsz))
    return {
        "format": FORMATS[checkpoint.format],
        "scale": architecture.scale,
        "depth": architecture.depth,
        "width": architecture.width,
        "layout": architecture.layout,
        "releases": LAYOUTS[architecture.layout].releases,
        "activation": architecture.activation,
        "classes": architecture.nc,
        "names": list(architecture.names),
        "strides": list(architecture.strides),
        "anchors_px": [[list(wh) for wh in level] for level in architecture.anchors],
        "weights": network_digest(architecture, checkpoint.state_dict),
        "tensors": len(checkpoint.state_dict),
        "parameters": cost.parameters,
        "fused_parameters": cost.fused_parameters,
        "imgsz": imgsz,
        "macs": cost.macs,
        "gflops": round(2 * cost.macs / 1e9, 3),
        "meta": checkpoint.meta,
    }


def _head(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}", "Check the path") from error
    if not head:
        raise InputError(f"{path} is empty", "Fetch or copy the file again")
    return head


def _is_safetensors(head: bytes) -> bool:
    """An 8-byte header length, then JSON."""
    return len(head) > 8 and int.from_bytes(head[:8], "little") <= MAX_HEADER_BYTES and head[8:9] == b"{"


def _what_instead(head: bytes) -> str:
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head")):
        return "is a web page, not a checkpoint: its download failed"
    if text.startswith(b"version https://git-lfs"):
        return "is a Git LFS pointer, not the file itself: run `git lfs pull`"
    if b"onnx" in head[:64] or b"pytorch" in head[:64]:
        return "is an ONNX graph, not a checkpoint"
    if head[:1] == b"\x80":
        return "is a pickle outside of torch.save's containers"
    return f"is no checkpoint (it begins with {head[:8].hex(' ')})"


def _load_torch(path: Path) -> Checkpoint:
    with open_torch_file(path) as file:
        network = _network(file.root)
        saved = read_network(network, file.tensor)
        state = {key: file.tensor(ref) for key, ref in saved.tensors.items()}
        meta = _meta(file.root, network, file.tensor)
    return Checkpoint(saved.architecture, _sound(path, state, saved.architecture), meta, file.container)


def _network(root: Any) -> Stub:
    """The averaged model if there is one (it is what YOLOv5 validates and ships), else the model."""
    if isinstance(root, Stub):
        return root
    found = [root.get(key) for key in ("ema", "model")] if isinstance(root, dict) else []
    network = next((value for value in found if isinstance(value, Stub)), None)
    if network is None:
        raise PickleError("it holds no network under `ema` or `model`: tensors alone do not tell classes and anchors")
    return network


def _sound(path: Path, state: Mapping[str, Tensor], architecture: Architecture) -> dict[str, Tensor]:
    """The tensors in torch's order, floats as float32. Raises InputError when a type is wrong or a value not finite."""
    made = {}
    for key, expected in network_on_meta_device(architecture).state_dict().items():
        tensor = state[key]
        if tensor.is_floating_point() != expected.is_floating_point():
            raise InputError(f"{path}: tensor {key} is {tensor.dtype} instead of {expected.dtype}", GIVE)
        made[key] = tensor.to(expected.dtype)
        if not torch.isfinite(made[key]).all():
            raise InputError(
                f"{path}: tensor {key} holds values that are not finite", "The training diverged: take an earlier file"
            )
    return made


_KEPT = ("epoch", "best_fitness", "updates", "date", "wandb_id", "opt", "git")


def _meta(root: Any, network: Stub, read: Any) -> dict[str, Any]:
    table = root if isinstance(root, dict) else {}
    meta = {key: to_json(table[key], read) for key in _KEPT if table.get(key) is not None}
    meta["stripped"] = table.get("optimizer") is None and table.get("ema") is None
    meta["hyp"] = to_json(network.state.get("hyp"), read)
    meta["class"] = str(network.type)
    return meta


def _load_safetensors(path: Path) -> Checkpoint:
    try:
        with safe_open(path, "pt") as file:
            architecture, meta = _header(path, (file.metadata() or {}).get(HEADER_KEY))
            shapes = {key: file.get_slice(key).get_shape() for key in file.keys()}  # noqa: SIM118 - no mapping
            if FAKE_SCALES in shapes:
                raise InputError(
                    f"{path} holds the weights and scales of an INT8 file, not a float network",
                    "Give the student that this training began with",
                )
            problem = mismatch(shapes, architecture)
            if problem:
                raise InputError(f"{path} contradicts its header: {problem}", "Write the file anew")
            state = {key: file.get_tensor(key) for key in shapes}
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} is damaged: {one_line(error)}", "Fetch or copy the file again") from error
    return Checkpoint(architecture, _sound(path, state, architecture), meta, "safetensors")


def _header(path: Path, text: str | None) -> tuple[Architecture, dict[str, Any]]:
    """Architecture and metadata of our header."""
    if text is None:
        raise InputError(f"{path} has no `{HEADER_KEY}` header: its tensors do not tell the network", GIVE)
    try:
        header = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} has a damaged header: {one_line(error)}", "Write the file anew") from error
    version = header.get("schema_version") if isinstance(header, dict) else None
    if version != SCHEMA_VERSION or not isinstance(header.get("meta"), dict):
        raise InputError(
            f"{path} has a header of schema version {brief(version)}, expected {SCHEMA_VERSION}",
            "Use the edgestill that wrote it",
        )
    try:
        return Architecture.from_json(header.get("architecture")), header["meta"]
    except InputError as error:
        raise InputError(f"{path}: {error.message}", error.hint) from error
