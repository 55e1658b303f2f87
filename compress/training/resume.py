"""Resume: what a training started from, and the rule that its state goes on only from the same."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress.config import NO_START, STUDENT_ACTIVATIONS, StudentConfig, TrainConfig, result_settings
from compress.data import Dataset, SplitIndex
from compress.data.loader import batch_count
from compress.models import Architecture
from compress.processes import process_count
from compress.recipe import parse
from compress.training.state import STATE, load_state
from runtime.errors import UsageError
from runtime.files import sha256

BEST, LAST = "best.safetensors", "last.safetensors"
SHOWN_DIGITS = 12


@dataclass(frozen=True)
class Origin:
    """The files that a training reads, and the facts about them that its result depends on.

    A resumed training may leave out weights, scale and activation: the state has them.
    """

    data: str
    weights: str | None
    teacher: str | None
    teachers: tuple[str, ...]
    """Further teachers beside the first."""
    scale: str | None
    device: str
    unlabelled: str | None
    """The folder or video of the unlabelled images."""
    facts: dict[str, Any]
    """Facts that must be equal, by the name that a message gives them; None if nothing was said."""


def origin_of(
    config: TrainConfig,
    data: Dataset,
    *,
    start: StudentConfig = NO_START,
    teachers: Sequence[Path] = (),
    device: str = "auto",
    unlabelled: Path | None = None,
    unlabelled_images: SplitIndex | None = None,
) -> Origin:
    """The origin of a training of `config` whose network begins as `start` says. Digests the checkpoints.

    `unlabelled_images` are those that the folder or video `unlabelled` gave.
    """
    train, val = data.splits["train"], data.splits["val"]
    facts = {
        "training images": len(train.samples),
        "validation images": len(val.samples),
        "batches an epoch": batch_count(len(train.samples), config.batch),
        "training data": _shown(train.sha256),
        "validation data": _shown(val.sha256),
        "unlabelled images": _shown(unlabelled_images.sha256) if unlabelled_images else None,
        "teacher": ", ".join(map(_digest_of, teachers)) or None,
        "start weights": _digest(start.weights),
        "scale": start.scale,
        "activation": start.activation and STUDENT_ACTIVATIONS[start.activation],
        "init": start.init,
        "processes": process_count(),
    }
    files = tuple(str(file.resolve()) for file in teachers)
    return Origin(
        str(data.path), _absolute(start.weights), next(iter(files), None), files[1:], start.scale, device,
        _absolute(unlabelled), facts,
    )  # fmt: skip


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

    Raises InputError when there is none, UsageError when it was trained with other settings, or with some that are not
    known any more, or from another origin.
    """
    state, anew = load_state(out / STATE), f"start a new training from its weights: --weights {out / LAST}"
    try:
        then = result_settings(parse(type(config), state["config"], origin=str(out / STATE)))
    except UsageError as error:
        raise UsageError(error.message, f"Resume with the version that it began with, or {anew}") from None
    network = Architecture.from_json(state["architecture"])
    facts = state["origin"]["facts"] | {"scale": network.scale, "activation": network.activation}
    said = {name: fact for name, fact in origin.facts.items() if fact is not None}
    for name, was, now in (*_differences(then, result_settings(config)), *_differences(facts, said)):
        raise UsageError(
            f"{out} was trained with {name} = {was}, not {now}", f"Resume with what it began with, or {anew}"
        )
    return state


def _differences(was: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """Name, old and new value of each entry of `now` that is another in `was`."""
    return ((name, was.get(name), value) for name, value in now.items() if was.get(name) != value)
