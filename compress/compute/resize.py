"""Make batches of images smaller."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def reduced(images: Tensor, side: int) -> Tensor:
    """Float images (B, C, S, S), each `side` pixels wide: means over squares of pixels. A larger S is a multiple of
    `side`.

    Returns the same tensor where S is not larger than `side`.
    """
    factor = images.shape[-1] // side
    return images if factor <= 1 else F.avg_pool2d(images, factor)
