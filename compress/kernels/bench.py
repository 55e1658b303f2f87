"""How fast the fused losses are on this GPU: `python -m compress.kernels.bench [--out FILE.json] [--quick]`.

Out: a table, and every number as JSON, unfavourable ones included, with the facts of the machine. What is compared and
how: see `bench_case.py`. Each loss has its own process and a share of the time: a kernel that crashes or a compiler
that hangs costs one loss, and what was measured before is already written.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from compress.kernels.bench_case import L2_TIMES, SAMPLES, UPSTREAM, Case, plan
from compress.kernels.losses import FUSED
from runtime import machine
from runtime.errors import UnavailableError
from runtime.files import write_json
from runtime.numbers import real
from runtime.terminal import exit_code_of

SECONDS = 225.0
GRACE_SECONDS = 10.0
"""Extra seconds that a process gets after its share of the time before it is ended."""
CLOCKS = ("clocks.sm", "clocks.mem", "clocks.max.sm", "clocks.max.mem", "power.draw", "power.limit", "temperature.gpu")
METHOD = {
    "call": f"forward and backward, upstream gradient {UPSTREAM:.0f} as a new gradient scaler sends it",
    "time": f"a CUDA graph over input sets of {L2_TIMES} x L2, by events; {SAMPLES} samples in random turns",
    "gb_s": "3 maps (2 for copy) over the median, whatever the variant really moves",
    "stream": "torch.add(s, t, out=g) over as many elements in one launch: reads two maps and writes one",
    "ours_again": "the same kernels under another name: the difference is noise",
    "kernels_us": "sum of the times of a call's kernels, copies and fills by the profiler, without a graph; the rest "
    "of a call's time lies between them",
    "layout": "of all maps and gradients, the rivals' too; training has them channels last",
    "peak_extra_bytes": "of one call without a graph, beside its inputs, its gradients included",
    "host_us": "the host's time to queue one call without a graph; wall_us: the same until the GPU has done it",
}
LAYOUT_NAMES = {"channels_last": "last", "nchw": "nchw"}
"""Layout -> its word in the table."""


def run(seconds: float, out: Path | None, *, quick: bool) -> dict[str, Any]:
    """Measure every loss, and write the document after each. Raises UnavailableError without a GPU."""
    if not torch.cuda.is_available():
        raise UnavailableError("torch sees no NVIDIA GPU here", "Run the benchmark on a machine that has one")
    started = time.monotonic()
    document = {"measured": "compress.kernels.bench", **facts(), "method": METHOD, "cases": [], "missing": []}
    document["clocks"] = {"before": clocks()}
    print(f"{document['gpu']['name']}, torch {document['torch']}\n{header()}", flush=True)
    for index, loss in enumerate(FUSED):
        share = (seconds - (time.monotonic() - started)) / (len(FUSED) - index)
        found, why = measure_loss(loss, share, quick=quick)
        document["cases"] += found
        document["missing"] += missing(loss, found, why, quick=quick)
        document["clocks"]["after"] = clocks()
        document["seconds"] = time.monotonic() - started
        print("".join(f"{row(case)}\n" for case in found), end="", flush=True)
        if out:
            write_json(out, document)
    print(remarks(document))
    return document


def measure_loss(loss: str, seconds: float, *, quick: bool) -> tuple[list[dict[str, Any]], str]:
    """The cases that a separate process could measure, and why there are no more."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder) / "cases.jsonl"
        command = [sys.executable, "-m", "compress.kernels.bench_case", loss, "--lines", str(lines)]
        command += ["--seconds", str(seconds), *(["--quick"] if quick else [])]
        try:
            status = subprocess.run(command, timeout=seconds + GRACE_SECONDS, check=False).returncode  # noqa: S603
            why = f"its process ended with status {status}" if status else "no time was left"
        except subprocess.TimeoutExpired:
            why = "it took too long"
        return read_cases(lines), why


