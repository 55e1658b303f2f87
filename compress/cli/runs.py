"""Whole pipelines: demo, init, run, report."""

from __future__ import annotations

import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from compress.cli.options import (
    FILE,
    SCALE,
    as_json,
    changes,
    given_changes,
    given_settings,
    imgsz,
    say,
    setting,
    show,
)
from runtime.errors import EdgestillError, UsageError
from runtime.terminal import print_json
from runtime.text import printable

if TYPE_CHECKING:
    from compress.config import Recipe


@click.command()
@click.argument("file", type=FILE, metavar="RECIPE")
@changes
@click.option("--until", metavar="STAGE", help="Stop after this stage; default the last.")
@click.option("--force", multiple=True, metavar="STAGE", help="Run this stage even when it is done; repeatable.")
@click.option("--out", type=FILE, help="Folder of the run; default runs/<name of the recipe>.")
@as_json
def run(file: Path, until: str | None, force: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Checkpoint and data in, measured engines and a bundle out.

    Stages that are done are skipped; a killed run continues where it was.
    """
    from compress.recipe import load_recipe

    recipe = load_recipe(file, given_changes())
    _run(recipe, out or Path("runs") / recipe.name, until, force, as_json)


@click.command()
@click.argument("file", type=FILE, default=Path("recipe.yaml"), metavar="[FILE]")
@click.option("--data", type=FILE, default=Path("data.yaml"), help="data.yaml of your data.")
@click.option("--weights", type=FILE, help="YOLOv5 checkpoint that the teacher starts from; without it, from scratch.")
@setting("--student", key="student.scale", type=SCALE, expose_value=True, help="Size of the student.")
@imgsz(expose_value=True)
@click.option("--overwrite", is_flag=True, help="Replace an existing file.")
def init(file: Path, data: Path, weights: Path | None, student: str, imgsz: int, overwrite: bool) -> None:
    """Write a commented recipe; change it and give it to `edgestill run`.

    Its epochs suit the number of training images.
    """
    from compress.data import load_data
    from compress.data.labels import label_path
    from compress.recipe import load_recipe, recipe_text
    from runtime.files import atomic_write

    if file.exists() and not overwrite:
        raise UsageError(f"{file} exists", "Choose another name or add --overwrite")
    splits = load_data(data).splits if data.is_file() else {}
    text = recipe_text(
        file=printable(shlex.quote(file.name)),
        name=file.stem,
        data=_relative(data, file.parent),
        weights=None if weights is None else _relative(weights, file.parent),
        student=student,
        imgsz=imgsz,
        images=len(splits["train"]) if splits else None,
        split="val" if splits and not any(label_path(image).is_file() for image in splits.get("test", ())) else "test",
    )
    with atomic_write(file) as temporary:
        temporary.write_text(text, encoding="utf-8")
        _check(load_recipe(temporary))
    say(f"wrote {file}; next: edgestill run {shlex.quote(str(file))}")


@click.command()
@click.option("--out", type=FILE, default=Path("runs/demo"), help="Folder of the run.")
@as_json
def demo(out: Path, as_json: bool) -> None:
    """The whole pipeline on a generated conveyor-belt data set; no GPU, minutes."""
    from compress.demo import prepare

    _run(prepare(out, say), out, None, (), as_json)


@click.command()
@click.argument("file", type=FILE, metavar="RECIPE")
@changes
@click.option("--arms", default="", metavar="NAME,...", help="Arms to run; default all of the recipe's study.")
@setting("--seeds", key="study.seeds", help="Trainings of each arm; more make the intervals narrower.")
@setting("--jobs", key="study.jobs", help="Trainings at a time, each with one CPU thread.")
@setting("--time-limit", key="study.time_limit_s", help="Seconds after which trainings stop; the next call goes on.")
@click.option("--out", type=FILE, help="Folder of the study; default runs/<name of the recipe>-study.")
@as_json
def study(file: Path, arms: str, out: Path | None, as_json: bool) -> None:
    """Compare ways to train the student, over paired seeds, on the test split.

    Runs that are done are kept; a killed study goes on where it was.
    """
    from compress.recipe import load_recipe
    from compress.study import run_study
    from compress.study.render import to_markdown
    from runtime.files import read_json

    recipe = load_recipe(file, (*given_settings(), *given_changes()))
    names = [name.strip() for name in arms.split(",") if name.strip()]
    folder = out or Path("runs") / f"{recipe.name}-study"
    document = read_json(run_study(recipe, folder, names, say))
    say(f"study  {folder / 'study.md'}, {folder / 'study.png'}")
    show(document, to_markdown(document), as_json)


@click.command()
@click.argument("runs", type=FILE, nargs=-1, required=True, metavar="RUN...")
@click.option("--fail-on", multiple=True, metavar="'map50_95<0.30'", help="Exit with 1 where this holds; repeatable.")
@click.option("--out", type=FILE, help="Write the comparison as .html or .md.")
@as_json
def report(runs: tuple[Path, ...], fail_on: tuple[str, ...], out: Path | None, as_json: bool) -> None:
    """Compare runs (folders or report.json files) and check them for CI."""
    from benchmarks.compare import compare, parse_rule, to_markdown, violations
    from benchmarks.report import Report

    rules = [parse_rule(text) for text in fail_on]
    reports = [Report.load(_report_of(run)) for run in runs]
    found = compare(reports)
    if out:
        _write_comparison(found, out)
    if as_json:
        print_json(found._asdict(), indent=2)
    elif not out:
        click.echo(to_markdown(found), nl=False)
    if broken := violations(rules, reports):
        raise EdgestillError("; ".join(broken))


def _report_of(path: Path) -> Path:
    """A run's folder stands for the report within it."""
    return path / "report" if (path / "report" / "report.json").is_file() else path


def _write_comparison(found: Any, out: Path) -> None:
    from benchmarks import compare
    from runtime.files import write_text

    renderers = {".md": compare.to_markdown, ".html": compare.to_html}
    if out.suffix not in renderers:
        raise UsageError(f"--out {out}: expected a file ending in {' or '.join(renderers)}")
    write_text(out, renderers[out.suffix](found))


def _run(recipe: Any, out: Path, until: str | None, force: tuple[str, ...], as_json: bool) -> None:
    from compress.pipeline import ORDER, run_recipe

    outcomes = run_recipe(recipe, out, until=until or ORDER[-1], force=force, log=say)
    if as_json:
        print_json([dataclasses.asdict(outcome) for outcome in outcomes], indent=2)
    elif outcomes[-1].stage == "bundle":
        click.echo(f"report  {out / 'report' / 'report.html'}\nbundle  {out / 'bundle'}")


def _check(recipe: Recipe) -> None:
    """Raises UsageError when the recipe's networks, as far as they are there, do not take images of its size."""
    if recipe.teacher.weights is None or recipe.teacher.weights.is_file():
        from compress.training.prepare import check_image_sizes

        check_image_sizes(recipe)


def _relative(path: Path, folder: Path) -> str:
    """`path` for the text of a recipe in `folder`: relative where that stays short, absolute otherwise."""
    relative = os.path.relpath(path.resolve(), folder.resolve())
    return relative if relative.count("..") <= 3 else str(path.resolve())
