"""`edgestill distill --quantize`: a float student becomes INT8 files without a recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.cli import main
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, save_model
from compress.training.state import load_state
from runtime.bundle import card_of
from runtime.files import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = [
    "--imgsz", "64", "--batch", "5", "--epochs", "2", "--workers", "0", "--threads", "1", "--device", "cpu",
    *("--set=tensorboard=false", "--set=quantize.calibration_images=2", "--set=quantize.draws=1"),
    *("--set=quantize.float_layers=0", "--set=quantize.max_map_drop=1", "--set=export.max_box_error=1"),
    "--set=quantize.max_latency_ratio=100",
]  # fmt: skip


def distill(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main(["distill", *(str(argument) for argument in arguments)])
    return int(str(caught.value.code))


@pytest.fixture
def student(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval(), tmp_path / "student.safetensors", {})
    return tmp_path / "student.safetensors"


def test_a_student_becomes_an_int8_file_of_its_own_model_and_a_run_goes_on(
    student: Path, tiny_data: Dataset, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["--quantize", "int8-openvino", "--data", tiny_data.path, "--weights", student, *SMALL]
    assert distill(*command) == 0
    folder = Path("runs/distill/exp")
    file = folder / "model.int8-openvino.onnx"
    assert capsys.readouterr().out == f"{file}\n"
    assert card_of(file).identity == card_of(folder / "model.onnx").identity
    (entry,) = read_json(folder / "qad.json")
    assert (entry["name"], entry["training"]["epochs"]) == ("int8-openvino", 2)
    assert load_state(folder / "int8-openvino" / "state.pt")["config"]["imgsz"] == 64
    assert distill(*command, "--resume") == 0
    again = capsys.readouterr()
    assert again.out == f"{file}\n"
    assert "epoch 1/2" not in again.err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--quantize", "int9"], "--quantize 'int9': no INT8 flavour. Known: int8 for all, int8-trt, int8-openvino"),
        (["--quantize", "fp16"], "--quantize 'fp16': no INT8 flavour"),
        (["--quantize", ""], "--quantize '': no INT8 flavour"),
        (["--quantize", "int8", "--scale", "p"], "--scale has no effect with --quantize"),
        (["--quantize", "int8", "--check"], "--check has no effect with --quantize"),
        (["--quantize", "int8", "--init", "scratch"], "--init has no effect with --quantize"),
        (["--quantize", "int8", "--strategy", "joint"], "qad.strategy joint trains the teacher"),
    ],
)
def test_what_does_not_go_together_is_one_line(
    student: Path, tiny_data: Dataset, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(*arguments, "--data", tiny_data.path, "--weights", student) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert expected in lines[0]


@pytest.mark.parametrize("missing", ["--data", "--weights"])
def test_data_and_weights_must_be_named(missing: str, student: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = {"--data": Path("data.yaml"), "--weights": student}
    del given[missing]
    assert distill("--quantize", "int8", *(text for pair in given.items() for text in pair)) == 2
    assert f"Missing option '{missing}'" in capsys.readouterr().err
