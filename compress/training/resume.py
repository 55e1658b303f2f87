"""Resume: what a training started from, and the rule that its state goes on only from the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config import TrainConfig, result_settings
from compress.data import Dataset
from compress.data.loader import batch_count
from compress.models import Architecture
from compress.processes import process_count
from compress.training.state import STATE, load_state
from runtime.errors import UsageError
from runtime.files import sha256

LAST = "last.safetensors"
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Origin:
    """The files that a training reads, and the facts about them that its result depends on.

    A resumed training may leave out `weights` and `scale`: the state has them.
    """

    data: str
    weights: str | None
    teacher: str | None
    scale: str | None
    device: str
    facts: dict[str, Any]
    """Facts that must be equal, by the name that a message gives them; None if nothing was said."""


def origin_of(
    config: TrainConfig,
    data: Dataset,
    *,
    weights: Path | None = None,
    teachers: Sequence[Path] = (),
    scale: str | None = None,
    device: str = "auto",
) -> Origin:
    """The origin of a training of `config`. Reads the checkpoints for their digests."""
    train, val = data.splits["train"], data.splits["val"]
    facts = {
        "training images": len(train.samples),
        "validation images": len(val.samples),
        "batches an epoch": batch_count(len(train.samples), config.batch),
        "training data": _shown(train.sha256),
        "validation data": _shown(val.sha256),
        "teacher": ", ".join(map(_digest_of, teachers)) or None,
        "start weights": _digest(weights),
        "scale": scale,
        "processes": process_count(),
    }
    first = next(iter(teachers), None)
    return Origin(str(data.path), _absolute(weights), _absolute(first), scale, device, facts)


def _absolute(file: Path | None) -> str | None:
    return None if file is None else str(file.resolve())


def _digest(file: Path | None) -> str | None:
    return None if file is None else _digest_of(file)


def _digest_of(file: Path) -> str:
    return _shown(sha256(file))


def _shown(digest: str) -> str:
    return f"sha256 {digest[:SHOWN_DIGITS]}"


def read_resume(out: Path, config: TrainConfig, origin: Origin) -> dict[str, Any]:
    """The state in `out`.

    Raises InputError when there is none, UsageError when it was trained with other settings or from another origin.
    """
    state = load_state(out / STATE)
    then = result_settings(type(config).model_validate(state["config"]))
    facts = state["origin"]["facts"] | {"scale": Architecture.from_json(state["architecture"]).scale}
    said = {name: fact for name, fact in origin.facts.items() if fact is not None}
    for name, was, now in (*_differences(then, result_settings(config)), *_differences(facts, said)):
        raise UsageError(
            f"{out} was trained with {name} = {was}, not {now}",
            f"Resume with what it began with, or start a new training from its weights: --weights {out / LAST}",
        )
    return state


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each entry of `now` that is another in `was`."""
    return ((name, was.get(name), value) for name, value in now.items() if was.get(name) != value)
