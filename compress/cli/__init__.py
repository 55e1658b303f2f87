"""The `edgestill` command. Each command is a thin shell; what it needs is imported when it runs."""

from __future__ import annotations

import difflib
import os
import sys
from collections.abc import Sequence
from importlib import import_module

import click

from runtime import __version__
from runtime.errors import EdgestillError, UnavailableError, UsageError
from runtime.terminal import exit_code_of

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
    sys.exit(exit_code_of(lambda: _run(arguments), "edgestill"))


def _run(arguments: Sequence[str] | None) -> int | None:
    """The command's own exit code, if it has one. What click or an import raises becomes an EdgestillError."""
    try:
        return cli.main(args=None if arguments is None else list(arguments), standalone_mode=False)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        return error.exit_code
    except click.ClickException as error:
        kind = UsageError if error.exit_code == UsageError.exit_code else EdgestillError
        raise kind(" ".join(error.format_message().split())) from error
    except click.Abort as error:
        raise KeyboardInterrupt from error
    except ModuleNotFoundError as error:
        if str(error.name).startswith(("runtime", "benchmarks", "compress")):
            raise
        raise UnavailableError(f"{error.name} is not installed", "pip install 'edgestill[compress]'") from error
