"""Options that several commands share, with the names YOLOv5 users know, and what every command does with them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from pkgutil import resolve_name
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import click

from compress.processes import is_first_process
from runtime.errors import InputError
from runtime.files import unwritable
from runtime.terminal import print_json


class PathType(click.Path):
    """A path. An empty one, as an unset variable of a shell leaves, would be the folder that the user is in."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "":
            self.fail("a path is empty", param, ctx)
        return super().convert(value, param, ctx)


FILE = PathType(path_type=Path)
GIVEN = "edgestill.settings"
"""Where a command's context keeps the settings that its options gave: dotted key of the recipe -> value."""


def is_given(ctx: click.Context, name: str) -> bool:
    """Whether the command line says the option, so that its value is not the default."""
    return ctx.get_parameter_source(name) != click.core.ParameterSource.DEFAULT


class FieldType(click.ParamType):
    """The type of the field `key` of a group of `compress.config`, by whose rule a value is accepted.

    The field is looked up when it is needed: the command line itself starts without pydantic, which a device need not
    have.
    """

    name = "setting"

    def __init__(self, key: str, group: str) -> None:
        self._key, self._group = key, group

    @property
    def field(self) -> Any:
        model, *keys = resolve_name(f"compress.config:{self._group}"), *self._key.split(".")
        for key in keys[:-1]:
            model = model.model_fields[key].annotation
        return model.model_fields[keys[-1]]

    @property
    def kind(self) -> Any:
        """The field's type without its rules and without None."""
        kind = self.field.annotation
        some = [one for one in get_args(kind) if one is not NoneType]
        kind = some[0] if NoneType in get_args(kind) and len(some) == 1 else kind
        return get_args(kind)[0] if get_origin(kind) is Annotated else kind

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from pydantic import TypeAdapter, ValidationError

        from compress.recipe import not_accepted

        rule: Any = Annotated[(self.field.annotation, self.field)]
        try:
            return TypeAdapter(rule).validate_python(value)
        except ValidationError as error:
            self.fail(not_accepted(error.errors()[0]), param, ctx)

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str:
        kind = self.kind
        choices = get_args(kind) if get_origin(kind) is Literal else ()
        return f"[{'|'.join(choices)}]" if choices else getattr(kind, "__name__", "text").upper()


class Setting(click.Option):
    """An option for one field of `compress.config`: its type and default are the field's.

    It reaches the command through `settings()`; with `expose_value` as an ordinary argument.
    """

    def __init__(
        self, *names: Any, key: str, group: str = "Recipe", expose_value: bool = False, **attributes: Any
    ) -> None:
        self.key, self._field_type = key, FieldType(key, group)
        attributes.setdefault("type", self._field_type)
        super().__init__(*names, expose_value=expose_value, callback=self._keep, **attributes)

    def _keep(self, ctx: click.Context, _: click.Parameter, value: Any) -> Any:
        if not self.expose_value and is_given(ctx, str(self.name)):
            ctx.meta.setdefault(GIVEN, {})[self.key] = value
        return value

    def get_default(self, ctx: click.Context, call: bool = True) -> Any:
        return self._field_type.field.default


class NameIn(click.ParamType):
    """One of the names in a table, which is opened when a name is checked or shown."""

    name = "name"

    def __init__(self, table: str) -> None:
        self.table = table

    @property
    def choice(self) -> click.Choice[str]:
        return click.Choice(tuple(resolve_name(self.table)))

    def get_metavar(self, param: click.Parameter, ctx: click.Context) -> str | None:
        return self.choice.get_metavar(param, ctx)

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        return self.choice.convert(value, param, ctx)


SCALE = NameIn("compress.config:SCALES")
ACTIVATION = NameIn("compress.config:STUDENT_ACTIVATIONS")


def setting(*names: str, key: str, **attributes: Any) -> Callable[[Any], Any]:
    return click.option(*names, cls=Setting, key=key, **attributes)


def flag(*names: str, key: str, **attributes: Any) -> Callable[[Any], Any]:
    """`setting` of a field that is on or off."""
    return setting(*names, key=key, is_flag=True, type=click.BOOL, **attributes)


data = click.option("--data", type=FILE, required=True, help="data.yaml: path, train, val, names.")
device = click.option("--device", default="auto", help="auto, cpu, or a GPU number.")
backend = click.option(
    "--backend",
    default="auto",
    help="Library that runs a file: auto, onnx, openvino, tensorrt, ...; auto takes the one that it is made for.",
)
changes = click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    expose_value=False,
    callback=lambda ctx, _, value: ctx.meta.__setitem__("edgestill.changes", value),
    help="Change one setting, by its key in the recipe; repeatable.",
)
as_json = click.option("--json", "as_json", is_flag=True, help="Print one JSON document.")


