"""Types for argparse: numbers within a range, which the error names."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import TypeVar

MOST = 1_000_000_000
Number = TypeVar("Number", int, float)


def whole(least: int, most: int = MOST) -> Callable[[str], int]:
    """A whole number from `least` to `most`."""
    return _number(int, least, most, "a whole number")


def real(least: float, most: float = MOST) -> Callable[[str], float]:
    """A number from `least` to `most`."""
    return _number(float, least, most, "a number")


def batches(text: str) -> tuple[int, ...]:
    """Smallest, usual and largest batch: "1,4,8"."""
    found = tuple(whole(1)(part) for part in text.split(","))
    if len(found) != 3 or list(found) != sorted(found):
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not SMALLEST,USUAL,LARGEST, such as 1,4,8")
    return found


def _number(kind: type[Number], least: Number, most: Number, what: str) -> Callable[[str], Number]:
    """A reader of `kind` that raises ArgumentTypeError in one line for anything else, NaN too."""

    def read(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = None
        if value is None or not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{text[:40]!r} is not {what} from {least} to {most}")
        return value

    return read
