"""`python -m benchmarks.overhead`: the time that the host adds to the network, as a ratio measured in turns.

Detector end to end (frame to boxes) against a bare `session.run` of the same ONNX file on the same prepared input.
Both run on one thread by default: idle threads of one session spin, and take the cores from the other.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from benchmarks.bench import Plan, numbered_images
from benchmarks.formats import milliseconds
from benchmarks.latency import LEAST_ROUNDS, Frame, TimedPair, compare_in_turns
from runtime.arguments import Parser, path
from runtime.backends import LoadOptions
from runtime.errors import InputError
from runtime.numbers import whole
from runtime.terminal import exit_code_of


def main(arguments: Sequence[str] | None = None) -> int:
    return exit_code_of(lambda: run(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m benchmarks.overhead", description=__doc__)
    made.add_argument("--model", type=path, required=True, help=".onnx file")
    made.add_argument("--images", type=path, required=True, metavar="DIR", help="folder with images")
    made.add_argument(
        "--rounds",
        type=whole(LEAST_ROUNDS),
        default=20,
        help="ten calls of each side in each (default: 20)",
    )
    made.add_argument("--threads", type=whole(1), default=1, help="CPU threads of one inference (default: 1)")
    return made


def run(options: argparse.Namespace) -> int:
    if options.model.suffix.lower() != ".onnx":
        raise InputError(f"{options.model} is not an .onnx file", "A bare session exists for ONNX files only")
    plan = Plan(numbered_images(options.images), device="cpu", threads=options.threads)
    with plan.detector(options.model) as detector:
        bare = bare_session(options.model, options.threads)
        found = compare(detector, bare, plan.read_frames(), options.rounds)
    print(describe(found, options.model.name))
    return 0


def compare(detector: Any, bare: Callable[[Any], object], frames: Sequence[Frame], rounds: int) -> TimedPair:
    """`detector` on frames against `bare` on the inputs that the detector made of the same frames."""
    whole, inputs = cycle(frames), cycle([detector.preprocess([frame]).array for frame in frames])
    return compare_in_turns(lambda: bare(next(inputs)), lambda: detector(next(whole)), rounds)


def bare_session(path: Path, threads: int) -> Callable[[Any], object]:
    """`session.run` of ONNX Runtime on the CPU, with nothing around it and the detector's options."""
    import onnxruntime

    from runtime.backends.onnx import readable, session_options

    options = session_options(LoadOptions("cpu", threads))
    session = onnxruntime.InferenceSession(readable(path), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda array: session.run(None, {name: array})


def describe(found: TimedPair, name: str) -> str:
    """Ratio with its interval, n and spread."""
    ratio = found.ratio
    spread = f"rounds {min(ratio.ratios):.3f} to {max(ratio.ratios):.3f}"
    lines = [
        f"{name}: time end to end over time of the bare session.run: {ratio}, {spread}, verdict: {ratio.verdict()}"
    ]
    for side, ms in (("detector", found.other), ("session", found.reference)):
        shown = {"median": ms.p50, "mean": ms.mean, "std": ms.std, "min": ms.min, "max": ms.max}
        each = ", ".join(f"{key} {milliseconds(value)}" for key, value in shown.items())
        lines.append(f"  {side}: {each} ms, n = {ms.n}")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
