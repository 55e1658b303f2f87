"""Every TensorRT name that the runtime touches exists in every version that it claims to serve."""

from __future__ import annotations

import ast
import json
from pathlib import Path

import pytest

RUNTIME = Path(__file__).resolve().parents[2] / "runtime"
FILES = ("engine.py", "backends/tensorrt.py")
GUARDS = ("hasattr", "getattr")
NOT_TENSORRT = ("np", "self._cuda", "card", "artifact")
"""Receivers of ours whose attributes share a name with TensorRT's: NumPy, device memory, model cards and files."""


@pytest.fixture(scope="module")
def versions(shared) -> dict[str, set[str]]:
    path = shared / "research" / "tensorrt_api_names.json"
    if not path.is_file():
        pytest.skip(f"no {path.name}")
    listed = json.loads(path.read_text())
    return {
        version: {*names, *(member for members in names.values() for member in members)}
        for version, names in listed.items()
    }


def guarded(test: ast.expr) -> set[str]:
    """Names that an `if hasattr(x, "NAME")` asks for."""
    calls = [node for node in ast.walk(test) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name)]
    return {call.args[1].value for call in calls if call.func.id in GUARDS and isinstance(call.args[1], ast.Constant)}


def accesses(tree: ast.AST, safe: frozenset[str] = frozenset()) -> list[tuple[str, int]]:
    """(name, line) of every attribute access outside a branch that asked for the name first."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If):
            found += accesses(node.test, safe)
            found += accesses(ast.Module(node.body, []), safe | guarded(node.test))
            found += accesses(ast.Module(node.orelse, []), safe)
            continue
        if isinstance(node, ast.Attribute) and node.attr not in safe and ast.unparse(node.value) not in NOT_TENSORRT:
            found.append((node.attr, node.lineno))
        found += accesses(node, safe)
    return found


def missing(source: str, versions: dict[str, set[str]]) -> set[tuple[str, str]]:
    known = set().union(*versions.values())
    used = {name for name, _ in accesses(ast.parse(source)) if name in known}
    return {(name, version) for name in used for version, names in versions.items() if name not in names}


@pytest.mark.parametrize("file", FILES)
def test_every_name_exists_in_every_version(versions, file):
    assert missing((RUNTIME / file).read_text(), versions) == set()


@pytest.mark.parametrize(
    "source",
    [
        "builder.max_batch_size = 1",
        "flag = trt.BuilderFlag.FP16",
        "config.set_compute_capability(c, 0)",
        "trt.BuilderFlag.STRICT_TYPES",
    ],
)
def test_the_check_finds_names_that_some_version_lacks(versions, source):
    assert missing(source, versions)


def test_a_guard_clears_its_own_branch_only(versions):
    guard = 'if hasattr(config, "set_compute_capability"):\n    config.set_compute_capability(c, 0)\n'
    assert not missing(guard, versions)
    assert missing(guard + "config.set_compute_capability(c, 0)\n", versions)
    assert missing(guard + "else:\n    config.set_compute_capability(c, 0)\n", versions)


def test_names_that_are_only_asked_for_are_real_somewhere(versions):
    """A misspelt name in a getattr would silently mean "not offered"."""
    known = set().union(*versions.values())
    tree = ast.parse((RUNTIME / "engine.py").read_text())
    asked = {
        call.args[1].value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Name)
        and call.func.id == "getattr"
        and isinstance(call.args[1], ast.Constant)
    }
    assert asked == {"STRONGLY_TYPED", "set_compute_capability", "ComputeCapability"}
    assert asked | {"EXPLICIT_BATCH", "AMPERE_PLUS", "SAME_COMPUTE_CAPABILITY", "num_compute_capabilities"} <= known
