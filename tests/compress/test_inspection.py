from __future__ import annotations

from compress.inspection import READERS
from runtime.backends import SUFFIXES


def test_every_file_that_the_runtime_loads_can_be_inspected() -> None:
    assert set(SUFFIXES) <= set(READERS)
