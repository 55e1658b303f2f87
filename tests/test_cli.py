"""The command line as a user meets it: one line for every mistake, no traceback, nothing half-written."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest

from compress.cli import COMMANDS

EDGESTILL = Path(sys.executable).with_name("edgestill")


def edgestill(*arguments: object, cwd: Path) -> subprocess.CompletedProcess[str]:
    command = [str(EDGESTILL), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, timeout=300)


def refused(*arguments: object, cwd: Path, code: int) -> str:
    """The one line that a mistake is answered with."""
    done = edgestill(*arguments, cwd=cwd)
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr
    assert lines[-1].startswith("edgestill: ")
    assert sum(line.startswith("edgestill: ") for line in lines) == 1
    return lines[-1]


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    """Four grey images with one box each."""
    for split in ("train", "val"):
        for number in range(2):
            image = tmp_path / "images" / split / f"{number}.png"
            image.parent.mkdir(parents=True, exist_ok=True)
            cv2.imwrite(str(image), np.full((64, 64, 3), 90 + number, np.uint8))
            label = tmp_path / "labels" / split / f"{number}.txt"
            label.parent.mkdir(parents=True, exist_ok=True)
            label.write_text("0 0.5 0.5 0.2 0.2\n")
    file = tmp_path / "data.yaml"
    file.write_text("path: .\ntrain: images/train\nval: images/val\nnames: [part]\n")
    return file


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(command: str, tmp_path: Path) -> None:
    done = edgestill(command, "--help", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.lower().startswith("usage: ")


@pytest.mark.parametrize("arguments", [[], ["data"]])
def test_a_group_alone_shows_its_help_in_lines(arguments: list[str], tmp_path: Path) -> None:
    done = edgestill(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == edgestill(*arguments, "--help", cwd=tmp_path).stdout


def test_the_help_keeps_its_three_lines(tmp_path: Path) -> None:
    lines = [line.split() for line in edgestill("--help", cwd=tmp_path).stdout.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["edgestill"]] == ["demo", "init", "run"]


def test_a_package_that_the_device_lacks_is_one_line(dataset: Path) -> None:
    code = "import sys; sys.modules['torch'] = None; from compress.cli import main; main()"
    command = [sys.executable, "-c", code, "train", "--data", str(dataset), "--scale", "p"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=dataset.parent)
    assert done.returncode == 1
    assert done.stderr == "edgestill: torch is not installed. pip install 'edgestill[compress]'\n"


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
    [
        (["tran"], 2, "Did you mean 'train'"),
        (["run"], 2, "RECIPE"),
        (["run", "none.yaml"], 1, "edgestill init"),
        (["train", "--data", "none.yaml", "--scale", "p"], 1, "none.yaml"),
        (["inspect", "none.pt"], 1, "no such file"),
        (["export", "--weights", "none.pt"], 1, "none.pt"),
        (["export", "--weights", "none.pt", "--frame", "big"], 2, "1080x1920"),
        (["report", "none"], 1, "none"),
        (["detect", "image.jpg", "--model", "none.onnx"], 1, "image.jpg"),
        (["data", "check", "none.yaml"], 1, "none.yaml"),
    ],
)
def test_a_wrong_request_is_one_line(arguments: list[str], code: int, expected: str, tmp_path: Path) -> None:
    assert expected in refused(*arguments, cwd=tmp_path, code=code)
    assert not list(tmp_path.iterdir())


class Canary:
    """Unpickled by a careless reader, it leaves a file behind."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, ("touch canary-fired",)


def bad_checkpoints(folder: Path) -> dict[str, Path]:
    made = {
        "payload": pickle.dumps({"model": Canary()}, protocol=2),
        "html": b"<!DOCTYPE html><html><body>404: Not Found</body></html>",
        "truncated": b"PK\x03\x04" + bytes(500),
        "empty": b"",
        "noise": bytes(range(256)) * 8,
    }
    for name, content in made.items():
        (folder / f"{name}.pt").write_bytes(content)
    return {name: folder / f"{name}.pt" for name in made}


@pytest.mark.parametrize("kind", ["payload", "html", "truncated", "empty", "noise"])
def test_a_file_that_is_no_checkpoint_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    file = bad_checkpoints(tmp_path)[kind]
    assert f"{kind}.pt" in refused("inspect", file, cwd=tmp_path, code=1)
    assert not (tmp_path / "canary-fired").exists()


def test_the_canary_fires_where_a_pickle_is_trusted(tmp_path: Path) -> None:
    file = bad_checkpoints(tmp_path)["payload"]
    code = f"import pickle; pickle.load(open({str(file)!r}, 'rb'))"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert (tmp_path / "canary-fired").exists()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ("download: touch canary-fired", "download"),
        ("names: !!python/object/apply:os.system ['touch canary-fired']", "data.yaml"),
        ("val: images/nowhere", "nowhere"),
        ("names: []", "names"),
        ("nc: 7", "nc"),
    ],
)
def test_a_data_yaml_that_cannot_be_used_is_one_line(dataset: Path, change: str, expected: str) -> None:
    key = change.split(":")[0]
    kept = [line for line in dataset.read_text().splitlines() if not line.startswith(f"{key}:")]
    dataset.write_text("\n".join([*kept, change]))
    done = edgestill("data", "check", dataset, cwd=dataset.parent)
    assert done.returncode in (1, 2)
    assert expected in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not (dataset.parent / "canary-fired").exists()


