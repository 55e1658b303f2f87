"""Bytes that each loss moves between the GPU's memory and its chip, by Nsight Compute: `traffic.py OUT.json`.

Time alone can hide a second read that the cache served. U is one map of float16, over all levels of a detector (of the
first level for the adapter); a loss that reads student and teacher once and writes the gradient moves 3 U. What a
kernel has written and the cache still holds when it ends is not counted. Both layouts are called; training has maps
channels last.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from collections.abc import Iterable, Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

from compress.kernels.bench_case import LAYOUTS, Case, arguments
from compress.kernels.losses import FUSED
from runtime.errors import EdgestillError
from runtime.files import write_json
from runtime.terminal import exit_code_of

METRICS = {"dram__bytes_read.sum": "read", "dram__bytes_write.sum": "written", "gpu__time_duration.sum": "ns"}
OWNERS = {name.split("_")[0]: name for name in FUSED}
"""The beginning of the names of a loss's kernels -> the loss."""
CASES = [
    Case(name, "s8" if name == "adapter_mse" else "all", "fp16", layout) for layout, name in product(LAYOUTS, FUSED)
]
PROFILER = [
    "ncu", "--clock-control", "none", "--cache-control", "none", "--metrics", ",".join(METRICS),
    "--kernel-name", f"regex:^({'|'.join(OWNERS)})", "--csv", "--print-units", "base",
]  # fmt: skip
CALLS = "--calls"


def calls() -> None:
    """One call of each case, the cache emptied before each."""
    import torch

    from compress.kernels.gpu import gpu

    other = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    for case in CASES:
        given = arguments(case, other.device, 0)
        with torch.no_grad():
            other.fill_(1)
            FUSED[case.loss].run(gpu(0), given)
        torch.cuda.synchronize()


def parse(lines: Iterable[str]) -> list[dict[str, Any]]:
    """One entry per launch, in order, from the profiler's CSV among its other lines."""
    table = csv.DictReader(line for line in lines if line.startswith('"'))
    launches: dict[str, dict[str, Any]] = {}
    for cells in table:
        launch = launches.setdefault(cells["ID"], {"kernel": cells["Kernel Name"]})
        if cells["Metric Name"] in METRICS:
            launch[METRICS[cells["Metric Name"]]] = float(cells["Metric Value"].replace(",", ""))
    return list(launches.values())


def by_case(launches: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Sums over the launches of each case, in U. Raises EdgestillError unless they are those of all cases in turn."""
    runs = [(owner, list(some)) for owner, some in groupby(launches, key=lambda launch: owner_of(launch["kernel"]))]
    if [owner for owner, _ in runs] != [case.loss for case in CASES]:
        raise EdgestillError(f"the profiler saw {', '.join(owner for owner, _ in runs)}", "See its output in run.log")
    return [sums_of(case, some) for case, (_, some) in zip(CASES, runs, strict=True)]


def owner_of(kernel: str) -> str:
    """The loss that a kernel belongs to."""
    return next(name for beginning, name in OWNERS.items() if kernel.startswith(beginning))


def sums_of(case: Case, launches: Sequence[dict[str, Any]]) -> dict[str, Any]:
    def total(metric: str) -> float:
        return sum(launch.get(metric, 0.0) for launch in launches)

    traffic = {f"{way}_u": total(way) / case.map_bytes for way in ("read", "written")}
    return {**case._asdict(), "launches": len(launches), **traffic, "us": total("ns") / 1e3}


def run(out: Path) -> int:
    done = subprocess.run([*PROFILER, sys.executable, __file__, CALLS], capture_output=True, text=True)
    launches = parse(done.stdout.splitlines())
    if not launches:
        print(done.stdout[-2000:], done.stderr[-2000:])
        return 1
    cases = by_case(launches)
    for one in cases:
        print(
            f"{one['loss']:12} {one['layout']:13} {one['launches']:2} launches: {one['read_u']:.2f} U read, "
            f"{one['written_u']:.2f} U written, {one['us']:.0f} us under the profiler"
        )
    write_json(out, {"measured": "tests/gpu/traffic.py", "cases": cases, "launches": launches})
    return 0


if __name__ == "__main__":
    if sys.argv[1:] == [CALLS]:
        calls()
    else:
        sys.exit(exit_code_of(lambda: run(Path(sys.argv[1]))))
