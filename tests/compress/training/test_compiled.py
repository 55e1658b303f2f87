from __future__ import annotations

import shutil

import pytest
import torch
from torch import Tensor

from compress.training.compiled import compile_failures_named, compiled

needs_a_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")


def curve(x: Tensor) -> Tensor:
    return (x.sin() * x.exp()).tanh().sum()


@needs_a_compiler
def test_gradients_may_be_taken_twice_through_compiled_code() -> None:
    x = torch.linspace(-2, 2, 64, requires_grad=True)
    value = compiled(curve)(x)
    (first,), (second,) = (torch.autograd.grad(value, x, retain_graph=True) for _ in range(2))
    (expected,) = torch.autograd.grad(curve(x), x)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected)


def test_other_errors_stay_what_they_are() -> None:
    with pytest.raises(RuntimeError, match="of another kind"), compile_failures_named():
        raise RuntimeError("of another kind")
