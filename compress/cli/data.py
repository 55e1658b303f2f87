"""`edgestill data`: make, check and convert data sets."""

from __future__ import annotations

from pathlib import Path

import click

from compress.cli.options import FILE, as_json, say, setting, show
from runtime.errors import EdgestillError, UsageError


@click.group()
def data() -> None:
    """Generate a data set, find what is wrong with one, or convert COCO and VOC."""


@data.command()
@click.argument("out", type=FILE)
@setting("--images", key="images", group="BeltConfig", expose_value=True, help="Number of images.")
@setting("--size", key="size", group="BeltConfig", expose_value=True, help="Side in pixels.")
@setting("--seed", key="seed", group="BeltConfig", expose_value=True, help="Seed of every random number.")
def make(out: Path, images: int, size: int, seed: int) -> None:
    """Generate metal parts on a conveyor belt into the folder OUT; the same seed gives the same bytes."""
    from compress.data.demo.generate import generate

    say(f"wrote {generate(out, images=images, size=(size, size), seed=seed)}")


@data.command()
@click.argument("file", type=FILE, metavar="DATA_YAML")
@as_json
def check(file: Path, as_json: bool) -> None:
    """List bad images and label rows, class counts, and images shared by train and val. Nothing is changed.

    Exit code 1 where an image or row would be left out of a training, or an image is in two splits.
    """
    from compress.data import check as checks
    from compress.data import load_data

    result = checks.check(load_data(file))
    show(result.to_json(), result.to_text(), as_json)
    if not result.ok:
        raise EdgestillError(f"{file}: {result.verdict}")


@data.command()
@click.option("--coco", type=FILE, help="COCO JSON of the annotations.")
@click.option("--voc", type=FILE, help="Folder of VOC XML files.")
@click.option("--images", type=FILE, required=True, help="Folder of the images.")
@click.option("--out", type=FILE, required=True, help="Folder to write; must not exist.")
def convert(coco: Path | None, voc: Path | None, images: Path, out: Path) -> None:
    """Turn COCO JSON or VOC XML into YOLO folders with a data.yaml."""
    from compress.data import convert as converters

    if coco and not voc:
        say(str(converters.coco(coco, images, out)))
    elif voc and not coco:
        say(str(converters.voc(voc, images, out)))
    else:
        raise UsageError("expected exactly one of --coco FILE and --voc FOLDER")
