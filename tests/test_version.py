"""The version stands in pyproject.toml, and everything else repeats it."""

from __future__ import annotations

import re
from pathlib import Path

from click.testing import CliRunner

import compress
from compress.cli import cli

REPOSITORY = Path(__file__).resolve().parent.parent


def declared(file: str, pattern: str) -> str:
    return re.search(pattern, (REPOSITORY / file).read_text(), re.MULTILINE)[1]


def test_package_command_and_citation_have_the_version_of_the_project() -> None:
    version = declared("pyproject.toml", r'^version = "(.+)"$')
    assert compress.__version__ == version
    assert CliRunner().invoke(cli, ["--version"]).output.split()[-1] == version
    assert declared("CITATION.cff", r"^version: (.+)$") == version


def test_the_changelog_opens_with_this_version() -> None:
    assert declared("CHANGELOG.md", r"^## (\S+)") == compress.__version__
