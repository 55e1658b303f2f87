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
from compress.flavours import PLAN_PRECISIONS
from compress.graph.metadata import read_card
from compress.graph.untrusted_onnx import read_model
from compress.inputs import kept_files
from compress.log import Log
from compress.stages import Figures, Stage, packages
from runtime.bundle import card_of
from runtime.card import CARD_FILE, Artifact, ModelCard
from runtime.engine import build_engine
from runtime.errors import InputError, UnavailableError, UsageError
from runtime.files import write_json


class Config(Settings):
    build: BuildConfig = BuildConfig()


class Inputs(NamedTuple):
    models: Mapping[str, Path]
    """Precision -> ONNX file; the first one has the card that all of them share."""


def run(config: Config, inputs: Inputs, out: Path, log: Log) -> Figures:
    """Write the plans, their `model.json` and `build.json` into `out`. Raises the errors of `build`."""
    card = card_of(next(iter(inputs.models.values())))
    plans = build(config.build, models=inputs.models, out=out, card=card, log=log)
    write_json(out / "build.json", [plan.to_json() for plan in plans])
    return {"plans": sum(plan.artifact is not None for plan in plans)}


def by_precision(models: Sequence[Path]) -> Inputs:
    """ONNX files by the precision that their cards name.

    Raises UsageError when plans are not built from a precision, InputError when edgestill did not write a file.
    """
    found = {card_of(model).precision: model for model in models}
    if odd := found.keys() - set(PLAN_PRECISIONS):
        raise UsageError(
            f"{min(odd)} is no precision that TensorRT plans are built from", f"Known: {', '.join(PLAN_PRECISIONS)}"
        )
    return Inputs(found)


@dataclass(frozen=True)
class EnginePlan:
    """The plan of one precision and the seconds that it took. `skipped` says why there is none."""

    precision: str
    artifact: Artifact | None
    seconds: float
    skipped: str = ""

    def to_json(self) -> dict[str, Any]:
        return {
            "precision": self.precision,
            "file": self.artifact.file if self.artifact else None,
            "sha256": self.artifact.sha256 if self.artifact else None,
            "bytes": self.artifact.bytes if self.artifact else None,
            "targets": list(self.artifact.targets) if self.artifact else [],
            "versions": dict(self.artifact.versions) if self.artifact else {},
            "seconds": self.seconds,
            "skipped": self.skipped,
        }


def build(
    config: BuildConfig,
    *,
    models: Mapping[str, Path],
    out: Path,
    card: ModelCard,
    log: Log = print,
) -> tuple[EnginePlan, ...]:
    """Build a plan for each precision of `config` that `models` has, into the folder `out`, and write `model.json`.

    The artifacts of `card` stay, after the new plans. Where backend is "auto" and no TensorRT is installed, each plan
    is skipped with the reason. Raises `UnavailableError` when a named backend is missing, `EngineError` when TensorRT
    logs any error, and `InputError` when a model is not one that edgestill wrote.
    """
    wanted = [precision for precision in PLAN_PRECISIONS if precision in config.precisions and precision in models]
    if config.backend == "none":
        plans = [EnginePlan(precision, None, 0.0, "skipped: the backend is none") for precision in wanted]
    else:
        plans = [_plan(config, precision, models[precision], card, out) for precision in wanted]
    for plan in plans:
        log(describe(plan))
    artifacts = (*(plan.artifact for plan in plans if plan.artifact), *card.artifacts)
    replace(card, artifacts=artifacts).save(out / CARD_FILE)
    return tuple(plans)


def describe(plan: EnginePlan) -> str:
    if plan.artifact is None:
        return f"{plan.precision}: {plan.skipped}"
    made = plan.artifact
    targets = ", ".join(made.targets) or "this GPU"
    return f"{plan.precision}: {made.file}, {made.bytes / 1e6:.1f} MB for {targets}, {plan.seconds:.1f} s"


def _plan(config: BuildConfig, precision: str, model: Path, card: ModelCard, out: Path) -> EnginePlan:
    _check(model, precision, card)
    target = out / f"{card.name}.{precision}.plan"
    out.mkdir(parents=True, exist_ok=True)
    try:
        built = build_engine(
            model,
            target,
            backend=config.backend,
            targets=config.targets,
            workspace_mib=config.workspace_mib,
        )
    except UnavailableError as error:
        if config.backend != "auto":
            raise
        return EnginePlan(precision, None, 0.0, f"skipped: {error}")
    return EnginePlan(precision, built.artifact(target.name, precision), built.seconds)


def _check(model: Path, precision: str, card: ModelCard) -> None:
    """Raises `InputError` when the card inside the file is not that of this model in this precision."""
    found = read_card(read_model(model), model.name)
    same: Sequence[tuple[str, Any, Any]] = (
        ("precision", found.precision, precision),
        ("names", found.names, card.names),
        ("size_hw", found.size_hw, card.size_hw),
        ("input", found.input, card.input),
        ("output", found.output, card.output),
    )
    for key, value, expected in same:
        if value != expected:
            raise InputError(f"{model.name} has {key} {value!r}, expected {expected!r}", "Export and quantise again")


STAGE = Stage(
    "build",
    settings=Config,
    inputs=lambda _, folders: Inputs(kept_files(folders)),
    run=run,
    after=("export", "quantize"),
    facts={"tensorrt": lambda: packages("tensorrt", "tensorrt_rtx")},
)
