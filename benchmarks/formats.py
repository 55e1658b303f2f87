"""Numbers as text, as a report prints them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

NOTHING = "–"
TOO_FEW = "n too small"
KIB = 1024
UNITS = ("bytes", "KiB", "MiB", "GiB")


def milliseconds(value: float | None) -> str:
    """Three significant figures: 0.123, 1.23, 12.3, 123."""
    if value is None:
        return NOTHING
    whole_digits = len(str(int(value))) if value >= 1 else 0
    return f"{value:.{max(0, 3 - whole_digits)}f}"


def percentile(value: float | None) -> str:
    return TOO_FEW if value is None else milliseconds(value)


def accuracy(value: float | None) -> str:
    """Five figures, as COCO results are published; no minus before a zero."""
    return NOTHING if value is None else f"{round(value, 5) + 0.0:.5f}"


def size(value: float | None) -> str:
    """Bytes in the unit that leaves 1 to 1024 of it."""
    if value is None:
        return NOTHING
    power = 3 if value >= KIB**3 else 2 if value >= KIB**2 else 1
    return f"{value / KIB**power:.2f} {UNITS[power]}"


def times(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2f}×"


def fraction(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.3f}"


def percent(value: float | None) -> str:
    return NOTHING if value is None else f"{100 * value:.1f} %"


def points(value: float | None) -> str:
    """An mAP, or a difference of two, in points of 100."""
    return NOTHING if value is None else f"{round(100 * value, 1) + 0.0:.1f}"


def difference(entry: Mapping[str, Any]) -> str:
    """A difference of mAP with its interval, as in +5.1 [3.9, 6.3]; without brackets for a single pair."""
    mean = points(entry["mean"])
    ends = [points(entry[end]) for end in ("low", "high")]
    return ("" if mean.startswith("-") else "+") + mean + ("" if NOTHING in ends else f" [{', '.join(ends)}]")


def count(value: float | None) -> str:
    """Thousands are grouped: 1 765 930."""
    return NOTHING if value is None else f"{value:,.0f}".replace(",", "\u202f")


def number(value: Any) -> str:
    """A setting as it was given."""
    return NOTHING if value is None else f"{value:g}" if isinstance(value, float) else str(value)


def digest_start(value: str | None) -> str:
    """As many digits of a digest as people compare."""
    return NOTHING if value is None else value[:12]


def duration(seconds: float | None) -> str:
    return NOTHING if seconds is None else f"{seconds:.1f} s"


def error(value: float | None) -> str:
    return NOTHING if value is None else f"{value:.2g}"


def moment(created: str) -> str:
    """An ISO date and time in UTC, to the minute."""
    return f"{created[:16].replace('T', ' ')} UTC"
