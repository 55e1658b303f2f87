"""Looking at things: detect, inspect, doctor."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli.options import FILE, as_json, print_json


@click.command()
@click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")
@click.option("--model", "--weights", type=FILE, required=True, help=".onnx, engine, bundle, or a checkpoint.")
@click.option("--conf", "--conf-thres", type=click.FloatRange(0, 1), help="Threshold; default that of the model.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda", "tensorrt"]), default="auto", show_default=True)
@click.option("--save", type=FILE, help="Folder for pictures or videos with the boxes drawn.")
@as_json
def detect(
    sources: tuple[str, ...], model: Path, conf: float | None, device: str, save: Path | None, as_json: bool
) -> None:
    """Detect on images, folders, videos or a camera number."""
    from compress.pipeline.detection import detect_all

    detect_all(sources, model, conf=conf, device=device, save=save, as_json=as_json)


@click.command()
@click.argument("file", type=FILE)
@as_json
def inspect(file: Path, as_json: bool) -> None:
    """What a .pt, .safetensors, .onnx, engine or bundle holds; nothing in it is run."""
    from compress.inspection import as_text, inspect_file

    facts = inspect_file(file)
    if as_json:
        print_json(facts)
    else:
        click.echo(as_text(facts))


@click.command()
@as_json
def doctor(as_json: bool) -> None:
    """What this machine can do, what is missing, and the command that mends it."""
    from compress.doctor import as_text, examine, to_json

    found = examine()
    if as_json:
        print_json(to_json(found))
    else:
        click.echo(as_text(found))
