"""Which package may import which, and what the runtime may load."""

from __future__ import annotations

import subprocess
import sys
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
