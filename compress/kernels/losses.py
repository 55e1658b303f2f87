"""The table of the fused losses, one line each. Tests, the benchmark and the table of registers use it."""

from __future__ import annotations

from compress.kernels import rescale
from compress.kernels.adapter_mse import ADAPTER_MSE
from compress.kernels.cwd import CWD
from compress.kernels.fgd import FGD
from compress.kernels.pkd import PKD
from compress.kernels.soft_head import SOFT_HEAD
from compress.kernels.weighted_mse import WEIGHTED_MSE

FUSED = {
    loss.name: loss
    for loss in (
        WEIGHTED_MSE,
        ADAPTER_MSE,
        CWD,
        PKD,
        FGD,
        SOFT_HEAD,
    )
}
"""Every loss with kernels, by name."""
SOURCES = (*(loss.source for loss in FUSED.values()), rescale.SOURCE)
"""Every source that holds kernels."""
