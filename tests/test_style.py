"""The rules of CONTRIBUTING.md that a machine can check: docstrings, errors, references in tests."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
PRODUCT = ("runtime", "benchmarks", "compress", "examples")
FILES = {
    path.relative_to(REPOSITORY).as_posix(): path
    for folder in (*PRODUCT, "tests")
    for path in sorted((REPOSITORY / folder).rglob("*.py"))
    if path.name != Path(__file__).name
}
ERRORS = {"EdgestillError", "UsageError", "InputError", "UnavailableError", "EngineError"}
Rule = Callable[[str], list[int]]
"""Lines of a file that break it."""
OPENING = re.compile(r"(Of|What) ")
BLOCK = re.compile(r"^\s*(Errors|Raises):|\bErrors: ", re.MULTILINE)
DOCUMENT = re.compile(r"\btrap [A-Z]\d+\b", re.IGNORECASE)


@cache
def parsed(file: str) -> ast.Module:
    return ast.parse(FILES[file].read_text(encoding="utf-8"))


def docstrings(file: str) -> Iterator[tuple[int, str]]:
    """Line and text of every string that stands alone: of modules, classes, functions and attributes."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            yield node.lineno, node.value.value


@cache
def constants() -> dict[str, str]:
    """Every module's text constants by name, such as REMEDY, with those of all modules under their own names."""
    found = {}
    for file in FILES:
        for node in parsed(file).body:
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                found[f"{file}:{node.targets[0].id}"] = found[node.targets[0].id] = opening_and_end(node.value)
    return {name: text for name, text in found.items() if text}


def opening_and_end(node: ast.expr) -> str:
    """The text of a literal; of an f-string with its values as {}."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(opening_and_end(part) or "{}" for part in node.values)
    if isinstance(node, ast.BinOp):
        return (opening_and_end(node.left) or "{}") + (opening_and_end(node.right) or "{}")
    return ""


def texts(file: str, node: ast.expr) -> list[str]:
    """Texts that an argument may have: a literal, a constant, or either branch of a condition."""
    if isinstance(node, ast.IfExp):
        return texts(file, node.body) + texts(file, node.orelse)
    if isinstance(node, ast.Name):
        return [constants().get(f"{file}:{node.id}") or constants().get(node.id, "")]
    return [opening_and_end(node)]


def hints(file: str) -> Iterator[tuple[int, str]]:
    """Line and text of each hint: the second argument of our errors, and whatever is passed as `hint`."""
    for node in ast.walk(parsed(file)):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        given = [keyword.value for keyword in node.keywords if keyword.arg == "hint"]
        given += node.args[1:2] if name in ERRORS else []
        yield from ((value.lineno, text) for value in given for text in texts(file, value) if text)


def messages(file: str) -> Iterator[tuple[int, str]]:
    """Line and text of the first argument of our errors."""
    for node in ast.walk(parsed(file)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ERRORS and node.args:
            yield from ((node.lineno, text) for text in texts(file, node.args[0]) if text)


def docstrings_that_open_with_of_or_what(file: str) -> list[int]:
    return [line for line, text in docstrings(file) if OPENING.match(text.lstrip())]


def docstrings_with_a_block_of_errors(file: str) -> list[int]:
    return [line for line, text in docstrings(file) if BLOCK.search(text)]


def hints_that_start_small_or_end_with_a_full_stop(file: str) -> list[int]:
    wrong = re.compile(r"(?!pip install )[a-z]|.*\.$", re.DOTALL)  # a bare command stays as it is typed
    return [line for line, text in hints(file) if wrong.match(text)]


def messages_that_end_with_a_full_stop(file: str) -> list[int]:
    return [line for line, text in messages(file) if text.endswith(".")]


def references_to_a_document_that_is_not_here(file: str) -> list[int]:
    lines = FILES[file].read_text(encoding="utf-8").splitlines()
    return [number for number, line in enumerate(lines, start=1) if DOCUMENT.search(line)]


RULES = (
    docstrings_that_open_with_of_or_what,
    docstrings_with_a_block_of_errors,
    hints_that_start_small_or_end_with_a_full_stop,
    messages_that_end_with_a_full_stop,
    references_to_a_document_that_is_not_here,
)


OFFENCES = {
    docstrings_that_open_with_of_or_what: '"""Of a level."""',
    docstrings_with_a_block_of_errors: '"""Reads.\n\nRaises:\n    InputError: no file.\n"""',
    hints_that_start_small_or_end_with_a_full_stop: 'raise InputError("no file", "give one")',
    messages_that_end_with_a_full_stop: 'raise InputError("no file.", HINT)',
    references_to_a_document_that_is_not_here: "# see trap K7",
}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_a_rule_sees_its_offence(rule: Rule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "offence.py").write_text(OFFENCES[rule])
    monkeypatch.setitem(FILES, "offence.py", tmp_path / "offence.py")
    parsed.cache_clear()
    assert rule("offence.py") == [1]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_there_are_no(rule: Rule) -> None:
    offenders = [f"{file}:{line}" for file in FILES for line in rule(file)]
    assert not offenders, "\n".join(["", *offenders])
