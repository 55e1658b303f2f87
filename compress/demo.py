"""A recipe that runs every stage in minutes on two CPU cores.

Generated data, a teacher trained from scratch, a student of half its width.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from compress.config import Recipe
from compress.data.demo.generate import generate
from compress.log import Log
from compress.recipe import load_recipe
from runtime.files import write_text
from runtime.text import printable

IMAGES, SIZE, SEED = 200, 256, 0
RECIPE = """\
# The recipe of `edgestill demo`. Change it and run it again: `edgestill run {file} --out {out}`
name: demo
data: belt/data.yaml
imgsz: 256
teacher: {{scale: n, epochs: 36, batch: 16, val_interval: 12}}
student: {{scale: p}}
distill: {{epochs: 40, batch: 16, val_interval: 10}}
quantize: {{calibration_images: 64, max_map_drop: 0.03}}
"""


def prepare(out: Path, log: Log) -> Recipe:
    """Make the demo's data and recipe in the folder `out`; files that exist already are used as they are."""
    data, file = out / "belt", out / "recipe.yaml"
    if not (data / "data.yaml").is_file():
        generate(data, images=IMAGES, size=(SIZE, SIZE), seed=SEED)
        log(f"generated {IMAGES} images of metal parts on a conveyor belt in {data}")
    if not file.is_file():
        write_text(file, RECIPE.format(file=_argument(file), out=_argument(out)))
    return load_recipe(file)


def _argument(path: Path) -> str:
    """The path as a shell takes it, on one line."""
    return printable(shlex.quote(str(path)))
