"""Packages that `pip install edgestill` does not install; they are imported where they are used."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from runtime.errors import UnavailableError


def optional(module: str, package: str = "") -> Any:
    """The imported module. Raises UnavailableError that names its `package` and the command that installs it."""
    try:
        return import_module(module)
    except ImportError as error:
        name = package or module.partition(".")[0]
        raise UnavailableError(f"Package {name} is not installed", "pip install 'edgestill[bench]'") from error
