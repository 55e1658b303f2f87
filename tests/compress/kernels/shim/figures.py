"""Figures of one run of the kernels' tests, for the line of figures at its end."""

from __future__ import annotations

import time
from collections import Counter

cases = 0
"""Comparisons with the reference in float64."""
largest: dict[str, float] = {}
"""Dtype -> largest relative L2 error of a gradient."""
compiled: dict[str, set[str]] = {}
"""Architecture -> entry points compiled for it."""
faults: Counter[str] = Counter()
"""Planted faults: "caught" and "survived"."""
_started = time.monotonic()


def compared(dtype: object, error: float) -> None:
    global cases
    cases += 1
    name = str(dtype).removeprefix("torch.")
    largest[name] = max(error, largest.get(name, 0.0))


def line() -> str:
    """Empty if nothing was seen."""
    parts = []
    if compiled:
        entries = max(map(len, compiled.values()))
        parts.append(f"{entries} kernels for {len(compiled)} architectures")
    if cases:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in sorted(largest.items()))
        parts.append(f"{cases} cases, largest gradient error {errors}")
    if faults:
        parts.append(f"{faults['caught']} of {faults.total()} planted faults caught")
    return "; ".join([*parts, f"{time.monotonic() - _started:.0f} s"]) if parts else ""
