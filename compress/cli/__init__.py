"""The `edgestill` command. Each command is a thin shell; what it needs is imported when it runs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import Any

import click

from runtime import __version__
from runtime.errors import EdgestillError, UsageError
from runtime.text import printable, without_credentials

COMMANDS = {
    "demo": "runs",
    "init": "runs",
    "run": "runs",
    "train": "trainings",
    "distill": "trainings",
    "val": "trainings",
    "export": "files",
    "quantize": "files",
    "build": "files",
    "bench": "files",
    "report": "runs",
    "study": "runs",
    "detect": "tools",
    "inspect": "tools",
    "doctor": "tools",
    "data": "data",
}
"""Command -> the module that holds it, in the order of the help text."""


CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True}


class Commands(click.Group):
    """Opens a command's module only when the command is asked for, so `--help` and typos answer at once."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in COMMANDS:
            return None
        return getattr(import_module(f"compress.cli.{COMMANDS[name]}"), name)

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            raise UsageError(
                f"unknown command {args[0]!r}", f"Did you mean {near[0]!r}?" if near else "See `edgestill --help`"
            )
        return super().resolve_command(ctx, args)


@click.group(cls=Commands, context_settings=CONTEXT)
@click.version_option(__version__, prog_name="edgestill")
def cli() -> None:
    """Distil a YOLOv5 teacher into an edge-ready engine, and prove it.

    \b
    edgestill demo                the whole pipeline on a generated data set, no GPU, minutes
    edgestill init recipe.yaml    write a commented recipe for your own data
    edgestill run recipe.yaml     checkpoint in, measured engine and bundle out
    """  # noqa: D301  click's sign for lines that it must not wrap is a real backspace


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit: 0 done, 1 the work failed, 2 wrong usage. An error is one line."""
    # read when torch is loaded: threads that wait for each other actively keep a core from the one that is waited for
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        status = cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        status = error.exit_code
        click.echo(error.format_message(), err=True)
    except (
        EdgestillError,
        click.ClickException,
        OSError,
        ModuleNotFoundError,
        KeyboardInterrupt,
        click.Abort,
    ) as error:
        text, status = _in_one_line(error)
        click.echo(f"edgestill: {text}", err=True)
    sys.stdout.flush()
    sys.exit(status if isinstance(status, int) else 0)


def _in_one_line(error: Any) -> tuple[str, int]:
    if isinstance(error, EdgestillError):
        text, status = str(error), error.exit_code
    elif isinstance(error, click.ClickException):
        text, status = error.format_message(), error.exit_code
    elif isinstance(error, BrokenPipeError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        text, status = "the reader of the output is gone", 1
    elif isinstance(error, ModuleNotFoundError):
        if str(error.name).startswith(("runtime", "benchmarks", "compress")):
            raise error
        text, status = f"{error.name} is not installed. pip install 'edgestill[compress]'", 1
    elif isinstance(error, OSError):
        text, status = f"{error.filename or 'file'}: {error.strerror or error}", 1
    else:
        text, status = "interrupted", 130
    return printable(without_credentials(" ".join(text.split()))), status
