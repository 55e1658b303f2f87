"""`python -m benchmarks`: measure a model file or bundle on this device and write the report."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from runtime.errors import EdgestillError

DESCRIPTION = "Latency from frame to boxes, and mAP where there are annotations, of the same files in the same run."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 measured (however slow), 1 it could not be measured or `--fail-on` holds, 2 wrong usage."""
    return guarded(run, parser().parse_args(arguments))


def guarded(command: Callable[[argparse.Namespace], int], options: argparse.Namespace) -> int:
    """The command's exit code; an error is one line on standard error."""
    try:
        return command(options)
    except EdgestillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    made.add_argument("--model", type=Path, required=True, help=".onnx file, engine with its model.json, or bundle")
    made.add_argument("--images", type=Path, required=True, metavar="DIR", help="folder with images")
    made.add_argument("--annotations", type=Path, metavar="JSON", help="COCO annotations of the images, for mAP")
    made.add_argument("--out", type=Path, required=True, metavar="DIR", help="report.json, .html, .md, .csv go here")
    made.add_argument("--variant", help="precision or file to take from a bundle (default: all that run here)")
    made.add_argument("--device", default="auto", help="auto, cpu, cuda or tensorrt (default: auto)")
    made.add_argument("--samples", type=positive, default=200, help="timed frames (default: 200; p99 needs 662)")
    made.add_argument("--warmup", type=float, default=200.0, metavar="MS", help="least warm-up (default: 200)")
    made.add_argument("--interval", type=float, metavar="MS", help="frames come at this interval, as from a camera")
    made.add_argument("--threads", type=positive, help="CPU threads of one inference")
    made.add_argument("--max-images", type=int, default=0, metavar="N", help="use the first N images (default: all)")
    made.add_argument("--name", help="of the report (default: the model's)")
    made.add_argument("--fail-on", action="append", default=[], metavar="RULE", help="for example 'map50_95<0.30'")
    return made


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not 1 or more")
    return value


def run(options: argparse.Namespace) -> int:
    from benchmarks.bench import Plan, dataset_of, measure_all, numbered_images, read_coco
    from benchmarks.compare import fail_on, parse_rule
    from benchmarks.environment import environment
    from benchmarks.report import make_report, render_markdown

    rules = [parse_rule(text) for text in options.fail_on]  # a typo is reported before the minutes of measuring
    truth = read_coco(options.annotations) if options.annotations else None
    plan = Plan(
        images=numbered_images(options.images, truth, options.max_images),
        ground_truth=truth,
        samples=options.samples,
        warmup_ms=options.warmup,
        interval_ms=options.interval,
        device=options.device,
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
    paths = report.write(options.out)
    print(render_markdown(report), end="")
    print("\n".join(map(str, paths)), file=sys.stderr)
    violations = [found for rule in rules for found in fail_on(rule, report)]
    print("".join(f"failed: {violation}\n" for violation in violations), end="", file=sys.stderr)
    return 1 if violations else 0


if __name__ == "__main__":
    sys.exit(main())
