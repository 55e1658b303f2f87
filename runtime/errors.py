"""The errors that edgestill raises on purpose.

Each is one line: the value, the expectation and the remedy. The command line prints it and exits with `exit_code`; any
other exception is a bug.
"""

from __future__ import annotations


class EdgestillError(Exception):
    """The work failed. `message` gives the value and what was expected, `hint` the remedy."""

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}. {self.hint}" if self.hint else self.message


class UsageError(EdgestillError):
    """The request itself is wrong: an unknown option, key or name, or an impossible combination."""

    exit_code = 2


class InputError(EdgestillError):
    """A file or folder that was given is missing, damaged, or of another kind than expected."""


class UnavailableError(EdgestillError):
    """The machine lacks a package, provider, driver or device that the request needs."""


class EngineError(EdgestillError):
    """An engine could not be built, does not match this machine, or failed its integrity check."""


MOST_SHOWN = 300
"""Characters of another library's error."""


def one_line(error: Exception) -> str:
    """The text of another library's error on one line; the name of its class if it has no text."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."
