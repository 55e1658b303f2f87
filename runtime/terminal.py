"""Printing for the command line: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import sys
from typing import Any

from runtime.text import printable, without_credentials


def escape_what_cannot_be_printed() -> None:
    """Let both streams write an escape for a character that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def log(line: str) -> None:
    """Print a line on standard error."""
    print(printable(without_credentials(line)), file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """Print a line on standard output at once: its reader may be another program."""
    print(printable(line), flush=True)


def print_json(document: Any, indent: int | None = None) -> None:
    """Print JSON on standard output at once. Names that are not UTF-8 become escapes that JSON readers decode."""
    unicode = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    print(json.dumps(document, indent=indent, ensure_ascii=not unicode), flush=True)
