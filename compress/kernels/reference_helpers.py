"""Helpers of the losses' references in plain torch.

A reference takes one entry per pyramid level and returns one float32 scalar (float64 for float64 maps), the sum over
levels. It is what every kernel must equal, and what runs without an NVIDIA GPU. All arithmetic but an adapter's is
float32 or wider. The loss is a mean that neither batch nor image size changes, and exactly 0 if student equals
teacher; so is its gradient, except for CWD's, which plain torch rounds to about 1e-9 and the kernels give as 0.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor


def sum_of_levels(levels: Iterable[Tensor]) -> Tensor:
    """The sum over levels."""
    return torch.stack(list(levels)).sum()


def widened(x: Tensor) -> Tensor:
    """Half precision as float32; others as they are."""
    return x.float() if x.dtype in (torch.float16, torch.bfloat16) else x
