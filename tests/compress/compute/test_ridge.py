from __future__ import annotations

import pytest
import torch

from compress.compute.ridge import Moments, ridge


def test_the_solution_minimises_the_squared_error_and_the_penalty() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(50, 4, generator=generator, dtype=torch.float64) + 3
    y = torch.randn(50, 2, generator=generator, dtype=torch.float64)
    moments = Moments.of(x, y)
    strength = 0.1 * moments.xx.diagonal().mean()
    matrix, offset = (t.clone().requires_grad_() for t in ridge(moments, 0.1))
    ((x @ matrix.T + offset - y).square().sum() + strength * matrix.square().sum()).backward()
    for unknown in (matrix, offset):  # the offset has no penalty
        torch.testing.assert_close(unknown.grad, torch.zeros_like(unknown), rtol=0, atol=1e-8)


def test_a_linear_map_is_found_exactly_without_a_penalty() -> None:
    x, matrix, offset = torch.randn(30, 3), torch.randn(2, 3), torch.randn(2)
    found = ridge(Moments.of(x, x @ matrix.T + offset), 0.0)
    torch.testing.assert_close(found, (matrix.double(), offset.double()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_moments_of_parts_add_up_to_those_of_the_whole(dtype: torch.dtype) -> None:
    x, y = torch.randn(20, 3).to(dtype), torch.randn(20, 2).to(dtype)
    whole = Moments.of(x, y)
    parts = Moments.of(x[:7], y[:7]).plus(Moments.of(x[7:], y[7:]))
    assert whole.xx.dtype == torch.float64
    torch.testing.assert_close(tuple(parts), tuple(whole))
