"""The parser of the command lines that do without click, and its type for paths; `runtime.numbers` has the others."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NoReturn

from runtime.errors import UsageError


class Parser(argparse.ArgumentParser):
    """Reports wrong usage as one line, without the credentials of an address. Raises UsageError."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"See `{self.prog} --help`")


def path(text: str) -> Path:
    """A path. An empty one, as an unset variable of a shell leaves, would be the folder that the user is in."""
    if text == "":
        raise argparse.ArgumentTypeError("a path is empty")
    return Path(text)