def test_bad_rows_and_images_are_reported_one_by_one_and_nothing_is_changed(dataset: Path) -> None:
    folder = dataset.parent
    rows = ["0 0.5 0.5 0.2 0.2", "9 0.5 0.5 0.2 0.2", "0 nan 0.5 0.2 0.2", "0 0.5 0.5", "0 1.7 0.5 0.2 0.2"]
    (folder / "labels/train/0.txt").write_text("\n".join(rows))
    (folder / "images/train/empty.png").touch()
    (folder / "images/train/cut.png").write_bytes((folder / "images/train/0.png").read_bytes()[:60])
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    done = edgestill("data", "check", dataset, "--json", cwd=folder)
    assert done.returncode == 1
    assert "6 bad images or label rows" in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    problems = json.loads(done.stdout)["splits"]["train"]["problems"]
    assert [line for line in (2, 3, 4, 5) if any(f"0.txt:{line}:" in problem for problem in problems)] == [2, 3, 4, 5]
    assert any("empty.png" in problem for problem in problems)
    assert any("cut.png" in problem for problem in problems)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_an_onnx_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper

    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [1, 4]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "other", value[:1], value[1:])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "o.onnx")
    cv2.imwrite(str(tmp_path / "image.png"), np.zeros((64, 64, 3), np.uint8))
    assert "o.onnx" in refused("detect", "image.png", "--model", "o.onnx", cwd=tmp_path, code=1)
    assert "o.onnx" in refused("build", "--model", "o.onnx", "--out", "plans", cwd=tmp_path, code=1)
    assert not (tmp_path / "plans").exists()


def test_init_writes_a_recipe_that_run_accepts_and_never_overwrites(dataset: Path) -> None:
    folder = dataset.parent
    (folder / "images/test").mkdir()
    (folder / "images/test/unlabelled.png").write_bytes((folder / "images/val/0.png").read_bytes())
    with dataset.open("a") as file:
        file.write("test: images/test\n")
    assert edgestill("init", "job.yaml", "--data", dataset, "--imgsz", 64, cwd=folder).returncode == 0
    assert "exists" in refused("init", "job.yaml", "--data", dataset, cwd=folder, code=2)
    count = len(list((folder / "images/train").iterdir()))
    assert f"x {count} training images" in (folder / "job.yaml").read_text()
    assert "split: val " in (folder / "job.yaml").read_text()
    done = edgestill("run", "job.yaml", "--until", "data", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert (folder / "runs/job/data/stage.json").is_file()
    assert "Did you mean 'distill'" in refused("run", "job.yaml", "--until", "distil", cwd=folder, code=2)


def test_a_teacher_of_other_classes_is_refused_where_it_may_not_be_fine_tuned(dataset: Path, tmp_path: Path) -> None:
    from compress.models import Architecture, YOLOv5, save_model

    save_model(YOLOv5(Architecture.of_scale("p", ["cat", "dog"])), tmp_path / "pets.safetensors", {})
    recipe = tmp_path / "job.yaml"
    recipe.write_text("data: data.yaml\nimgsz: 64\nteacher: {weights: pets.safetensors, finetune: never}\n")
    line = refused("run", "job.yaml", cwd=tmp_path, code=2)
    assert "2 classes (cat, dog)" in line
    assert "1 (part)" in line


@pytest.mark.skipif(not Path("/dev/full").exists() or os.geteuid() != 0, reason="needs to mount a small disk")
def test_a_full_disk_is_one_line_and_leaves_nothing_torn(dataset: Path, tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting is not allowed here")
    try:
        line = refused("data", "make", small / "belt", "--images", 20, "--size", 320, cwd=tmp_path, code=1)
        assert "No space left" in line
        assert not (small / "belt").exists()
        training = (
            "train",
            "--data",
            dataset,
            "--scale",
            "p",
            "--imgsz",
            64,
            "--epochs",
            1,
            "--set",
            "tensorboard=false",
        )
        assert "No space left" in refused(*training, "--project", small, cwd=tmp_path, code=1)
        assert not list(small.rglob("*.safetensors"))
    finally:
        subprocess.run(["umount", small], check=True)


def test_a_folder_without_write_permission_is_one_line(dataset: Path) -> None:
    line = refused("init", "/proc/nowhere/job.yaml", "--data", dataset, cwd=dataset.parent, code=1)
    assert "job.yaml" in line


def test_doctor_finds_what_the_tests_run_with(tmp_path: Path) -> None:
    done = edgestill("doctor", "--json", cwd=tmp_path)
    found = {entry["name"]: entry["ok"] for entry in json.loads(done.stdout)}
    assert found["python"]
    assert found["onnxruntime on"]