def read_cases(path: Path) -> list[dict[str, Any]]:
    """The last whole line of each case in a file that a process may have left in the middle of one; none without it."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    rows = [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return list({case_of(row): row for row in rows}.values())


def case_of(row: Mapping[str, Any]) -> Case:
    return Case(*(row[name] for name in Case._fields))


def missing(loss: str, found: Sequence[Mapping[str, Any]], why: str, *, quick: bool) -> list[dict[str, str]]:
    """The cases that were not measured."""
    done = {case_of(row) for row in found}
    left = [case for case in plan(loss, quick=quick) if case not in done]
    return [{**case._asdict(), "why": why} for case in left]


def facts() -> dict[str, Any]:
    """The machine and the versions that the numbers belong to."""
    properties = torch.cuda.get_device_properties(0)
    return {
        "machine": machine.facts(),
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "gpu": {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "multiprocessors": properties.multi_processor_count,
            "l2_bytes": properties.L2_cache_size,
            "memory_bytes": properties.total_memory,
        },
    }


def clocks() -> dict[str, str]:
    """Clocks, power and temperature of the first GPU as they are; empty if nvidia-smi does not tell."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return {}
    command = [program, f"--query-gpu={','.join(CLOCKS)}", "--format=csv,noheader", "--id=0"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return {}
    return dict(zip(CLOCKS, map(str.strip, told.split(",")), strict=False))


# ---- the table ----------------------------------------------------------------------------------------------------


class Column(NamedTuple):
    """A column of numbers."""

    group: str
    """The first line of its title."""
    title: str
    width: int
    read: Callable[[Mapping[str, Any]], float | None]
    """From a case; None for what was not measured."""
    factor: float = 1
    places: int = 2


def row(case: Mapping[str, Any]) -> str:
    """One line under `header`; `-` for what was not measured."""
    values = ((column, column.read(case)) for column in COLUMNS)
    cells = ["-".rjust(c.width) if x is None else f"{c.factor * x:{c.width}.{c.places}f}" for c, x in values]
    return f"{case['loss']:12} {case['dtype']:5} {case['size']:4} {LAYOUT_NAMES[case['layout']]:6}" + "".join(cells)


def header() -> str:
    """Two lines of titles."""
    groups = "".join(column.group.rjust(column.width) for column in COLUMNS)
    titles = "".join(column.title.rjust(column.width) for column in COLUMNS)
    return f"{'':30}{groups}\n{'loss':12} {'dtype':5} {'size':4} {'layout':6}{titles}"


def median_us(variant: Mapping[str, Any]) -> float | None:
    return variant["us"]["p50"] if "us" in variant else None


def extra_bytes(case: Mapping[str, Any]) -> float | None:
    """Peak memory of one of our calls beyond its gradients."""
    peak = case["variants"].get("ours", {}).get("peak_extra_bytes")
    return None if peak is None else peak - case["map_bytes"]


def _of(variant: str, key: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: case["variants"].get(variant, {}).get(key)


def _ratio(name: str) -> Callable[[Mapping[str, Any]], float | None]:
    return lambda case: case["ratios"][name]


COLUMNS = (
    Column("call", "stream", 8, lambda case: median_us(case["variants"].get("stream", {})), places=1),
    Column("us", "ours", 8, lambda case: median_us(case["variants"].get("ours", {})), places=1),
    Column("kernels", "stream", 8, _of("stream", "kernels_us"), places=1),
    Column("us", "ours", 8, _of("ours", "kernels_us"), places=1),
    Column("of", "call", 6, _ratio("of_stream")),
    Column("stream", "kernels", 8, _ratio("kernels_of_stream")),
    Column("noise", "%", 6, _ratio("noise"), factor=100, places=1),
    Column("eager/", "ours", 7, _ratio("eager_over_ours")),
    Column("compile/", "ours", 9, _ratio("compile_over_ours")),
    Column("extra", "MiB", 7, extra_bytes, factor=2**-20),
    Column("host", "us", 6, _of("ours", "host_us"), places=0),
)


def remarks(document: Mapping[str, Any]) -> str:
    """Lines for what failed and for cases that were not reached, which the table does not show."""
    lines = [
        f"{_named(case)}: {name} {words}: {variant[key]}"
        for case in document["cases"]
        for name, variant in case["variants"].items()
        for key, words in (("error", "failed"), ("why_no_kernel_time", "without the time of its kernels"))
        if key in variant
    ]
    reasons: dict[tuple[str, str], int] = Counter((m["loss"], m["why"]) for m in document["missing"])
    lines += [f"{loss}: {n} cases not measured: {why}" for (loss, why), n in reasons.items()]
    return "\n".join([*lines, f"{len(document['cases'])} cases in {document['seconds']:.0f} s"])


def _named(case: Mapping[str, Any]) -> str:
    return " ".join(case[name] for name in Case._fields)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m compress.kernels.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, metavar="FILE", help="every number as JSON")
    parser.add_argument("--quick", action="store_true", help="one case per loss, in half a minute")
    parser.add_argument("--seconds", type=real(0), default=SECONDS, help=f"for all of it (default: {SECONDS:.0f})")
    asked = parser.parse_args(arguments)
    return exit_code_of(lambda: 0 if run(asked.seconds, asked.out, quick=asked.quick)["cases"] else 1)


if __name__ == "__main__":
    sys.exit(main())
