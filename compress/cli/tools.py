"""Looking at things: detect, inspect, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli.options import FILE, as_json, show


@click.command(add_help_option=False, context_settings={"ignore_unknown_options": True})
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def detect(arguments: tuple[str, ...]) -> None:
    """Detect on images, videos, cameras and streams; the same as `python -m runtime detect`."""
    from runtime.arguments import Parser
    from runtime.detect import add_detect_options
    from runtime.detect import detect as run

    parser = Parser(prog="edgestill detect", description="Find objects in images, videos or the frames of a camera.")
    add_detect_options(parser)
    run(parser.parse_intermixed_args(list(arguments)))


@click.command()
@click.argument("file", type=FILE)
@as_json
def inspect(file: Path, as_json: bool) -> None:
    """Show the content of a .pt, .safetensors, .onnx, engine or bundle; nothing in it is run."""
    from compress.inspection import as_text, inspect_file

    facts = inspect_file(file)
    show(facts, as_text(facts), as_json)


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Show what this machine can do, what is missing, and the command that installs it."""
    from compress.doctor import as_text, examine, to_json

    found = examine()
    show(to_json(found), as_text(found), as_json)
