"""One training or validation alone: train, distill, val."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import click

from compress.cli.options import (
    ACTIVATION,
    FILE,
    GIVEN,
    SCALE,
    as_json,
    backend,
    changes,
    data,
    device,
    flag,
    given_changes,
    imgsz,
    indexed,
    is_given,
    resumed_folder,
    run_alone,
    run_folder,
    say,
    setting,
    settings,
    show,
)
from compress.flavours import FLAVOURS
from compress.processes import is_first_process
from runtime.errors import UsageError
from runtime.files import read_json


def training_options(stage: str, project: str) -> Callable[[Any], Any]:
    """The options that `train` and `distill` have in common; `stage` is the part of the recipe that they change."""
    options = [
        click.option("--data", type=FILE, help="data.yaml: path, train, val, names; needed unless a run is resumed."),
        click.option("--weights", type=FILE, help="Checkpoint to start from, of this size or a larger one."),
        click.option("--scale", "--cfg", type=SCALE, help="Size of the network; default that of --weights."),
        setting("--init", key="student.init", help="Start from slices of a larger network, or from scratch."),
        setting(
            "--activation",
            key="student.activation",
            type=ACTIVATION,
            help="Default that of --weights or of the teacher.",
        ),
        setting("--epochs", key=f"{stage}.epochs", help="Passes over the training images."),
        setting("--batch", "--batch-size", key=f"{stage}.batch", help="Images a batch."),
        imgsz(f"{stage}.imgsz"),
        device,
        setting(
            "--workers",
            key=f"{stage}.workers",
            help="Threads, on a GPU processes, that load data; default one, on a GPU one a core.",
        ),
        setting("--threads", key=f"{stage}.threads", help="Compute threads on a CPU; 0 measures how many are best."),
        setting("--precision", key=f"{stage}.precision", help="Arithmetic; auto: float16 on a GPU, float32 on a CPU."),
        flag("--compile", key=f"{stage}.compile", help="Run the networks through torch.compile."),
        flag("--cuda-graph", key=f"{stage}.cuda_graph", help="Launch forward and backward as one CUDA graph."),
        setting("--seed", key=f"{stage}.seed", help="Seed of every random number."),
        setting("--preset", key=f"{stage}.preset", help="Hyper-parameters to start from."),
        click.option(
            "--resume",
            is_flag=False,
            flag_value="",
            metavar="[PATH]",
            help="Continue a run exactly where it was, with its settings and files: PATH is its folder, state.pt or "
            "last.safetensors; without PATH the newest run of this name.",
        ),
        click.option("--project", type=FILE, default=Path(project), help="Folder of the runs."),
        click.option("--name", default="exp", help="Folder of this run; a number is added where it exists."),
        click.option("--exist-ok", is_flag=True, help="Write into an existing folder of this name."),
        changes,
    ]

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _out(project: Path, name: str, exist_ok: bool, resume: str | None) -> Path:
    if resume:
        return resumed_folder(Path(resume))
    return run_folder(project, name, exist_ok=exist_ok, resume=resume is not None)


class Begun(NamedTuple):
    """The settings and files that a resumed run began with; those of the command line go before them."""

    config: Mapping[str, Any] = {}
    origin: Mapping[str, Any] = {}

    def file(self, option: str, given: Path | None) -> Path:
        """The `given` file, else the run's own. Raises MissingParameter, which names the option, when there is none."""
        file = given or self.origin.get(option)
        if file is None:
            raise click.MissingParameter(param_hint=f"'--{option}'", param_type="option")
        return Path(file)

    @property
    def student(self) -> dict[str, Any]:
        """How the network of the run began, as settings; the state has the rest."""
        return {"student.init": self.origin["facts"]["init"]} if self.origin else {}

    def device(self, given: str) -> str:
        """The `given` device where the command line says it, else the run's own."""
        said = is_given(click.get_current_context(), "device")
        return given if said else self.origin.get("device", given)


def _begun(out: Path, resume: str | None) -> Begun:
    if resume is None:
        return Begun()
    from compress.training.state import STATE, load_state

    state = load_state(out / STATE)
    return Begun(state["config"], state["origin"])


@click.command()
@training_options("teacher", "runs/train")
def train(
    data: Path | None, weights: Path | None, scale: str | None, device: str, resume: str | None, **folder: Any
) -> None:
    """Train without a teacher."""
    from compress.stages.teacher import AloneConfig
    from compress.stages.teacher import train as run

    _refuse_without_effect(given_changes())
    out = _out(resume=resume, **folder)
    begun = _begun(out, resume)
    start = {"student.scale": scale, "student.weights": weights} | begun.student
    config, file = settings(AloneConfig, "teacher", {"teacher": begun.config} | start), begun.file("data", data)
    run(
        config.teacher, data=indexed(file), out=out, start=config.student, device=begun.device(device),
        resume=resume is not None, log=say,
    )  # fmt: skip
    _print_best(out)


