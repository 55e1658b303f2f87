"""Printing for the command line: results on standard output, all else on standard error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Mapping
from typing import Any

from runtime.errors import EdgestillError, one_line
from runtime.text import printable, without_credentials


def escape_what_cannot_be_printed() -> None:
    """Let both streams write an escape for a character that their encoding lacks, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


def exit_code_of(command: Callable[[], int | None], name: str = "error") -> int:
    """Run a command line: its own exit code or 0; 1 where the work failed, 2 for wrong usage.

    An error is one line on standard error, which begins with `name`.
    """
    escape_what_cannot_be_printed()
    try:
        code = command()
        if sys.stdout:  # None where the caller closed it
            sys.stdout.flush()
    except EdgestillError as error:
        log(f"{name}: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of our output is gone, as with `| head`: nothing more may be written to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except MemoryError:
        log(f"{name}: there is not enough memory")
        return 1
    except OSError as error:  # a path that cannot even be looked at, a disk that fails
        log(f"{name}: {f'{error.filename}: ' if error.filename else ''}{error.strerror or one_line(error)}")
        return 1
    return code or 0


def log(line: str) -> None:
    """Print a line on standard error."""
    print(printable(without_credentials(line)), file=sys.stderr, flush=True)


def print_line(line: str) -> None:
    """Print a line on standard output at once: its reader may be another program."""
    print(printable(line), flush=True)


def print_json(document: Any, indent: int | None = None) -> None:
    """Print JSON on standard output at once; what JSON has no type for as text, NaN and infinity as null.

    Names that are not UTF-8 become escapes that JSON readers decode.
    """
    encoding = getattr(sys.stdout, "encoding", None) or ""
    is_utf8 = encoding.lower().replace("-", "") == "utf8"
    text = json.dumps(_finite(document), indent=indent, ensure_ascii=not is_utf8, allow_nan=False, default=str)
    print(text, flush=True)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
