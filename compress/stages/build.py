"""Build: ONNX files that passed their gates become TensorRT plans, described by one `model.json`.

In: the ONNX file of each precision. Out: `<name of the model>.<precision>.plan`, `model.json`, and `build.json`, which
says of each plan what built it or why there is none.
Precision lies in the ONNX file, never in a builder flag. Ahead-of-time plans of TensorRT-RTX serve every target in
one file; plain TensorRT builds for the GPU that is there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from compress.config import BuildConfig, Settings
from compress.flavours import FLAVOURS, PLAN_PRECISIONS
from compress.inputs import kept_files
from compress.log import Log
from compress.stages import Figures, Stage, packages
from runtime.backends import BACKENDS
from runtime.bundle import card_of, folder_card
from runtime.card import ONE_IMAGE, Artifact
from runtime.engine import NO_INT8, build_engine, list_plans, profile_of, require_open_batch, resolve_backend
from runtime.errors import InputError, UnavailableError, UsageError
from runtime.files import sha256, write_json
from runtime.identity import require_same
from runtime.layers import EngineLayer, moved_bytes


class Config(Settings):
    build: BuildConfig = BuildConfig()


class Inputs(NamedTuple):
    models: Mapping[str, Path]
    """Precision -> ONNX file, all of one model."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write the plans, their `model.json` and `build.json` into `out`. Raises the errors of `build`."""
    plans = build(config.build, models=inputs.models, out=out, log=log)
    write_json(out / "build.json", [plan.to_json() for plan in plans])
    return {"plans": sum(plan.artifact is not None for plan in plans)}


def by_precision(models: Sequence[Path]) -> Inputs:
    """ONNX files by the precision that their cards name.

    Raises UsageError when plans are not built from a precision or two files have the same one, InputError when
    edgestill did not write a file or they are of two models.
    """
    found: dict[str, Path] = {}
    for model in models:
        card = card_of(model)
        if found and sha256(model) not in map(sha256, found.values()):
            _require_one_model(model, next(iter(found.values())))
            if card.precision in found:
                raise UsageError(
                    f"{found[card.precision]} and {model} are both {card.precision} of one model", "Give one of them"
                )
        found[card.precision] = model
    if odd := found.keys() - set(PLAN_PRECISIONS):
        raise UsageError(
            f"{min(odd)} is no precision that TensorRT plans are built from", f"Known: {', '.join(PLAN_PRECISIONS)}"
        )
    return Inputs(found)


def require_open_batches(inputs: Inputs) -> None:
    """Raises UsageError when one of the files has a fixed batch."""
    for model in inputs.models.values():
        require_open_batch(model, card_of(model))


@dataclass(frozen=True)
class EnginePlan:
    """The plan of one precision and the seconds that it took. `skipped` says why there is none."""

    precision: str
    artifact: Artifact | None
    seconds: float
    skipped: str = ""
    layers: tuple[EngineLayer, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "file": self.artifact.file if self.artifact else None,
            "sha256": self.artifact.sha256 if self.artifact else None,
            "bytes": self.artifact.bytes if self.artifact else None,
            "targets": list(self.artifact.targets) if self.artifact else [],
            "batches": list(self.artifact.batches) if self.artifact else [],
            "versions": dict(self.artifact.versions) if self.artifact else {},
            "seconds": self.seconds,
            "moved_bytes": moved_bytes(self.layers) if self.layers else None,
            "skipped": self.skipped,
        }


