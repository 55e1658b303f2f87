"""`--resume`: alone, and with a path, as YOLOv5 users know it."""

from __future__ import annotations

from pathlib import Path

import pytest

from compress.cli import main
from compress.data import Dataset
from compress.training.state import load_state

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = ["--imgsz", "64", "--batch", "5", "--epochs", "3", "--device", "cpu", "--set", "tensorboard=false"]


class Stop(BaseException):
    """Stands for a kill."""


def edgestill(*arguments: object) -> int:
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    return int(str(caught.value.code))


def train(*arguments: object) -> int:
    return edgestill("train", *arguments)


def epoch(out: Path) -> int:
    return int(load_state(out / "state.pt")["train_state"]["epoch"])


@pytest.fixture
def cut(tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a training that was killed after its first of three epochs."""
    monkeypatch.chdir(tmp_path)
    from compress.cli import trainings

    def stop(line: str) -> None:
        if line.startswith("epoch 1/"):
            raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(trainings, "say", stop)
        with pytest.raises(Stop):
            main(["train", "--data", str(tiny_data.path), "--scale", "p", *SETTINGS])
    assert epoch(tmp_path / "runs/train/exp") == 1
    return tmp_path / "runs/train/exp"


@pytest.mark.parametrize("name", ["", "state.pt", "last.safetensors"])
def test_a_run_goes_on_from_its_folder_or_a_file_in_it(
    cut: Path, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train("--resume", cut / name) == 0
    assert epoch(cut) == 3


def test_the_newest_run_goes_on_with_the_settings_and_data_that_it_began_with(cut: Path) -> None:
    assert train("--resume") == 0
    state = load_state(cut / "state.pt")
    assert state["train_state"]["epoch"] == 3
    assert (state["config"]["batch"], state["config"]["tensorboard"], state["origin"]["device"]) == (5, False, "cpu")
    assert not (cut.parent / "exp2").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (["--batch", 4], "batch = 5, not 4"),
        (["--scale", "n"], "scale = p, not n"),
        (["--epochs", 9], "epochs = 3, not 9"),
        (["--init", "scratch"], "init = auto, not scratch"),
        (["--activation", "relu"], "activation = SiLU, not ReLU"),
    ],
)
def test_what_is_said_otherwise_is_refused_with_the_way_on(
    cut: Path, change: list[object], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train("--resume", *change) == 2
    line = capsys.readouterr().err.strip()
    assert expected in line
    assert f"--weights {cut.relative_to(Path.cwd()) / 'last.safetensors'}" in line
    assert epoch(cut) == 1


def test_the_way_on_works(cut: Path, tiny_data: Dataset) -> None:
    assert train("--data", tiny_data.path, "--weights", cut / "last.safetensors", *SETTINGS, "--epochs", 1) == 0
    assert epoch(cut.parent / "exp2") == 1


def test_a_path_without_a_run_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train("--resume", tmp_path / "none") == 1
    assert train("--resume", tmp_path) == 1
    assert [line.partition(": ")[2][:8] for line in capsys.readouterr().err.splitlines()] == ["--resume", "nothing "]


@pytest.mark.parametrize(("command", "option"), [("train", "--data"), ("distill", "--data"), ("distill", "--teacher")])
def test_without_a_run_to_resume_the_files_must_be_named(
    command: str, option: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    given = [] if option == "--data" else ["--data", "none.yaml"]
    assert edgestill(command, "--scale", "p", *given) == 2
    assert capsys.readouterr().err == f"edgestill: Missing option '{option}'.\n"


def test_a_distillation_goes_on_with_its_teacher_and_no_other(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.models import Architecture, YOLOv5, save_model

    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval(), tmp_path / f"{name}.safetensors", {})
    begin = [
        "distill",
        "--data",
        tiny_data.path,
        "--teacher",
        "one.safetensors",
        "--scale",
        "p",
        "--init",
        "scratch",
        "--loss",
        "cwd=0.5",
    ]
    assert edgestill(*begin, *SETTINGS, "--epochs", 1) == 0
    assert edgestill("distill", "--resume", "--teacher", "two.safetensors") == 2
    assert "trained with teacher = sha256 " in capsys.readouterr().err.splitlines()[-1]
    assert edgestill("distill", "--resume", "runs/distill/exp") == 0
    assert load_state(tmp_path / "runs/distill/exp/state.pt")["config"]["losses"]["cwd"]["weight"] == 0.5


@pytest.mark.parametrize("further", [("--teacher", "two.safetensors"), ("--set", "teachers=[two.safetensors]")])
def test_a_distillation_with_several_teachers_goes_on_with_all_of_them(
    further: tuple[str, str],
    tiny_data: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import torch

    from compress.models import Architecture, YOLOv5, save_model

    monkeypatch.chdir(tmp_path)
    for seed, name in enumerate(("one", "two")):
        torch.manual_seed(seed)
        save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval(), tmp_path / f"{name}.safetensors", {})
    both = ["--teacher", "one.safetensors", *further]
    begin = ["distill", "--data", tiny_data.path, *both, "--scale", "p", "--init", "scratch", *SETTINGS, "--epochs", 1]
    assert edgestill(*begin) == 0
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    capsys.readouterr()
    run = tmp_path / "runs/distill/exp"
    assert edgestill("distill", "--resume", run, "--teacher", tmp_path / "one.safetensors") == 2
    assert "trained with teacher = sha256 " in capsys.readouterr().err.splitlines()[-1]
    assert edgestill("distill", "--resume", run) == 0


def test_a_check_prints_a_table_and_trains_nothing(
    tiny_data: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from compress.models import Architecture, YOLOv5, save_model

    monkeypatch.chdir(tmp_path)
    save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval(), tmp_path / "t.safetensors", {"imgsz": 128})
    asked = ["distill", "--check", "--data", tiny_data.path, "--teacher", "t.safetensors", "--scale", "p", *SETTINGS]
    assert edgestill(*asked) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].startswith("ok      classes agree")
    assert [line for line in lines if line.startswith("warning size of t.safetensors")]
    assert not (tmp_path / "runs").exists()
    assert edgestill(*asked, "--teacher-imgsz", 96) == 2
    assert "no multiple of imgsz 64" in capsys.readouterr().err
    assert edgestill("distill", "--check", "--resume") == 2
    assert edgestill(*asked, "--set", "losses={}") == 0
    assert capsys.readouterr().out.startswith("nothing to check")
