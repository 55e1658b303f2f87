"""The version is written in runtime/__init__.py; the package is built from it, and every other place repeats it."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import pytest
from click.testing import CliRunner

import compress
import runtime
from compress.cli import cli

REPOSITORY = Path(__file__).resolve().parent.parent


def test_package_and_command_have_it() -> None:
    assert compress.__version__ == runtime.__version__ == version("edgestill")
    assert CliRunner().invoke(cli, ["--version"]).output.split()[-1] == runtime.__version__


@pytest.mark.parametrize(("file", "pattern"), [("CITATION.cff", r"^version: (.+)$"), ("CHANGELOG.md", r"^## (\S+)")])
def test_the_citation_and_the_top_of_the_changelog_have_it(file: str, pattern: str) -> None:
    found = re.search(pattern, (REPOSITORY / file).read_text(), re.MULTILINE)
    assert found is not None
    assert found[1] == runtime.__version__
