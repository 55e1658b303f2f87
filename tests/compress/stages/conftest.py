"""A file that every test of a module quantises or builds is judged by a child process once."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import pytest

from compress.graph import untrusted_onnx


@pytest.fixture(scope="module", autouse=True)
def one_judgement_a_file() -> Iterator[None]:
    """The child starts an interpreter with two large packages, and its answer depends on the bytes alone."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(untrusted_onnx, "refusal", lru_cache(maxsize=8)(untrusted_onnx.refusal))
        yield
