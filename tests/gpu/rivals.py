"""Compile the rivals of the benchmark's main cases, so that it finds them in torch's cache.

torch.compile takes as long as the benchmark has for a loss.
"""

from __future__ import annotations

import torch

from compress.kernels.bench_case import COMPILED, plan, variants
from compress.kernels.losses import FUSED


def main() -> None:
    for loss in FUSED:
        variants(plan(loss)[0], torch.device("cuda:0"), 1)[COMPILED](0)
    torch.cuda.synchronize()
    print(f"{len(FUSED)} rivals are compiled")


if __name__ == "__main__":
    main()
