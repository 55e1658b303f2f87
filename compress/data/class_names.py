"""Class names in messages."""

from __future__ import annotations

from collections.abc import Sequence

SHOWN = 3


def class_conflict(one: str, names: Sequence[str], other: str, other_names: Sequence[str]) -> str:
    """How two lists of names differ: "best.pt has 2 classes (cat, dog), data.yaml has 80 (person, bicycle, car, ...)".

    Where they are as many, the first that differs: "class 0 is 'cat' in best.pt and 'dog' in data.yaml".
    """
    if len(names) == len(other_names):
        index = next(i for i, (a, b) in enumerate(zip(names, other_names, strict=True)) if a != b)
        return f"class {index} is {names[index]!r} in {one} and {other_names[index]!r} in {other}"
    return f"{one} has {len(names)} classes ({few(names)}), {other} has {len(other_names)} ({few(other_names)})"


def few(names: Sequence[str]) -> str:
    """The first names, and a sign where there are more: "person, bicycle, car, ..."."""
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