def build(
    config: BuildConfig,
    *,
    models: Mapping[str, Path],
    out: Path,
    log: Log = print,
) -> tuple[EnginePlan, ...]:
    """Build a plan for each precision of `config` that `models` has, into the folder `out`; `model.json` lists them.

    What the `model.json` in `out` lists already stays, after the plans. Where backend is "auto" and no TensorRT is
    installed, each plan is skipped with the reason. Raises `UnavailableError` when a named backend is missing,
    `EngineError` when TensorRT logs any error, `InputError` when a model is not one that edgestill wrote or they are
    of several models, and `OccupiedError` when `out` holds another model.
    """
    first = next(iter(models.values()))
    for precision, model in models.items():
        _check(model, precision, first)
    card = folder_card(out, first)
    wanted = [precision for precision in PLAN_PRECISIONS if precision in config.precisions and precision in models]
    if config.backend == "none":
        plans = [EnginePlan(precision, None, 0.0, "skipped: the backend is none") for precision in wanted]
    else:
        plans = [_plan(config, models[precision], out, card.name) for precision in wanted]
    slower = list_plans(out, first, [plan.artifact for plan in plans if plan.artifact], _preference)
    plans = [_without_slower(plan, slower) for plan in plans]
    for plan in plans:
        log(describe(plan))
    for file in sorted(slower.keys() - {plan_name(card.name, precision) for precision in wanted}):
        log(f"{file}, of an earlier build, is removed: {slower[file]}")
    return tuple(plans)


def _without_slower(plan: EnginePlan, slower: Mapping[str, str]) -> EnginePlan:
    if plan.artifact is None or plan.artifact.file not in slower:
        return plan
    return replace(plan, artifact=None, layers=(), skipped=f"left out: {slower[plan.artifact.file]}")


def plan_name(model: str, precision: str) -> str:
    return f"{model}.{precision}.plan"


def _preference(artifact: Artifact) -> int:
    """Plans before portable files, best precision first."""
    is_plan = not BACKENDS[artifact.backend].portable and artifact.precision in PLAN_PRECISIONS
    return PLAN_PRECISIONS.index(artifact.precision) if is_plan else len(PLAN_PRECISIONS)


def describe(plan: EnginePlan) -> str:
    if plan.artifact is None:
        return f"{plan.precision}: {plan.skipped}"
    made = plan.artifact
    targets = ", ".join(made.targets) or "this GPU"
    batches = "" if made.batches == ONE_IMAGE else f", batch {made.batches}"
    moved = f", moves {moved_bytes(plan.layers) / 1e6:.1f} MB a call" if plan.layers else ""
    size = f"{made.bytes / 1e6:.1f} MB"
    return f"{plan.precision}: {made.file}, {size} for {targets}{batches}{moved}, {plan.seconds:.1f} s"


def _plan(config: BuildConfig, model: Path, out: Path, name: str) -> EnginePlan:
    """The plan of one file; `name` is that of the model in the card of `out`."""
    card = card_of(model)
    precision, target = card.precision, out / plan_name(name, card.precision)
    try:
        builder = resolve_backend(config.backend)
        if _is_int8(precision) and builder in NO_INT8:
            return EnginePlan(precision, None, 0.0, f"skipped: {NO_INT8[builder]}")
        built = build_engine(
            model,
            target,
            backend=config.backend,
            targets=config.targets,
            workspace_mib=config.workspace_mib,
            shapes=profile_of(card, config.batches),
        )
    except UnavailableError as error:
        if config.backend != "auto":
            raise
        return EnginePlan(precision, None, 0.0, f"skipped: {error}")
    return EnginePlan(precision, built.artifact(target.name, card), built.seconds, layers=built.layers)


def _is_int8(precision: str) -> bool:
    return precision in FLAVOURS and FLAVOURS[precision].scheme is not None


def _check(model: Path, precision: str, first: Path) -> None:
    """Raises `InputError` when the card inside the file is not of this precision, or of another model than `first`."""
    found = card_of(model)
    if found.precision != precision:
        raise InputError(
            f"{model.name} has precision {found.precision!r}, expected {precision!r}", "Export and quantise again"
        )
    if model != first:
        _require_one_model(model, first)


def _require_one_model(model: Path, first: Path) -> None:
    require_same((card_of(model), model), (card_of(first), first), "Build each model into its own folder with --out")


STAGE = Stage(
    "build",
    settings=Config,
    inputs=lambda _, folders: Inputs(kept_files(folders)),
    run=run,
    after=("export", "quantize", "qad"),
    facts={"tensorrt": lambda: packages("tensorrt", "tensorrt_rtx")},
    version=3,
)
