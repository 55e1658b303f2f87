"""The order of the stages. In: a recipe. Out: `<out>/<stage>/` for every stage, brought up to date in order."""

from __future__ import annotations

from collections.abc import Collection
from importlib import import_module
from pathlib import Path
from typing import Any

from compress.config import Recipe
from compress.log import Log
from compress.processes import process_count
from compress.recipe import suggestion
from compress.stages import Stage
from compress.store import SECONDS, Outcome, alone_in, execute
from runtime.errors import UsageError

ORDER = ("data", "teacher", "distill", "export", "quantize", "qad", "build", "bench", "report", "bundle")
"""Each is the name of a module in `compress/stages/`."""


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    until: str = ORDER[-1],
    force: Collection[str] = (),
    log: Log,
) -> list[Outcome]:
    """Run every stage up to `until`; those named in `force` even when they are done.

    The user's settings and files are checked for all stages before the first one runs. Raises UsageError when a
    stage or a setting is unknown, the networks do not suit the recipe or each other (see `check_recipe`), several
    processes were started or another run works in `out`, InputError when a checkpoint is missing.
    """
    if (processes := process_count()) > 1:
        raise UsageError(
            f"{processes} processes were started, but stages are published by one",
            "Start `edgestill train` or `distill` by torchrun, and the recipe alone",
        )
    for name in (until, *force):
        require_stage(name)
    tasks = [stage(name).task(recipe, out) for name in ORDER[: ORDER.index(until) + 1]]
    if "distill" in (task.name for task in tasks):
        import_module("compress.training.recipe_checks").check_recipe(recipe)
    outcomes = []
    with alone_in(out):
        for task in tasks:
            outcomes.append(execute(task, out, log=log, force=task.name in force))
            log(_line(outcomes[-1]))
    return outcomes


def stage(name: str) -> Stage[Any, Any]:
    """The stage of this name. Its module is imported only now, because most of them import torch."""
    opened: Stage[Any, Any] = import_module(f"compress.stages.{name}").STAGE
    return opened


def require_stage(name: str) -> None:
    if name not in ORDER:
        raise UsageError(f"unknown stage {name!r}", suggestion(name, ORDER))


def _line(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"{outcome.stage:<9} unchanged"
    figures = {key: value for key, value in outcome.figures.items() if key != SECONDS and _is_plain(value)}
    shown = "  ".join(f"{key} {_short(value)}" for key, value in figures.items())
    return f"{outcome.stage:<9} {outcome.seconds:7.1f} s  {shown}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and len(str(value)) < 60


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
