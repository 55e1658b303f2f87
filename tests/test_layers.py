"""Which package may import which, and what the runtime may load."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(' '.join(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    return {name.partition(".")[0] for name in done.stdout.split()}


def test_every_import_contract_holds() -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("lint-imports")], cwd=REPOSITORY, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("package", ["runtime", "runtime.detector", "runtime.engine", "runtime.__main__"])
def test_the_runtime_needs_neither_torch_nor_onnx_nor_click(package: str) -> None:
    assert not loaded_after(f"import {package}") & {"torch", "onnx", "click", "compress", "benchmarks", "pydantic"}


def test_settings_store_and_command_line_start_without_torch() -> None:
    modules = "compress.config, compress.store, compress.recipe, compress.cli"
    assert not loaded_after(f"import {modules}") & {"torch", "onnx", "scipy", "matplotlib"}


PART_OF_ANOTHER = {"google", "pydantic_core"}
"""Protobuf speaks for onnx, and pydantic_core is the half of pydantic that is not Python."""


def imported_packages(package: str) -> Iterator[str]:
    """Every package that a module may import, inside functions too."""
    for file in sorted((REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            yield from (name.partition(".")[0] for name in names)


@pytest.mark.parametrize("package", ["runtime", "benchmarks", "compress"])
def test_whatever_is_imported_is_a_requirement_of_its_users(package: str) -> None:
    tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads pyproject.toml")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines = [*project["dependencies"], *(line for extra in extras if extra != "dev" for line in extras[extra])]
    required = {re.match(r"[\w-]+", line)[0].lower() for line in lines}
    by_module = metadata.packages_distributions()
    imported = set(imported_packages(package)) & by_module.keys() - PART_OF_ANOTHER
    assert "numpy" in imported, "the walk lost its way"
    assert not {name for name in imported if not {one.lower().replace("_", "-") for one in by_module[name]} & required}
