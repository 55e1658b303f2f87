"""Options of every command: defaults in the help, settings by flag and by --set."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

from compress.cli import COMMANDS, cli, main
from compress.cli.options import GIVEN, settings
from compress.config import DistillConfig, Recipe
from compress.stages.quantize import Config
from runtime.errors import UsageError


def quantize_settings(*changes: str, **given: object) -> Any:
    """The settings of `edgestill quantize` with these --set changes and flags."""
    with click.Context(click.Command("quantize"), info_name="quantize") as ctx:
        ctx.meta["edgestill.changes"] = changes
        ctx.meta[GIVEN] = {key.replace("__", "."): value for key, value in given.items()}
        return settings(Config, "quantize")


@pytest.mark.parametrize("change", ["calibration_images=3", "quantize.calibration_images=3"])
def test_set_takes_a_setting_with_or_without_its_part_of_the_recipe(change: str) -> None:
    assert quantize_settings(change).quantize.calibration_images == 3


def test_set_reaches_the_other_settings_that_a_stage_reads() -> None:
    assert quantize_settings("bench.latency_samples=11").bench.latency_samples == 11


def test_set_wins_over_a_flag() -> None:
    found = quantize_settings("method=mse", quantize__method="minmax", quantize__calibration_images="9")
    assert (found.quantize.method, found.quantize.calibration_images) == ("mse", 9)


def test_set_wins_over_a_flag_of_a_study_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []

    def run_study(recipe: Any, *_: object) -> None:
        found.append((recipe.study.seeds, recipe.study.jobs))
        raise UsageError("seen")

    monkeypatch.setattr("compress.study.run_study", run_study)
    (tmp_path / "recipe.yaml").write_text("data: data.yaml")
    with pytest.raises(SystemExit):
        main(["study", str(tmp_path / "recipe.yaml"), "--seeds", "9", "--jobs", "2", "--set", "study.seeds=3"])
    assert found == [(3, 2)]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("quantize.calibraton_images=3", "Did you mean 'calibration_images'"),
        ("method=best", "edgestill quantize: quantize.method: 'best' is not accepted"),
        ("distill.epochs=3", "unknown key"),
    ],
)
def test_a_set_that_the_stage_does_not_know_is_one_line(change: str, expected: str) -> None:
    with pytest.raises(UsageError) as caught:
        quantize_settings(change)
    assert expected in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("change", ["scale=s", "teacher.weights=a.pt", "finetune=never"])
def test_a_set_that_would_do_nothing_is_refused(change: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", "--data", "data.yaml", "--scale", "n", "--set", change])
    assert ended.value.code == 2
    assert "has no effect on `edgestill train`" in capsys.readouterr().err


def contexts(group: click.Group, parent: click.Context) -> Iterator[click.Context]:
    for name in group.list_commands(parent):
        command = group.get_command(parent, name)
        assert command is not None
        ctx = click.Context(command, parent=parent, info_name=name)
        yield from contexts(command, ctx) if isinstance(command, click.Group) else (ctx,)


ALL = list(contexts(cli, click.Context(cli, info_name="edgestill", **cli.context_settings)))


@pytest.mark.parametrize("ctx", ALL, ids=lambda ctx: ctx.command_path)
def test_every_option_says_what_it_is_and_its_default(ctx: click.Context) -> None:
    for option in ctx.command.params:
        if isinstance(option, click.Option):
            assert option.help, f"{option.name} has no help"
            default = option.get_default(ctx)
            if isinstance(default, (int, float, str)) and not isinstance(default, bool) and default != "":
                record = option.get_help_record(ctx)
                assert record is not None
                assert f"[default: {default}" in record[1], option.name


def test_a_default_is_the_settings_own() -> None:
    ctx = next(ctx for ctx in ALL if ctx.info_name == "distill")
    shown = {option.name: option.get_default(ctx) for option in ctx.command.params}
    assert (shown["epochs"], shown["workers"]) == (DistillConfig().epochs, DistillConfig().workers)
    init = next(ctx for ctx in ALL if ctx.info_name == "init")
    assert {o.name: o.get_default(init) for o in init.command.params}["imgsz"] == Recipe.model_fields["imgsz"].default


def test_the_help_of_all_commands_needs_no_package_of_the_compression_half() -> None:
    code = (
        "import sys\nfor name in ('pydantic', 'yaml', 'torch', 'onnx'): sys.modules[name] = None\n"
        "from compress.cli import main\nmain(['--help'])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert all(re.search(rf"^  {command} ", done.stdout, re.MULTILINE) for command in COMMANDS)


@pytest.mark.parametrize(("users", "expected"), [(None, "PASSIVE"), ("ACTIVE", "ACTIVE")])
def test_threads_wait_passively_unless_the_user_says_otherwise(
    users: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", users or "")
    if not users:
        monkeypatch.delenv("OMP_WAIT_POLICY")
    with pytest.raises(SystemExit, match="0"):
        main(["--version"])
    assert os.environ["OMP_WAIT_POLICY"] == expected


def test_the_wait_policy_is_set_before_torch_is_loaded() -> None:
    code = "import sys, compress.cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
