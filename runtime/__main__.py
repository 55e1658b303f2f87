"""`python -m runtime detect | build | info | verify`: the command line of the device, on the standard library alone."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from runtime import __version__
from runtime.arguments import Parser, path
from runtime.detect import add_detect_options, detect
from runtime.errors import EngineError, InputError
from runtime.identity import SHOWN
from runtime.numbers import batches, whole
from runtime.terminal import exit_code_of, log, print_json, print_line

DESCRIPTION = "Detect with edgestill models, build engines, and see what this machine can do."


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code is that of `exit_code_of`."""

    def command() -> None:
        options = parser().parse_args(arguments)
        options.command(options)

    return exit_code_of(command)


def parser() -> argparse.ArgumentParser:
    root = Parser(prog="python -m runtime", description=DESCRIPTION)
    root.add_argument("--version", action="version", version=f"edgestill {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")

    detect_ = commands.add_parser("detect", help="find objects in images, videos or the frames of a camera")
    add_detect_options(detect_)
    detect_.set_defaults(command=detect)

    build_ = commands.add_parser("build", help="build a TensorRT engine from an ONNX file")
    build_.add_argument("onnx", type=path, help="model.onnx")
    build_.add_argument("--out", type=path, help="the plan (default: beside the ONNX file, suffix .plan)")
    build_.add_argument("--backend", default="auto", help="auto, tensorrt or tensorrt_rtx (default: auto)")
    build_.add_argument("--targets", default="", metavar="SM,...", help="GPUs to build for (tensorrt_rtx): sm86,sm89")
    build_.add_argument(
        "--batches",
        type=batches,
        metavar="MIN,OPT,MAX",
        help="images of one call, where the ONNX file leaves their number open (default: 1,4,8)",
    )
    build_.add_argument(
        "--workspace", type=whole(1, 1 << 20), default=2048, metavar="MIB", help="builder's memory (default: 2048)"
    )
    build_.add_argument("--timing-cache", type=path, metavar="FILE", help="speeds up later builds (plain TensorRT)")
    build_.add_argument("--dla-core", type=whole(0, 63), metavar="N", help="build for this DLA core, GPU as fallback")
    build_.set_defaults(command=build)

    info_ = commands.add_parser("info", help="this machine, or what a model file is")
    info_.add_argument("path", nargs="?", type=path, help=".onnx file, engine or bundle folder")
    info_.set_defaults(command=info)

    verify_ = commands.add_parser("verify", help="check the hash of every file of a bundle")
    verify_.add_argument("path", type=path, metavar="BUNDLE", help="bundle folder")
    verify_.set_defaults(command=verify)
    return root


def build(options: argparse.Namespace) -> None:
    from runtime.bundle import card_of, folder_card
    from runtime.card import USUAL_BATCHES
    from runtime.engine import build_engine, list_plans, profile_of, require_open_batch
    from runtime.layers import moved_bytes

    card = card_of(options.onnx)
    if options.batches:
        require_open_batch(options.onnx, card)
    out = options.out or options.onnx.with_suffix(".plan")
    folder_card(out.parent, options.onnx)  # another model there is refused before the minutes of building
    report = build_engine(
        options.onnx,
        out,
        backend=options.backend,
        targets=tuple(filter(None, options.targets.split(","))),
        workspace_mib=options.workspace,
        shapes=profile_of(card, options.batches or USUAL_BATCHES),
        timing_cache=options.timing_cache,
        dla_core=options.dla_core,
    )
    for line in report.log:
        log(f"warning: {line}")
    slower = list_plans(out.parent, options.onnx, [report.artifact(out.name, card)])
    if out.name in slower:
        raise EngineError(f"{options.onnx.name}: {slower[out.name]}", "Use the FP16 plan")
    for file, reason in slower.items():
        log(f"{file} is removed: {reason}")
    targets = ", ".join(report.targets)
    moved = f", moves {moved_bytes(report.layers) / 1e6:.1f} MB a call" if report.layers else ""
    print_line(
        f"{out}: {report.bytes / 1e6:.1f} MB for {targets}{moved}, {report.seconds:.1f} s, sha256 {report.sha256}"
    )


def info(options: argparse.Namespace) -> None:
    """Print as JSON the facts of the machine, or the card of a file and whether each of its artifacts runs here."""
    from runtime import machine

    print_json(describe(options.path) if options.path else machine.facts(), indent=2)


def describe(path: Path) -> dict[str, Any]:
    from runtime import machine
    from runtime.bundle import listed_files, metadata_of, model_files, problems

    card = model_files(path)[0].card
    if card is None:
        return {"file": str(path), "metadata": metadata_of(path), "note": "no edgestill card: a foreign file"}
    facts = machine.facts()
    runs = {
        file.artifact.file: problems(file)
        or machine.mismatches(file.artifact, facts)
        or machine.lacks(file.artifact, facts)
        or "yes"
        for file in listed_files(path)
        if file.artifact
    }
    return {"file": str(path), "card": card.to_dict(), "runs_here": runs}


def verify(options: argparse.Namespace) -> None:
    """Check the hash of every file that the card lists, and that all are of its model.

    Raises EngineError, after a line for each bad file.
    """
    from runtime.bundle import listed_files, problems

    listed = listed_files(options.path)
    if not listed:
        raise InputError(f"{options.path}: no card lists hashes for it", "Give a bundle folder")
    bad = [problem for file in listed for problem in problems(file)]
    for problem in bad:
        print_line(problem)
    if bad:
        raise EngineError(f"{options.path}: {len(bad)} files are not as the card says")
    identity = listed[0].card.identity if listed[0].card else ""
    told = f"of model {identity[:SHOWN]}" if identity else "not checked to be of one model: the card has no identity"
    print_line(f"{options.path}: {len(listed)} model files, each as the card says, {told}")


if __name__ == "__main__":
    sys.exit(main())
