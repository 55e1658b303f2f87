"""The folder into which a command writes, its refusal of one that holds another model, and the shapes of an export."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from compress.cli import main
from compress.cli.files import export, into, quantize
from compress.cli.options import settings
from compress.config import ExportConfig
from compress.data import Dataset
from runtime.errors import InputError, UsageError
from runtime.identity import OccupiedError


class Work:
    """Fails in the folders that hold another model, and remembers where it was tried."""

    def __init__(self, *occupied: str) -> None:
        self.occupied = occupied
        self.tried: list[str] = []

    def __call__(self, folder: Path) -> None:
        self.tried.append(folder.name)
        if folder.name in self.occupied:
            raise OccupiedError(f"{folder} holds another model")


def test_without_a_folder_the_next_number_is_taken_where_another_model_lies(capsys: pytest.CaptureFixture[str]) -> None:
    work = Work("export", "export2")
    assert into(None, Path("runs/export"), work) == Path("runs/export3")
    assert work.tried == ["export", "export2", "export3"]
    assert "runs/export2 holds another model; trying the next folder" in capsys.readouterr().err


def test_without_another_model_the_folder_is_taken_again() -> None:
    assert into(None, Path("runs/export"), Work()) == Path("runs/export")


def test_a_folder_that_was_named_is_used_or_refused() -> None:
    work = Work("mine")
    with pytest.raises(OccupiedError):
        into(Path("mine"), Path("runs/export"), work)
    assert work.tried == ["mine"]
    assert into(Path("own"), Path("runs/export"), work) == Path("own")


def test_another_error_ends_the_work() -> None:
    def fail(_: Path) -> None:
        raise InputError("no such file")

    with pytest.raises(InputError, match="no such file"):
        into(None, Path("runs/export"), fail)


def exported_with(arguments: str, monkeypatch: pytest.MonkeyPatch) -> ExportConfig:
    """The settings that `edgestill export` hands to its stage."""
    found: list[ExportConfig] = []

    def run_alone(stage: Any, _: object, out: Path) -> None:
        found.append(settings(stage.settings, stage.name).export)
        raise UsageError("seen")

    monkeypatch.setattr("compress.cli.files.run_alone", run_alone)
    with pytest.raises(UsageError, match="seen"):
        export.main(["--weights", "a.pt", *arguments.split()], standalone_mode=False)
    return found[0]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", {}),
        ("--imgsz 320", {"imgsz": (320, 320)}),
        ("--imgsz 384 640", {"imgsz": (384, 640)}),
        ("--img=384 640 --batch-size 8", {"imgsz": (384, 640), "batch": 8}),
        ("--imgsz 384x640 --opset 12", {"imgsz": (384, 640), "opset": 12}),
        ("--frame 1080x1920", {"frame": (1080, 1920)}),
        ("--imgsz 384 640 --frame 1080 1920", {"imgsz": (384, 640), "frame": (1080, 1920)}),
        ("--dynamic --half --simplify", {"dynamic": True, "half": True}),
        ("--set export.imgsz=[384,640] --set batch=2", {"imgsz": (384, 640), "batch": 2}),
        ("--imgsz 384 640 --set export.imgsz=96", {"imgsz": (96, 96)}),
    ],
)
def test_export_takes_the_options_of_yolov5s_export(
    arguments: str, expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exported_with(arguments, monkeypatch) == ExportConfig(**expected)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--imgsz 0 640", "greater than or equal to 1"),
        ("--imgsz 384x640x3", "expected one side, or height and width"),
        ("--imgsz 384 640 3", "unexpected extra argument"),
        ("--imgsz wide", "wide"),
        ("--frame 1080", "expected height and width, such as 1080x1920"),
        ("--imgsz 384 --imgsz", "requires an argument"),
        ("--opset 11", "greater than or equal to 12"),
        ("--opset 22", "less than or equal to 21"),
        ("--batch-size 0", "greater than or equal to 1"),
        ("--dynamic --batch-size 2", "give batch or dynamic, not both"),
    ],
)
def test_a_shape_that_is_none_is_one_line(arguments: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["export", "--weights", "none.pt", *arguments.split()])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert told in line


@pytest.mark.parametrize("batches", ["8,4,1", "1,4", "1,4,8,9", "a,b,c", "0,1,2", "nan,1,2", "1.5,2,3"])
def test_the_batches_of_a_profile_are_three_ascending_numbers(batches: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["build", "--model", "none.onnx", "--batches", batches])
    assert caught.value.code == 2
    assert "--batches" in capsys.readouterr().err


def test_calibration_images_need_no_labels(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = shutil.copytree(tiny_data.root, tmp_path / "data")
    shutil.rmtree(root / "labels/train")
    (tmp_path / "model.onnx").touch()
    found: list[Any] = []

    def run_alone(_: Any, inputs: Any, *__: Any) -> None:
        found.append(inputs().data)
        raise UsageError("seen")

    monkeypatch.setattr("compress.cli.files.run_alone", run_alone)
    arguments = ["--model", str(tmp_path / "model.onnx"), "--data", str(root / "data.yaml")]
    with pytest.raises(UsageError, match="seen"):
        quantize.main(arguments, standalone_mode=False)
    assert found[0].splits["train"].boxes == 0
