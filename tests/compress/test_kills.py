"""A distillation that is killed and goes on, again and again, leaves the files of one that nobody disturbed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from compress.data import Dataset
from compress.models import Architecture, YOLOv5, save_model

REPOSITORY = Path(__file__).resolve().parents[2]
RECIPE = """\
data: {data}
imgsz: 64
device: cpu
teacher: {{weights: 0.safetensors}}
student: {{scale: p}}
distill:
  {{epochs: 4, batch: 4, val_interval: 2, workers: 0, tensorboard: false, teachers: [1.safetensors],
  unlabelled: {unlabelled}, losses: {{soft: auto, feat_mse: auto}}}}
"""
TIMES = {"stage.json", "checks.json", "state.pt"}
"""Files that say how long something took."""


@pytest.fixture
def recipe(tiny_data: Dataset, tmp_path: Path) -> Path:
    for seed in range(2):
        torch.manual_seed(seed)
        model = YOLOv5(Architecture.of_scale("n", tiny_data.names))
        model.init_detect_bias()
        save_model(model, tmp_path / f"{seed}.safetensors", {"imgsz": 64})
    file = tmp_path / "job.yaml"
    file.write_text(RECIPE.format(data=tiny_data.path, unlabelled=tiny_data.root / "images/val"))
    return file


def files(run: Path) -> dict[str, bytes]:
    folder = run / "distill"
    found = (file for file in folder.rglob("*") if file.is_file())
    return {str(file.relative_to(folder)): b"" if file.name in TIMES else file.read_bytes() for file in found}


@pytest.mark.slow
def test_a_distillation_killed_in_each_of_its_phases_ends_with_the_same_bytes(recipe: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.compress.kills", recipe, tmp_path, "8"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert len(done.stdout.splitlines()) == 11
    straight, killed = files(tmp_path / "straight"), files(tmp_path / "killed")
    assert {"last.safetensors", "student.safetensors", "results.csv", "teacher.json"} <= straight.keys()
    assert killed.keys() == straight.keys()
    assert [name for name in straight if straight[name] != killed[name]] == []
    assert not list((tmp_path / "killed/.work").glob("distill*"))
