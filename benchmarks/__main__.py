"""`python -m benchmarks`: measure a model file or bundle on this device and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from benchmarks.accuracy import read_ground_truth
from benchmarks.bench import Plan, dataset_of, measure_all, numbered_images
from benchmarks.compare import parse_rule, violations
from benchmarks.environment import environment
from benchmarks.render import require_packages, to_markdown, write
from benchmarks.report import make_report
from runtime.arguments import Parser, path
from runtime.numbers import real, whole
from runtime.terminal import exit_code_of

DESCRIPTION = (
    "Measure the latency from frame to boxes, and the mAP if there are annotations, of the same files in one run."
)


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured (however slow), 1 it could not be measured or `--fail-on` holds, 2 wrong usage."""
    return exit_code_of(lambda: run(parser().parse_args(arguments)))


def parser() -> argparse.ArgumentParser:
    made = Parser(prog="python -m benchmarks", description=DESCRIPTION)
    made.add_argument("--model", type=path, required=True, help=".onnx file, engine with its model.json, or bundle")
    made.add_argument("--images", type=path, required=True, metavar="DIR", help="folder with images")
    made.add_argument("--annotations", type=path, metavar="JSON", help="COCO annotations of the images, for mAP")
    made.add_argument("--out", type=path, required=True, metavar="DIR", help="report.json, .html, .md, .csv go here")
    made.add_argument("--variant", help="precision or file to take from a bundle (default: all that run here)")
    made.add_argument("--device", default=Plan.device, help="auto, cpu, cuda or tensorrt (default: %(default)s)")
    made.add_argument("--backend", default=Plan.backend, help="library that runs it (default: %(default)s)")
    made.add_argument(
        "--samples", type=whole(1), default=Plan.samples, help="timed frames (default: %(default)s; p99 needs 662)"
    )
    made.add_argument(
        "--warmup", type=real(0), default=Plan.warmup_ms, metavar="MS", help="shortest warm-up (default: %(default)g)"
    )
    made.add_argument(
        "--interval",
        type=real(0),
        metavar="MS",
        help="time between frames, as from a camera (default: none, one frame after another)",
    )
    made.add_argument("--threads", type=whole(1), help="CPU threads of one inference (default: one per core)")
    made.add_argument(
        "--max-images", type=whole(0), default=0, metavar="N", help="use the first N images; 0 takes all (default: 0)"
    )
    made.add_argument("--name", help="name of the report (default: the model's)")
    made.add_argument(
        "--fail-on",
        action="append",
        default=[],
        metavar="RULE",
        help="exit with 1 if this holds, for example 'map50_95<0.30'; repeatable",
    )
    return made


def run(options: argparse.Namespace) -> int:
    rules = [parse_rule(text) for text in options.fail_on]  # a typo is reported before the minutes of measuring
    require_packages()
    truth = read_ground_truth(options.annotations) if options.annotations else None
    plan = Plan(
        images=numbered_images(options.images, truth, options.max_images),
        ground_truth=truth,
        samples=options.samples,
        warmup_ms=options.warmup,
        interval_ms=options.interval,
        device=options.device,
        backend=options.backend,
        threads=options.threads,
    )
    machine = environment()
    rows, idle = measure_all(options.model, plan, options.variant)
    report = make_report(
        options.name or options.model.stem,
        machine=machine,
        argv=["python", "-m", "benchmarks", *sys.argv[1:]],
        dataset=dataset_of(options.images.name, plan),
        models=rows,
        engines=idle,
    )
    paths = write(report, options.out)
    print(to_markdown(report), end="")
    print("\n".join(map(str, paths)), file=sys.stderr)
    broken = violations(rules, [report])
    print("".join(f"failed: {sentence}\n" for sentence in broken), end="", file=sys.stderr)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
