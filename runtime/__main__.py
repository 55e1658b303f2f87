"""`python -m runtime detect | build | info`: the device's own command line, on the standard library alone."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.errors import EdgestillError, one_line

DESCRIPTION = "Detect with edgestill models, build engines, and see what this machine can do."


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code: 0 done, 1 the work failed, 2 wrong usage. An error is one line on standard error."""
    options = parser().parse_args(arguments)
    try:
        options.command(options)
    except EdgestillError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output went away, as `| head` does
        sys.stderr.close()
        return 0
    except OSError as error:  # a path that cannot even be looked at, a disk that fails
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 1
    return 0


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="python -m runtime", description=DESCRIPTION)
    root.add_argument("--version", action="version", version=f"edgestill {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    detect_ = commands.add_parser("detect", help="find objects in images, videos or a camera's frames")
    detect_.add_argument(
        "sources", nargs="+", metavar="SOURCE", help="image, folder, pattern, video, URL, camera number"
    )
    detect_.add_argument("--model", required=True, help=".onnx file, engine with its model.json, or bundle folder")
    detect_.add_argument("--conf", type=float, help="least score (default: the model's own)")
    detect_.add_argument("--device", default="auto", help="auto, cpu, cuda or tensorrt (default: auto)")
    detect_.add_argument("--variant", help="precision or file to take from a bundle")
    detect_.add_argument("--threads", type=int, help="CPU threads of one inference")
    detect_.add_argument("--save", type=Path, metavar="DIR", help="write images with drawn boxes here")
    detect_.add_argument("--json", action="store_true", help="one JSON object a frame on standard output")
    detect_.set_defaults(command=detect)

    build_ = commands.add_parser("build", help="build a TensorRT engine from an ONNX file")
    build_.add_argument("onnx", type=Path, help="model.onnx")
    build_.add_argument("--out", type=Path, help="the plan (default: beside the ONNX file, suffix .plan)")
    build_.add_argument("--backend", default="auto", help="auto, tensorrt or tensorrt_rtx (default: auto)")
    build_.add_argument("--targets", default="", metavar="SM,...", help="GPUs to build for (tensorrt_rtx): sm86,sm89")
    build_.add_argument("--workspace", type=int, default=2048, metavar="MIB", help="builder's memory (default: 2048)")
    build_.add_argument("--timing-cache", type=Path, metavar="FILE", help="speeds up later builds (plain TensorRT)")
    build_.add_argument("--dla-core", type=int, metavar="N", help="build for this DLA core, GPU as fallback")
    build_.set_defaults(command=build)

    info_ = commands.add_parser("info", help="this machine, or what a model file is")
    info_.add_argument("path", nargs="?", type=Path, help=".onnx file, engine or bundle folder")
    info_.set_defaults(command=info)
    return root


def detect(options: argparse.Namespace) -> None:
    from runtime.detector import Detector
    from runtime.sources import frames

    with Detector.load(
        options.model, conf=options.conf, device=options.device, variant=options.variant, threads=options.threads
    ) as detector:
        print_choice(detector)
        for frame in frames(options.sources):
            started = time.perf_counter()
            found = detector(frame.image)
            milliseconds = (time.perf_counter() - started) * 1e3
            if options.json:
                line = {"source": frame.source, "frame": frame.number, "detections": found.to_list(detector.card.names)}
                print(json.dumps(line, ensure_ascii=False), flush=True)
            else:
                print(f"{frame.source} [{frame.number}]: {summary(found, detector.card.names)}, {milliseconds:.1f} ms")
            if options.save:
                save_drawn(options.save, frame, found, detector.card.names)


def print_choice(detector: Any) -> None:
    """Which file runs, and why not an earlier one; on standard error, so that standard output stays data."""
    for file, reason in detector.skipped:
        print(f"skipped {file}: {reason}", file=sys.stderr)
    file = detector.artifact.file if detector.artifact else detector.card.name
    print(f"running {file} ({detector.card.precision}) on {detector.providers[0]}", file=sys.stderr)


def summary(found: Any, names: Sequence[str]) -> str:
    """For example "2 bolt, 1 nut"."""
    from collections import Counter

    from runtime.detections import name_of

    counts = Counter(name_of(class_id, names) for class_id in found.class_id.tolist())
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "nothing"


def save_drawn(folder: Path, frame: Any, found: Any, names: Sequence[str]) -> None:
    import cv2

    from runtime.detections import draw
    from runtime.files import atomic_write
    from runtime.image import WRITABLE

    stem = Path(frame.source).stem or "frame"
    name = f"{stem}-{frame.number:06d}.jpg" if frame.is_video else Path(frame.source).name
    if Path(name).suffix.lower() not in WRITABLE:
        name = f"{stem}.jpg"
    with atomic_write(folder / name) as temporary:
        if not cv2.imwrite(str(temporary), draw(frame.image, found, names)):
            raise EdgestillError(f"{folder / name}: the image cannot be written")


def build(options: argparse.Namespace) -> None:
    from runtime.engine import build_engine, card_for, record_plan

    out = options.out or options.onnx.with_suffix(".plan")
    card, precision = card_for(options.onnx, out)
    report = build_engine(
        options.onnx,
        out,
        backend=options.backend,
        targets=tuple(filter(None, options.targets.split(","))),
        workspace_mib=options.workspace,
        timing_cache=options.timing_cache,
        dla_core=options.dla_core,
    )
    for line in report.log:
        print(f"warning: {line}", file=sys.stderr)
    record_plan(card, precision, out, report)
    targets = ", ".join(report.targets)
    print(f"{out}: {report.bytes / 1e6:.1f} MB for {targets}, {report.seconds:.1f} s, sha256 {report.sha256}")


def info(options: argparse.Namespace) -> None:
    """JSON: the machine's facts, or the card of a file and whether each of its artifacts can run here."""
    from runtime import machine

    described = describe(options.path) if options.path else machine.facts()
    print(json.dumps(described, indent=2, ensure_ascii=False))


def describe(path: Path) -> dict[str, Any]:
    from runtime import machine
    from runtime.bundle import metadata_of, model_files

    card = model_files(path)[0].card
    if card is None:
        return {"file": str(path), "metadata": metadata_of(path), "note": "no edgestill card: a foreign file"}
    facts = machine.facts()
    runs = {item.file: machine.mismatches(item, facts) or "yes" for item in card.artifacts}
    return {"file": str(path), "card": card.to_dict(), "runs_here": runs}


if __name__ == "__main__":
    sys.exit(main())
