"""The stages of a run, one file each. A `Stage` names its settings and inputs; its command calls the same `run`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from compress.config import Recipe, Settings, result_settings
from compress.log import Log
from compress.store import Folders, Task
from runtime.errors import InputError
from runtime.files import sha256
from runtime.machine import facts

C = TypeVar("C", bound=Settings)
I = TypeVar("I")  # noqa: E741  the type of a stage's inputs

Figures = Mapping[str, Any]


@dataclass(frozen=True)
class Stage(Generic[C, I]):
    """One step of the pipeline.

    `run(config, inputs, out, log)` writes only into the folder `out`, and returns the figures that its
    manifest keeps. `inputs(recipe, folders)` finds what it works on in a run; a command gives the same type by hand.
    """

    name: str
    settings: type[C]
    """Settings that the stage reads: a group whose fields are keys of the recipe."""
    inputs: Callable[[Recipe, Folders], I]
    run: Callable[[C, I, Path, Log], Figures]
    after: tuple[str, ...] = ()
    """Earlier stages whose folders the stage reads."""
    digests: Mapping[str, Callable[[Recipe], str]] = field(default_factory=dict)
    """Digests of files of the user, by name."""
    beside: Mapping[str, Callable[[Recipe, Path], Path | None]] = field(default_factory=dict)
    """Files outside the run that the stage reads where they are there, by name; found by the run's folder."""
    facts: Mapping[str, Callable[[], str]] = field(default_factory=dict)
    """Facts of the machine that change the result, by name."""
    check: Callable[[C], None] = lambda _: None
    """Judges the settings before any stage runs, beyond what their types say. Raises UsageError."""
    version: int = 1

    def task(self, recipe: Recipe, run_folder: Path) -> Task:
        """The stage in the run of `recipe` in the folder `run_folder`, its settings checked."""
        config, folders = recipe.part(self.settings), {name: run_folder / name for name in self.after}
        self.check(config)
        return Task(
            self.name,
            lambda out, log: self.run(config, self.inputs(recipe, folders), out, log),
            result_settings(config),
            folders,
            {name: digest(recipe) for name, digest in self.digests.items()}
            | {name: sha256(file) for name, find in self.beside.items() if (file := find(recipe, run_folder))},
            {name: fact() for name, fact in self.facts.items()},
            self.version,
        )


def weights_digest(file: Path | None) -> str:
    """sha256 of a checkpoint that a recipe names. Raises InputError when there is no such file."""
    if file is None:
        return "none"
    if not file.is_file():
        raise InputError(f"{file}: no such checkpoint", "Correct the weights in the recipe")
    return sha256(file)


def packages(*names: str) -> str:
    """Versions of the named packages: with a new TensorRT the engines are built again, and nothing is trained."""
    return " ".join(f"{name} {facts()['packages'].get(name, 'absent')}" for name in names)


def cpu_and_runtime() -> str:
    """The CPU, the GPUs and the versions of ONNX Runtime and OpenVINO, on which a measurement depends."""
    return " ".join([facts()["cpu"], str(facts()["gpus"]), packages("onnxruntime", "openvino")])