def _refuse_without_effect(changes: Sequence[str]) -> None:
    """Raises UsageError for a setting of a run's teacher that this command has an option for, or no use."""
    for key in (change.partition("=")[0].removeprefix("teacher.") for change in changes):
        if key in ("weights", "scale", "finetune"):
            raise UsageError(f"--set {key} has no effect on `edgestill train`", "Give --weights or --scale")


@click.command()
@training_options("distill", "runs/distill")
@click.option(
    "--teacher",
    "teachers",
    type=FILE,
    multiple=True,
    help="Checkpoint or ONNX file of the teacher; needed unless a run is resumed. Several teach by their mean.",
)
@setting("--teacher-imgsz", key="distill.teacher_imgsz", help="Pixels of the teachers' images.")
@click.option("--check", is_flag=True, help="Make all checks, print them, and stop before the first epoch.")
@setting("--strategy", key="distill.strategy", help="Who learns from what; docs/distillation.md has a line for each.")
@click.option("--unlabelled", type=FILE, help="Folder of images or video to learn from without labels.")
@click.option(
    "--quantize",
    metavar="int8|FLAVOUR",
    help="Train --weights for INT8 files, its own float network being the teacher, beside those of --teacher.",
)
@click.option(
    "--loss",
    "losses",
    multiple=True,
    metavar="NAME[=WEIGHT]",
    help="Distillation loss, its weight by gradients or fixed; NAME.SETTING=VALUE for its settings; repeatable.",
)
def distill(
    data: Path | None,
    weights: Path | None,
    scale: str | None,
    device: str,
    resume: str | None,
    teachers: tuple[Path, ...],
    check: bool,
    unlabelled: Path | None,
    quantize: str | None,
    losses: tuple[str, ...],
    **folder: Any,
) -> None:
    """Train a student with a teacher."""
    if quantize is not None:
        if scale or check:
            raise UsageError(f"--{'scale' if scale else 'check'} has no effect with --quantize", "Leave it out")
        given: dict[str, Any] = {"device": device, "qad.unlabelled": unlabelled}
        given |= {"qad.losses": loss_choices(losses)} if losses else {}
        _distil_for_int8(quantize, data, weights, teachers, _out(resume=resume, **folder), given)
        return
    from compress.data.index import JUDGES
    from compress.stages.distill import STAGE, Inputs

    if check and resume is not None:
        raise UsageError("--check looks at a training that has not begun, --resume at one that has", "Give one of both")
    out = _out(resume=resume, **folder)
    begun = _begun(out, resume)
    more: dict[str, Any] = {"distill": begun.config, "device": begun.device(device)}
    more |= {"student.scale": scale, "student.weights": weights} | begun.student
    more["distill.unlabelled"] = unlabelled or begun.origin.get("unlabelled")
    if losses:
        more["distill.losses"] = loss_choices(losses)
    further = [str(file.resolve()) for file in teachers[1:]]
    more["distill.teachers"] = further if teachers else begun.origin.get("teachers", ())
    files = begun.file("data", data), begun.file("teacher", teachers[0] if teachers else None)
    if check:
        _print_checks(more, lambda: Inputs(indexed(files[0], labelled=JUDGES), files[1]))
        return
    run_alone(STAGE, lambda: Inputs(indexed(files[0], labelled=JUDGES), files[1], resume is not None), out, more)
    _print_best(out)


def _distil_for_int8(
    quantize: str, data: Path | None, weights: Path | None, teachers: Sequence[Path], out: Path, more: Mapping[str, Any]
) -> None:
    """Export the network of `weights` and train it for INT8 files, into `out`; a training that is begun there goes on.

    Raises UsageError when `quantize` names no INT8 flavour, or an option is about another network's start.
    """
    from compress.data.index import JUDGES
    from compress.inputs import QAD, SHIPPED, validation_of
    from compress.stages import export, qad

    more = {**more, **_settings_for_int8(), "quantize.flavours": _int8_flavours(quantize)}
    config = settings(qad.AloneConfig, "qad", more)
    qad.check(config)
    student, images = Begun().file("weights", weights), indexed(Begun().file("data", data), labelled=JUDGES)
    exported = export.Config(export=config.export, imgsz=config.imgsz)
    export.run(exported, export.Inputs(student, validation_of(images)), out, say)
    qad.run(config, qad.Inputs(out / SHIPPED, student, images, teachers), out, say)
    for entry in read_json(out / QAD):
        if entry["kept"]:
            click.echo(out / entry["file"])


