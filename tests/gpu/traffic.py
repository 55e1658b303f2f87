"""Bytes that each loss moves between the GPU's memory and its chip, by Nsight Compute: `traffic.py OUT.json`.

Time alone can hide a second read that the cache served. U is one map of float16, over all levels of a detector (of the
first level for the adapter); a loss that reads student and teacher once and writes the gradient moves 3 U. What a
kernel has written and the cache still holds when it ends is not counted.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from runtime.files import write_json

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written", "gpu__time_duration.sum": "ns"}
OWNERS = ("weighted_mse", "adapter", "cwd", "pkd", "fgd", "soft_head")
"""The beginnings of the names of each loss's kernels."""
PROFILER = [
    "ncu", "--clock-control", "none", "--cache-control", "none", "--metrics", ",".join(METRICS),
    "--kernel-name", f"regex:^({'|'.join(OWNERS)})", "--csv", "--print-units", "base",
]  # fmt: skip
CALLS = "--calls"


def calls() -> None:
    """One call of each loss on a detector's maps, the cache emptied before each."""
    import torch

    from compress.kernels.bench_case import Case, arguments
    from compress.kernels.gpu import gpu
    from compress.kernels.losses import FUSED

    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for name in FUSED:
        given = arguments(Case(name, size_of(name), "fp16"), other.device, 0)
        with torch.no_grad():
            other.fill_(1)
            FUSED[name].run(gpu(0), given)
        torch.cuda.synchronize()


def size_of(owner: str) -> str:
    return "s8" if owner.startswith("adapter") else "all"


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One entry per launch, in order, from the profiler's CSV among its other lines."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    launches: dict[str, dict[str, Any]] = {}
    for cells in table:
        launch = launches.setdefault(cells["ID"], {"kernel": cells["Kernel Name"]})
        if cells["Metric Name"] in METRICS:
            launch[METRICS[cells["Metric Name"]]] = float(cells["Metric Value"].replace(",", ""))
    return list(launches.values())


def by_loss(launches: Iterable[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Sums over each loss's launches, in U."""
    from compress.kernels.bench_case import Case

    found: dict[str, dict[str, float]] = {}
    for launch in launches:
        owner = next(owner for owner in OWNERS if launch["kernel"].startswith(owner))
        one = Case(owner, size_of(owner), "fp16").map_bytes
        sums = found.setdefault(owner, {"launches": 0, "read_u": 0.0, "written_u": 0.0, "us": 0.0})
        sums["launches"] += 1
        sums["read_u"] += launch.get("read", 0.0) / one
        sums["written_u"] += launch.get("written", 0.0) / one
        sums["us"] += launch.get("ns", 0.0) / 1e3
    return found


def main(out: Path) -> int:
    done = subprocess.run([*PROFILER, sys.executable, __file__, CALLS], capture_output=True, text=True)
    launches = parse(done.stdout.splitlines())
    if not launches:
        print(done.stdout[-2000:], done.stderr[-2000:])
        return 1
    losses = by_loss(launches)
    for name, sums in losses.items():
        figures = (
            f"{sums['read_u']:.2f} U read, {sums['written_u']:.2f} U written, {sums['us']:.0f} us under the profiler"
        )
        print(f"{name:12} {sums['launches']:3} launches: {figures}")
    write_json(out, {"measured": "tests/gpu/traffic.py", "losses": losses, "launches": launches})
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == [CALLS]:
        calls()
    else:
        sys.exit(main(Path(sys.argv[1])))
