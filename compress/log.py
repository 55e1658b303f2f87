"""How long-running work reports its progress: a function that takes one line of text."""

from __future__ import annotations

from collections.abc import Callable

Log = Callable[[str], None]
