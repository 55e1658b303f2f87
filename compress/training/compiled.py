"""Functions that torch.compile makes faster, and one line where it cannot."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from runtime.errors import EdgestillError, one_line

Function = TypeVar("Function", bound=Callable[..., Any])


VARIANTS = 64
"""Compiled forms of one function: a section of a network has one for each network, level and shape of a batch."""


def compiled(function: Function) -> Function:
    """The function, compiled anew for each shape of its inputs when it first meets it: a training has two or three."""
    from torch._dynamo import config as tracing  # takes seconds, and only those who compile need it
    from torch._functorch import config as differentiation

    tracing.recompile_limit = VARIANTS
    differentiation.donated_buffer = False  # a measurement of gradients runs the same backward pass once before
    return torch.compile(function, dynamic=False)  # type: ignore[return-value]


@contextmanager
def compile_failures_named() -> Iterator[None]:
    """Report in one line that the compiler has failed. Raises EdgestillError instead of its error."""
    try:
        yield
    except RuntimeError as error:
        # by its name, since to import the class takes seconds
        if all(kind.__name__ != "TorchDynamoException" for kind in type(error).__mro__):
            raise
        raise EdgestillError(f"torch.compile failed: {one_line(error)}", "Set compile=false") from error
