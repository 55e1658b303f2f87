"""In: a recipe. Out: `<out>/<stage>/` for every stage, brought up to date in order."""

from __future__ import annotations

import difflib
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compress.config import Recipe, Settings
from compress.log import Log
from compress.store import Outcome, Stage, Work, execute
from runtime.errors import UsageError

STAGES = ("data", "teacher", "distill", "export", "quantize", "build", "bench", "report", "bundle")


class Uses(NamedTuple):
    """What a stage depends on: keys of the recipe, earlier stages, digests of user files, facts of the machine."""

    settings: Sequence[str] = ()
    stages: Sequence[str] = ()
    digests: Sequence[str] = ()
    facts: Sequence[str] = ()


USES = {
    "data": Uses(digests=["data"]),
    "teacher": Uses(settings=["teacher", "device"], stages=["data"], digests=["teacher_weights"]),
    "distill": Uses(settings=["distill", "student", "device"], stages=["data", "teacher"], digests=["student_weights"]),
    "export": Uses(settings=["export", "imgsz"], stages=["data", "teacher", "distill"]),
    "quantize": Uses(settings=["quantize", "bench"], stages=["data", "export"], facts=["machine"]),
    "build": Uses(settings=["build"], stages=["export", "quantize"], facts=["tensorrt"]),
    "bench": Uses(
        settings=["bench", "imgsz"], stages=["data", "teacher", "distill", "export", "quantize"], facts=["machine"]
    ),
    "report": Uses(
        settings=["name", "imgsz", "export", "bench", "distill"],
        stages=["data", "teacher", "distill", "export", "quantize", "build", "bench"],
    ),
    "bundle": Uses(stages=["export", "quantize", "build", "bench", "report"]),
}


def run_recipe(
    recipe: Recipe,
    out: Path,
    *,
    until: str = STAGES[-1],
    force: Collection[str] = (),
    log: Log,
) -> list[Outcome]:
    """Run every stage up to `until`; those named in `force` even when they are done."""
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise UsageError(
            f"{processes} processes were started, but stages are published by one",
            "Start `edgestill train` or `distill` by torchrun, and the recipe alone",
        )
    for name in (until, *force):
        require_stage(name)
    outcomes = []
    for name in STAGES[: STAGES.index(until) + 1]:
        outcomes.append(execute(_stage(name, recipe, out), out, log=log, force=name in force))
        log(_line(outcomes[-1]))
    return outcomes


def require_stage(name: str) -> None:
    if name not in STAGES:
        near = difflib.get_close_matches(name, STAGES, n=1)
        hint = f"Did you mean {near[0]!r}?" if near else f"Stages: {', '.join(STAGES)}"
        raise UsageError(f"unknown stage {name!r}", hint)


def _line(outcome: Outcome) -> str:
    if outcome.skipped:
        return f"{outcome.stage:<9} unchanged"
    shown = "  ".join(f"{key} {_short(value)}" for key, value in outcome.figures.items() if _is_plain(value))
    return f"{outcome.stage:<9} {outcome.seconds:7.1f} s  {shown}"


def _is_plain(value: Any) -> bool:
    return isinstance(value, (int, float, str)) and len(str(value)) < 60


def _short(value: float | str) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _stage(name: str, recipe: Recipe, out: Path) -> Stage:
    """The stage with its settings, its inputs among the results of earlier stages, and the facts that matter."""
    from compress.pipeline import stages

    def run(work: Work) -> Mapping[str, Any]:
        return stages.RUNNERS[name](recipe, work)

    config = {key: _plain(getattr(recipe, key)) for key in USES[name].settings}
    inputs = {stage: out / stage for stage in USES[name].stages}
    digests = {key: stages.DIGESTS[key](recipe) for key in USES[name].digests}
    facts = {key: stages.FACTS[key]() for key in USES[name].facts}
    return Stage(name, run, config, inputs, digests, facts)


def _plain(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, Settings) else value