def _settings_for_int8() -> dict[str, Any]:
    """The settings that options gave, in the part of the recipe that `--quantize` is about; they are taken away."""
    found: dict[str, Any] = {}
    for key, value in click.get_current_context().meta.pop(GIVEN, {}).items():
        part, _, name = key.partition(".")
        if part != "distill":
            raise UsageError(f"--{name} has no effect with --quantize", "The network is that of --weights")
        found |= {f"qad.{name}": value} | ({"imgsz": value} if name == "imgsz" else {})
    return found


def _int8_flavours(text: str) -> list[str]:
    """Names of flavours, apart by commas; `int8` is all of them."""
    known = [name for name, flavour in FLAVOURS.items() if flavour.scheme]
    names = known if text == "int8" else text.split(",")
    if odd := [name for name in names if name not in known]:
        raise UsageError(f"--quantize {odd[0]!r}: no INT8 flavour", f"Known: int8 for all, {', '.join(known)}")
    return names


def _print_checks(more: Mapping[str, Any], inputs: Callable[[], Any]) -> None:
    from compress.stages.distill import STAGE, all_checks

    checks = all_checks(settings(STAGE.settings, STAGE.name, more), inputs(), say)
    if not checks:
        click.echo("nothing to check: without distillation losses the labels alone train the student")
    width = max((len(one.name) for one in checks), default=0)
    for one in checks:
        click.echo(f"{'warning' if one.warns else 'ok':<8}{one.name:<{width}}  {one.detail}")


def loss_choices(given: Sequence[str]) -> dict[str, Any]:
    """("soft", "kd=auto", "cwd=0.2", "cwd.tau=2") as the `losses` of a recipe.

    A loss that is named again keeps its settings; the last of its weights counts. Raises UsageError for another form.
    """
    from compress.config import AUTO
    from compress.recipe import with_change, with_value

    raw: dict[str, Any] = {}
    for text in given:
        key, equals, value = text.partition("=")
        if "." in key and not equals:
            raise UsageError(f"--loss {text!r}: expected NAME, NAME=WEIGHT or NAME.SETTING=VALUE", f"Write {key}=VALUE")
        if "." in key:
            raw = with_change(raw, text)
        elif value in ("", AUTO):
            raw = with_value(raw, f"{key}.weight", None)
        else:
            raw = with_change(raw, f"{key}.weight={value}")
    return raw


def _print_best(out: Path) -> None:
    if is_first_process():
        click.echo(out / "best.safetensors")


@click.command()
@data
@click.option("--weights", type=FILE, required=True, help=".pt or .safetensors, or an .onnx, engine or bundle.")
@click.option("--split", type=click.Choice(["train", "val", "test"]), default="val", help="Images to measure on.")
@imgsz(expose_value=True)
@setting("--batch", "--batch-size", key="batch", group="ValConfig", expose_value=True, help="Images a batch.")
@click.option("--rect/--square", default=False, help="Rectangular batches, as YOLOv5 validates.")
@setting("--conf", "--conf-thres", key="bench.accuracy_conf", expose_value=True, help="Least score.")
@setting("--iou", "--iou-thres", key="export.iou", expose_value=True, help="IoU threshold of NMS.")
@setting("--max-det", key="export.max_det", expose_value=True, help="Most boxes of an image.")
@click.option("--single-label", is_flag=True, help="One class a box, as the shipped graph has it.")
@click.option("--annotations", type=FILE, help="COCO JSON for the COCO figures, in place of the text labels.")
@click.option("--half", is_flag=True, help="float16 network; GPU only.")
@click.option("--device", default="auto", help="auto, cpu, or a GPU number; of other files auto, cpu, cuda, tensorrt.")
@backend
@as_json
def val(as_json: bool, **options: Any) -> None:
    """Measure mAP by YOLOv5's protocol and by COCO's."""
    from compress.validate_file import OF_CHECKPOINTS, is_checkpoint, validate_file

    weights = options["weights"]
    given = [key for key in OF_CHECKPOINTS if is_given(click.get_current_context(), key)]
    if given and not is_checkpoint(weights):
        option = f"--{given[0].replace('_', '-')}"
        raise UsageError(f"{option} has no effect on {weights.name}, which runs as on the device", "Leave it out")
    result = validate_file(**options)
    show(result.to_json(), result.to_text(), as_json)
