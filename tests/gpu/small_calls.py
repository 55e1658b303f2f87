"""Every kernel once on small maps, for compute-sanitizer, which makes each access a hundred times as slow."""

from __future__ import annotations

from itertools import product

import torch
from shapes import SANITIZED
from shim.cases import arguments
from shim.oracle import LAYOUTS

from compress.kernels.gpu import gpu
from compress.kernels.losses import FUSED
from compress.kernels.rescale import rescale

DTYPES = (torch.float16, torch.float32)


def main() -> None:
    device = gpu(0)
    for name, shapes, dtype, layout in product(FUSED, SANITIZED.values(), DTYPES, LAYOUTS):
        given = arguments(name, dtype, shapes, layout, scale=8.0, device="cuda")
        loss, gradients = FUSED[name].run(device, given)
        made = rescale(device, gradients, torch.tensor(3.0).cuda(), given[-1], in_place=False)
        assert loss.cpu().isfinite(), name
        assert all(g.cpu().isfinite().all() for g in [*gradients, *made]), name
    print("every kernel ran")


if __name__ == "__main__":
    main()
