"""CIoU with its own backward pass, against autograd of the formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from compress.compute.boxes import CellCIoU, decode_in_cell

from ..losses.formulas import ciou

SHAPE = (3, 5, 2, 7)
"""Levels, copies, anchors, targets."""


def case(seed: int, scale: float = 1.0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Logits as columns of longer rows, anchors, and centres and sides of targets."""
    nl, copies, na, nt = SHAPE
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(*SHAPE, 9, generator=generator) * scale
    anchors = torch.rand(nl, na, 2, generator=generator) * 8 + 0.5
    centres = torch.rand(2, nl, copies, 1, nt, generator=generator) * 2 - 0.5
    sides = torch.rand(2, nl, 1, 1, nt, generator=generator) * 10 + 0.1
    return rows[..., :4].requires_grad_(), anchors, centres, sides


def expected(logits: Tensor, anchors: Tensor, centres: Tensor, sides: Tensor) -> Tensor:
    targets = torch.cat([part.expand(2, *SHAPE) for part in (centres, sides)]).movedim(0, -1)
    return ciou(decode_in_cell(logits, anchors[:, None, :, None]), targets)


@pytest.mark.parametrize("scale", [0.3, 1.0, 4.0])
def test_ciou_and_its_gradient_are_those_of_the_formula(scale: float) -> None:
    logits, anchors, centres, sides = case(0, scale)
    reference = expected(logits, anchors, centres, sides)
    upstream = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))
    (gradient,) = torch.autograd.grad(1 - reference, logits, upstream)
    shortfall, found = CellCIoU(anchors)(logits, centres, sides)
    torch.testing.assert_close(found, reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(shortfall, 1 - reference, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(torch.autograd.grad(shortfall, logits, upstream)[0], gradient, rtol=1e-5, atol=1e-6)
    assert not found.requires_grad


def test_where_corners_meet_the_gradient_is_that_of_the_formula() -> None:
    """Logits of 0 give a centre of 0.5 and the anchor's sides: equal boxes, and boxes that share a corner."""
    anchors = torch.full((3, 2, 2), 2.0)
    logits = torch.zeros(*SHAPE, 4, requires_grad=True)
    centres, sides = torch.full((2, 3, 5, 1, 7), 0.5), torch.full((2, 3, 1, 1, 7), 2.0)
    centres[0, :, 1], centres[:, :, 2], centres[1, :, 3] = 1.0, 0.0, 2.5  # the last touches the box from outside
    sides[:, ..., 3], sides[0, ..., 4] = 1.0, 4.0
    (gradient,) = torch.autograd.grad(1 - expected(logits, anchors, centres, sides), logits, torch.ones(SHAPE))
    shortfall, _ = CellCIoU(anchors)(logits, centres, sides)
    found = torch.autograd.grad(shortfall, logits, torch.ones(SHAPE))[0]
    torch.testing.assert_close(found, gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("logit", [50.0, -50.0, 1000.0, -1000.0])
def test_saturated_logits_and_targets_without_size_have_a_finite_gradient(logit: float) -> None:
    _, anchors, centres, sides = case(2)
    logits = torch.full((*SHAPE, 4), logit, requires_grad=True)
    for target_sides in (sides, torch.zeros_like(sides)):
        shortfall, found = CellCIoU(anchors)(logits, centres, target_sides)
        assert shortfall.isfinite().all()
        assert found.isfinite().all()
        assert torch.autograd.grad(shortfall.sum(), logits)[0].isfinite().all()


def test_no_pairs_are_no_error() -> None:
    logits = torch.zeros(3, 5, 2, 0, 4, requires_grad=True)
    shortfall, _ = CellCIoU(torch.ones(3, 2, 2))(logits, torch.zeros(2, 3, 5, 1, 0), torch.zeros(2, 3, 1, 1, 0))
    shortfall.sum().backward()
    assert logits.grad is not None
    assert logits.grad.shape == logits.shape
