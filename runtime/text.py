"""Text that is safe to print: no credentials, no control characters, on one line."""

from __future__ import annotations

import re

HIDDEN = "***"
ADDRESS = re.compile(r"\w{2,}:/| ! ")
"""A URL, also one that pathlib has shortened to one slash, or a GStreamer pipeline."""
USER_INFO = re.compile(r"(\w{2,}:/{1,2}).*@", re.DOTALL)
"""Up to the last @, because passwords in addresses often contain /, @ and #."""
SECRETS = re.compile(
    r"""([\w-]*(?:pass|pwd|-pw|token|secret|key|sig|auth|user|login|cred)[\w-]*\s*=\s*)("[^"]*"|'[^']*'|[^&;,\s]+)""",
    re.IGNORECASE,
)


def without_credentials(text: str) -> str:
    """The text with `***` for the user, password, token or key of each address in it."""
    if not ADDRESS.search(text):
        return text
    return SECRETS.sub(rf"\1{HIDDEN}", USER_INFO.sub(rf"\1{HIDDEN}@", text))


def printable(text: str) -> str:
    """The text on one line; characters that cannot be printed, as in names that are not UTF-8, as escapes."""
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in text
    )
