"""How the command ends: one line and an exit code, whatever its paths, its output and its surroundings are."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from compress.cli import main
from tests.benchmarks.conftest import build_sample
from tests.runtime.toys import canvas_model

NOT_UTF8 = os.fsdecode(b"\xff")


def ended(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    return int(caught.value.code or 0)


@pytest.mark.parametrize(
    "arguments",
    [
        ["init", ""], ["run", ""], ["run", "a.yaml", "--out", ""], ["report", "a", "--out", ""], ["inspect", ""],
        ["export", "--weights", ""], ["train", "--data", ""], ["data", "make", ""],
    ],
)  # fmt: skip
def test_an_empty_path_is_wrong_usage(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ended(arguments) == 2
    assert "a path is empty" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_recipe_of_any_name_is_written_and_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("ü.yaml", f"{NOT_UTF8}.yaml", "two words.yaml", "two\nlines.yaml"):
        assert ended(["init", name, "--imgsz", "64"]) == 0
        assert (tmp_path / name).is_file()
    assert "edgestill run 'two words.yaml'" in capsys.readouterr().err


def test_names_that_are_not_utf8_are_printed_and_read_back_from_json(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = canvas_model(tmp_path / f"{NOT_UTF8}.onnx")
    assert ended(["inspect", str(file)]) == 0
    capsys.readouterr()
    assert ended(["inspect", str(file), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["file"] == str(file)


@pytest.mark.parametrize(
    ("output", "code", "told"),
    [(">&-", 0, ""), ("> /dev/full", 1, "edgestill: No space left on device\n"), ("| :", 1, "")],
)
def test_an_output_that_takes_nothing_is_no_traceback(tmp_path: Path, output: str, code: int, told: str) -> None:
    model = canvas_model(tmp_path / "a.onnx")
    command = f"{sys.executable} -m compress inspect {model} {output}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=Path(__file__).parents[3], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (code, told)


def test_a_rank_that_is_no_number_is_wrong_usage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for variable in ("RANK", "WORLD_SIZE"):
        monkeypatch.setenv(variable, "first")
        assert ended(["init"] if variable == "RANK" else ["run", "recipe.yaml"]) == 2
        assert f"{variable} is 'first', expected a whole number" in capsys.readouterr().err
        monkeypatch.delenv(variable)


@pytest.mark.parametrize("option", ["--iou=0.1", "--imgsz=64", "--max-det=3", "--half", "--rect", "--annotations=a"])
def test_val_has_no_option_without_effect_on_a_file_of_the_device(
    option: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert ended(["val", "--data", "data.yaml", "--weights", "model.onnx", option]) == 2
    assert f"{option.partition('=')[0]} has no effect on model.onnx" in capsys.readouterr().err


def test_a_rule_that_cannot_be_read_is_told_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    build_sample().save(tmp_path / "report.json")
    assert ended(["report", ".", "--out", "a.md", "--fail-on", "nothing<1"]) == 2
    assert not (tmp_path / "a.md").exists()
    assert ended(["report", ".", "--json", "--fail-on", "map50_95<0.55"]) == 1
    found = capsys.readouterr()
    assert json.loads(found.out)["rows"]
    assert found.err.splitlines()[-1] == "edgestill: map50_95<0.55: model.int8-ort.onnx has map50_95 0.5448"


@pytest.mark.parametrize(
    "command", ["bench --model a.onnx --data d.yaml", "export --weights a.pt", "quantize --model a.onnx --data d.yaml"]
)
def test_a_file_in_the_place_of_the_folder_is_found_before_the_work(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").touch()
    assert ended([*command.split(), "--out", "taken"]) == 1
    assert "taken: cannot be written: Not a directory. A part of the path is a file" in capsys.readouterr().err
