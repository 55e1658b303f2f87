"""The complete state of a training in one file, so that a killed training continues bit for bit.

In: everything that changes between two epochs. Out: `state.pt`, a torch zip of tensors and plain values that is read
with `weights_only=True`, hence runs no code. Full precision; written beside and renamed, so a reader finds either the
previous epoch or this one.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from runtime.errors import EdgestillError, InputError
from runtime.files import atomic_write

STATE = "state.pt"
"""Name of the file in the folder of a training."""
VERSION = 5


def save_state(state: dict[str, Any], path: Path) -> None:
    """Publish `state` (nested dicts, lists, tensors and plain values) at `path` atomically.

    Raises EdgestillError when the disk is full.
    """
    with atomic_write(path) as temporary:
        try:
            torch.save({"version": VERSION, **state}, temporary)
        except RuntimeError as error:  # torch's writer hides a full disk in "enforce fail at inline_container"
            raise EdgestillError(
                f"{path}: cannot be written: the disk is full", "Free some space, then resume"
            ) from error


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote, on the CPU.

    Raises InputError when the file is missing, damaged, of another version, or holds anything but plain state.
    """
    if not path.is_file():
        raise InputError(f"nothing to resume: {path} does not exist", "Start without --resume")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises half a dozen kinds for damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{path} is not a readable training state ({reason})", "Start without --resume") from error
    found = state.get("version") if isinstance(state, dict) else None
    if found != VERSION:
        raise InputError(
            f"{path} has state version {found}, expected {VERSION}",
            "Start a new training from its weights: --weights last.safetensors",
        )
    return state


def random_state() -> dict[str, Any]:
    """State of every global random generator that a library might use."""
    kind, keys, position, has_gauss, cached = np.random.get_state()  # noqa: NPY002 - the global generator is the point
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": random.getstate(),
        "numpy": (kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, cached),
    }


def restore_random_state(state: dict[str, Any]) -> None:
    """Set every global random generator to the `random_state` of before."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.device_count() == len(state["cuda"]):
        torch.cuda.set_rng_state_all(state["cuda"])
    random.setstate(state["python"])
    kind, keys, position, has_gauss, cached = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, cached))  # noqa: NPY002
