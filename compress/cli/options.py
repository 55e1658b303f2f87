"""Options that several commands share, with the spellings YOLOv5 users know."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import click

from runtime.errors import UsageError

FILE = click.Path(path_type=Path)

data = click.option("--data", type=FILE, required=True, help="data.yaml: path, train, val, names.")
imgsz = click.option("--imgsz", "--img", "--img-size", type=int, help="Image side in pixels, a multiple of 32.")
batch = click.option("--batch", "--batch-size", type=int, help="Images a batch.")
device = click.option("--device", default="auto", show_default=True, help="auto, cpu, or a GPU number.")
changes = click.option("--set", "changes", multiple=True, metavar="KEY=VALUE", help="Change one setting; repeatable.")
as_json = click.option("--json", "as_json", is_flag=True, help="One JSON document on standard output.")


def settings(model: type[Any], given: Mapping[str, Any], changes: Sequence[str], origin: str) -> Any:
    """`model` from the flags that were given, with every --set laid over them."""
    from compress.recipe import validate, with_change

    raw: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
    for change in changes:
        raw = with_change(raw, change)
    return validate(model, raw, origin)


def run_folder(project: Path, name: str, *, exist_ok: bool, resume: bool) -> Path:
    """`project/name`, or the first free of name2, name3, ...; on resume the newest that exists."""
    candidates = [project / name, *(project / f"{name}{i}" for i in range(2, 10_000))]
    if exist_ok:
        return candidates[0]
    free = next(i for i, folder in enumerate(candidates) if not folder.exists())
    if not resume:
        return candidates[free]
    if free == 0:
        raise UsageError(f"nothing to resume: {candidates[0]} does not exist", "Start without --resume")
    return candidates[free - 1]


def say(line: str) -> None:
    """Progress goes to standard error, so that standard output holds results only."""
    click.echo(line, err=True)


def print_json(document: Any) -> None:
    click.echo(json.dumps(document, indent=2, default=str))