IMGSZ_OPTIONS = ("--imgsz", "--img", "--img-size")


class SizedCommand(click.Command):
    """A command whose `--imgsz` takes one number or two, as YOLOv5's does: `--imgsz 384 640`; so does `--frame`."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        return super().parse_args(ctx, joined_sides(args))


def joined_sides(args: Sequence[str]) -> list[str]:
    """The arguments with the two numbers behind such an option as one, "384x640"."""
    joined: list[str] = []
    for arg in args:
        option, equals, value = joined[-1].partition("=") if joined else ("", "", "")
        option, value = (option, value) if equals else (joined[-2] if len(joined) > 1 else "", option)
        if option in (*IMGSZ_OPTIONS, "--frame") and value.isdecimal() and arg.isdecimal():
            joined[-1] += f"x{arg}"
        else:
            joined.append(arg)
    return joined


def imgsz(key: str = "imgsz", **attributes: Any) -> Callable[[Any], Any]:
    return setting(
        *IMGSZ_OPTIONS, key=key, help="Image side in pixels, a multiple of the largest stride.",
        **attributes,
    )  # fmt: skip


def settings(group: type[Any], own: str, more: Mapping[str, Any] | None = None) -> Any:
    """The settings `group`: `more`, over it the command's options, over these every --set.

    A --set may leave out `own`, the part of the recipe that the command is about.
    """
    from compress.recipe import parse, with_change, with_value

    meta = click.get_current_context().meta
    raw: dict[str, Any] = {}
    for key, value in {**(more or {}), **meta.get(GIVEN, {})}.items():
        raw = with_value(raw, key, value)
    for change in given_changes():
        full = change.partition("=")[0].partition(".")[0] in group.model_fields
        raw = with_change(raw, change if full else f"{own}.{change}")
    return parse(group, raw, f"edgestill {click.get_current_context().info_name}")


def given_settings() -> tuple[str, ...]:
    """The settings that options gave to the running command, in the form of --set."""
    return tuple(f"{key}={value}" for key, value in click.get_current_context().meta.get(GIVEN, {}).items())


def setting_is_given(key: str) -> bool:
    """Whether an option or a --set of the running command gave the setting."""
    written = {change.partition("=")[0].strip() for change in (*given_settings(), *given_changes())}
    return not written.isdisjoint((key, key.partition(".")[2]))


def given_changes() -> tuple[str, ...]:
    """The --set changes of the running command."""
    return tuple(click.get_current_context().meta["edgestill.changes"])


def run_alone(stage: Any, inputs: Callable[[], Any], out: Path, more: Mapping[str, Any] | None = None) -> None:
    """Run one stage as a run does, into the folder `out`; `inputs` is called once the settings are accepted."""
    config = settings(stage.settings, stage.name, more)
    if out.exists() and not out.is_dir():  # found out after the work otherwise
        raise unwritable(out, NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR)))
    stage.run(config, inputs(), out, say)


def indexed(data: Path, *splits: str, labelled: Collection[str] | None = None) -> Any:
    """The data set of data.yaml, its `splits` indexed (train and val, where none is named).

    Raises InputError when a split of `labelled` (all, where None) has no label.
    """
    from compress.data import index_dataset, load_data
    from compress.data.index import USED

    return index_dataset(load_data(data), splits or USED, labelled=labelled)


def run_folder(project: Path, name: str, *, exist_ok: bool, resume: bool = False) -> Path:
    """`project/name`, or the first free of name2, name3, ...; on resume the newest that exists.

    Raises InputError when there is nothing to resume.
    """
    folders = numbered(project / name)
    if exist_ok:
        return folders[0]
    free = next(i for i, folder in enumerate(folders) if not folder.exists())
    if not resume:
        return folders[free]
    if free == 0:
        raise InputError(f"nothing to resume: {folders[0]} does not exist", "Start without --resume")
    return folders[free - 1]


def numbered(folder: Path) -> list[Path]:
    """`folder`, `folder2`, `folder3`, ... as YOLOv5 numbers its runs."""
    return [folder, *(folder.with_name(f"{folder.name}{i}") for i in range(2, 10_000))]


def resumed_folder(path: Path) -> Path:
    """The folder of a run, from itself or one of its files. Raises InputError when there is no such path."""
    if path.is_dir():
        return path
    if path.is_file():
        return path.parent
    raise InputError(f"--resume {path}: no such run", "Give the folder of a run, its state.pt or its last.safetensors")


def say(line: str) -> None:
    """Progress goes to standard error, so that standard output holds results only; one of several processes says it."""
    if is_first_process():
        click.echo(line, err=True)


def show(document: Any, text: object, as_json: bool) -> None:
    """Print a result as JSON or as text."""
    if as_json:
        print_json(document, indent=2)
    else:
        click.echo(text)
