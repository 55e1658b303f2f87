"""Every number that a user can say is checked before anything is opened: exit code 2 and one line."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest
from pydantic import BaseModel

from benchmarks.__main__ import parser as bench_parser
from compress.cli import cli, main
from compress.cli.options import FieldType
from compress.config import Recipe
from compress.data import Dataset
from compress.losses.distill import LOSSES
from runtime.__main__ import main as runtime_main
from runtime.__main__ import parser as runtime_parser
from runtime.arguments import path as path_type

NEVER = ("nan", "inf", "-inf", "-1", "1e999", "9" * 5000, "many", "true")
"""No number of the recipe or of a command is one of these."""
NOT_WHOLE = ("0.5", "1e3", "9" * 30)


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    assert len(lines[0]) < 400
    return lines[0]


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2, arguments
    return one_line(capsys)


# -- the recipe -----------------------------------------------------------------------------------


def numbers(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, type]]:
    """Dotted key and kind of each number in a recipe, those of the groups within groups too."""
    for name, field in model.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            yield from numbers(kind, f"{prefix}{name}.")
        elif kind in (int, float):
            yield prefix + name, kind


FIELDS = dict(numbers(Recipe))
LOSS_SETTINGS = [
    f"distill.losses.{loss}.{key}" for loss, made in LOSSES.items() for key in ("weight", *made.Settings.model_fields)
    if key == "weight" or made.Settings.model_fields[key].annotation in (int, float)
]  # fmt: skip


@pytest.fixture
def recipe(tiny_data: Dataset, tmp_path: Path) -> Path:
    file = tmp_path / "job.yaml"
    file.write_text(f"data: {tiny_data.path}\n")
    return file


def test_the_walk_finds_numbers_at_every_depth() -> None:
    assert {"imgsz", "seed", "export.iou", "distill.optimizer.lr0", "teacher.augment.mosaic"} <= FIELDS.keys()
    assert len(FIELDS) > 90
    assert {"distill.losses.kd.temperature", "distill.losses.cwd.weight"} <= set(LOSS_SETTINGS)


@pytest.mark.parametrize("key", [*FIELDS, *LOSS_SETTINGS])
def test_a_number_of_a_recipe_is_within_its_field(key: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wrong = NEVER + (NOT_WHOLE if FIELDS.get(key) is int else ())
    group, _, name = key.rpartition(".")
    known = ["--set", f"{group}.weight=1"] if key in LOSS_SETTINGS else []
    for value in (".nan", ".inf", "-.inf", *wrong):
        assert name in refusal(["run", str(recipe), *known, "--set", f"{key}={value}"], capsys)


@pytest.mark.parametrize("frame", ["[0, 640]", "[640, -1]", "[.nan, 640]", "[true, 640]", "[640]", f"[{'9' * 30}, 1]"])
def test_a_frame_has_two_sides_in_pixels(frame: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "frame" in refusal(["run", str(recipe), "--set", f"export.frame={frame}"], capsys)


@pytest.mark.parametrize("shape", ["[384, 640, 3]", "[0, 640]", "[.nan, 640]", "384x", "[true, 640]", "true"])
def test_a_shape_of_a_recipe_has_one_or_two_sides(shape: str, recipe: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "export.imgsz" in refusal(["run", str(recipe), "--set", f"export.imgsz={shape}"], capsys)


def test_a_shape_that_no_network_takes_is_refused_before_the_first_stage(
    recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["run", str(recipe), "--set", "export.imgsz=[384, 650]"], capsys)
    assert "image size 384x650 is not a multiple of the network's stride 32. Use 384x672" in line
    assert not (recipe.parent / "runs").exists()


@pytest.mark.parametrize("size", [1, 31, 300, 321])
def test_an_image_size_that_no_network_takes_is_refused_before_the_first_stage(
    size: int, recipe: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = refusal(["run", str(recipe), "--set", f"imgsz={size}"], capsys)
    assert f"image size {size} is not a multiple of the network's stride 32" in line
    assert not (recipe.parent / "runs").exists()


# -- the options of every command -----------------------------------------------------------------


def commands(group: click.Group, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    ctx = click.Context(group)
    for name in group.list_commands(ctx):
        command = group.get_command(ctx, name)
        assert command is not None
        if isinstance(command, click.Group):
            yield from commands(command, (*path, name))
        else:
            yield (*path, name), command


def kind_of(option: click.Parameter) -> Any:
    """int or float where the option takes a number."""
    if isinstance(option.type, (click.types.IntParamType, click.types.FloatParamType)):
        return int if isinstance(option.type, click.types.IntParamType) else float
    return option.type.kind if isinstance(option.type, FieldType) else None


OPTIONS = [
    (path, option.opts[0], kind_of(option))
    for path, command in commands(cli)
    for option in command.params
    if isinstance(option, click.Option) and kind_of(option) in (int, float)
]


def test_the_commands_have_these_numbers() -> None:
    assert {(path[-1], name) for path, name, _ in OPTIONS} >= {
        ("train", "--seed"), ("distill", "--imgsz"), ("val", "--conf"), ("val", "--batch"), ("val", "--max-det"),
        ("init", "--imgsz"), ("export", "--batch-size"), ("export", "--opset"), ("make", "--images"),
        ("make", "--seed"), ("train", "--workers"), ("distill", "--teacher-imgsz"),
    }  # fmt: skip


@pytest.mark.parametrize(("path", "name", "kind"), OPTIONS, ids=lambda value: str(value))
def test_a_number_of_a_command_is_checked_before_a_file_is_opened(
    path: tuple[str, ...], name: str, kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in NEVER + (NOT_WHOLE if kind is int else ()):
        assert name in refusal([*path, f"{name}={value}"], capsys)


@pytest.mark.parametrize("frame", ["0x0", "-1x5", "nanxinf", "1.5x2", f"{'9' * 30}x1", f"{'9' * 5000}x1", "640", ""])
def test_a_frame_of_the_command_line_has_two_sides(frame: str, capsys: pytest.CaptureFixture[str]) -> None:
    if frame:
        assert "frame" in refusal(["export", "--weights", "none.pt", f"--frame={frame}"], capsys)


@pytest.mark.parametrize("rule", ["map50_95<nan", "map50_95<inf", "map50_95<1e999", "map50_95<", "map50_95<--1"])
def test_a_threshold_is_a_number(rule: str) -> None:
    from benchmarks.compare import parse_rule
    from runtime.errors import UsageError

    with pytest.raises(UsageError, match="is not a rule"):
        parse_rule(rule)


@pytest.mark.parametrize("device", ["cuda:" + "9" * 30, "9" * 30, "-1", "cuda:-1", "²", "nan", "cpu:0"])
def test_a_device_number_is_one(device: str) -> None:
    from compress.compute.device import pick_device
    from runtime.errors import UsageError

    with pytest.raises(UsageError, match="is not known"):
        pick_device(device)


# -- the commands of the device -------------------------------------------------------------------


def device_numbers(parser: argparse.ArgumentParser) -> Iterator[tuple[list[str], str, Any]]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, command in action.choices.items():
                yield from ([[name, *path], option, read] for path, option, read in device_numbers(command))
        elif action.type not in (None, path_type):
            yield [], action.option_strings[0], action.type


DEVICE_OPTIONS = list(device_numbers(runtime_parser()))


def test_the_device_has_these_numbers() -> None:
    assert {name for _, name, _ in DEVICE_OPTIONS} >= {
        "--conf", "--threads", "--stride", "--reconnect", "--workspace", "--dla-core",
    }  # fmt: skip


@pytest.mark.parametrize(("path", "name", "read"), DEVICE_OPTIONS, ids=lambda value: str(value)[:20])
def test_a_number_of_the_device_is_one_line(
    path: list[str], name: str, read: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in NEVER:
        assert runtime_main([*path, "source", f"{name}={value}"]) == 2
        assert name in one_line(capsys)
        if path == ["detect"]:
            assert name in refusal([*path, "source", "--model", "none.onnx", f"{name}={value}"], capsys)


@pytest.mark.parametrize(("_", "name", "read"), list(device_numbers(bench_parser())), ids=lambda value: str(value)[:20])
def test_a_number_of_a_measurement_is_within_its_range(_: object, name: str, read: Any) -> None:
    for value in NEVER:
        with pytest.raises(argparse.ArgumentTypeError, match="is not a"):
            read(value)
