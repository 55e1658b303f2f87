"""Class names in messages."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


def class_conflict(one: str, names: Sequence[str], other: str, other_names: Sequence[str]) -> str:
    """For example "best.pt has 2 classes (cat, dog), data.yaml has 80 (person, bicycle, car, ...)"."""
    return f"{one} has {len(names)} classes ({_few(names)}), {other} has {len(other_names)} ({_few(other_names)})"


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
