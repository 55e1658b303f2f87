"""Looking at things: detect, inspect, doctor."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path
from typing import Any

import click

from compress.cli.options import FILE, as_json, print_json


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--model", "--weights", type=FILE, required=True, help=".onnx file, engine or bundle.")
@click.option("--conf", "--conf-thres", type=float, help="Least score; default that of the model.")
@click.option("--device", default="auto", help="auto, cpu, cuda or tensorrt.")
@click.option("--variant", help="Precision or file to take from a bundle.")
@click.option("--threads", type=int, help="CPU threads of one inference.")
@click.option("--save", type=FILE, metavar="DIR", help="Write images with drawn boxes here.")
@click.option("--json", is_flag=True, help="One JSON object a frame on standard output.")
def detect(**options: Any) -> None:
    """Detect on images, folders, videos or a camera number; the same as `python -m runtime detect`."""
    from runtime.__main__ import detect as run

    run(Namespace(**options))


@click.command()
@click.argument("file", type=FILE)
@as_json
def inspect(file: Path, as_json: bool) -> None:
    """Show the content of a .pt, .safetensors, .onnx, engine or bundle; nothing in it is run."""
    from compress.inspection import as_text, inspect_file

    facts = inspect_file(file)
    if as_json:
        print_json(facts)
    else:
        click.echo(as_text(facts))


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """Show what this machine can do, what is missing, and the command that installs it."""
    from compress.doctor import as_text, examine, to_json

    found = examine()
    if as_json:
        print_json(to_json(found))
    else:
        click.echo(as_text(found))
