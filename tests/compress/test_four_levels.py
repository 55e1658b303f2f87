"""A network of four levels (P6, strides 8 to 64) on every road that one of three levels takes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.accuracy import detector_accuracy
from compress.config import Recipe
from compress.data import Dataset
from compress.data.loader import val_batches
from compress.evaluate import evaluate
from compress.inputs import CONVENTIONAL, validation_of
from compress.losses.distill import LOSSES
from compress.models import Architecture, YOLOv5, load_model, save_model
from compress.models.architecture import DEFAULT_ANCHORS_P6
from compress.pipeline import ORDER, run_recipe
from compress.training.prepare import new_model
from runtime.card import ModelCard
from runtime.detector import Detector
from runtime.errors import UsageError

pytestmark = pytest.mark.usefixtures("one_thread")
SIDE = 128


def quiet(_line: str) -> None: ...


@pytest.fixture(scope="module")
def teacher(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("p6") / "teacher.safetensors"
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", tiny_data.names, DEFAULT_ANCHORS_P6))
    network.init_detect_bias()
    save_model(network.eval(), file, {})
    return file


@pytest.fixture
def recipe(tiny_data: Dataset, teacher: Path) -> Recipe:
    quick = {"epochs": 1, "batch": 5, "workers": 0, "tensorboard": False}
    return Recipe.model_validate({
        "data": tiny_data.path, "imgsz": SIDE, "device": "cpu",
        "teacher": quick | {"weights": teacher, "finetune": "always"},
        "distill": quick | {"losses": dict.fromkeys(LOSSES, 0.1)},
        "quantize": {
            "calibration_images": 4, "draws": 1, "float_layers": 2, "max_map_drop": 1.0, "max_latency_ratio": 1000,
        },
        "build": {"backend": "none"}, "bench": {"latency_samples": 11, "warmup_ms": 0},
    })  # fmt: skip


def test_rectangular_batches_have_sides_that_the_coarsest_level_divides(tiny_data: Dataset, teacher: Path) -> None:
    samples, model = tiny_data.splits["val"].samples, load_model(teacher)
    shapes = [batch.images.shape[2:] for batch in val_batches(samples, imgsz=SIDE, batch=2, stride=64)]
    assert all(side % 64 == 0 for shape in shapes for side in shape)
    assert any(side % 128 for shape in shapes for side in shape)
    assert evaluate(model, samples, imgsz=SIDE, batch=2, rect=True, device="cpu").images == len(samples)


@pytest.mark.parametrize("size", [32, 96, 160])
def test_a_size_for_three_levels_is_refused_before_the_first_stage(recipe: Recipe, size: int, tmp_path: Path) -> None:
    other = Recipe.model_validate({**recipe.model_dump(include={"data", "teacher"}), "imgsz": size})
    other = other.model_copy(update={"teacher": recipe.teacher})
    with pytest.raises(UsageError, match=f"image size {size} is not a multiple of the network's stride 64. Use"):
        run_recipe(other, tmp_path / "run", log=quiet)
    assert not (tmp_path / "run").exists()


def test_a_validation_at_such_a_size_is_refused(tiny_data: Dataset, teacher: Path) -> None:
    with pytest.raises(UsageError, match=r"image size 96 is not a multiple of the network's stride 64\. Use 128"):
        evaluate(load_model(teacher), tiny_data.splits["val"].samples, imgsz=96, device="cpu")


def test_a_student_of_a_scale_has_the_teachers_levels(teacher: Path) -> None:
    student = new_model(("any",), scale="n", weights=None, anchors=load_model(teacher).arch.anchors, log=quiet)
    assert student.strides == (8, 16, 32, 64)


def test_start_weights_with_other_levels_than_the_teacher_are_refused(
    recipe: Recipe, tiny_data: Dataset, tmp_path: Path
) -> None:
    save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval(), tmp_path / "p5.safetensors", {})
    student = recipe.student.model_copy(update={"scale": None, "weights": tmp_path / "p5.safetensors"})
    with pytest.raises(UsageError, match="network with 3 levels, the teacher has 4"):
        run_recipe(recipe.model_copy(update={"student": student}), tmp_path / "run", log=quiet)


@pytest.mark.slow
def test_the_whole_pipeline_runs_with_every_loss_and_the_bundle_detects(
    recipe: Recipe, tiny_data: Dataset, tmp_path: Path
) -> None:
    outcomes = run_recipe(recipe, tmp_path, log=quiet)
    assert [outcome.stage for outcome in outcomes] == list(ORDER)
    assert load_model(tmp_path / "distill" / "student.safetensors").strides == (8, 16, 32, 64)
    assert ModelCard.load(tmp_path / "bundle").stride == 64
    report = json.loads((tmp_path / "report" / "report.json").read_text())
    assert {row["precision"] for row in report["models"]} >= {"fp32", "fp16", "int8-ort"}
    truth = validation_of(tiny_data)
    for file in (tmp_path / "bundle", tmp_path / "export" / CONVENTIONAL):
        with Detector.load(file, device="cpu") as detector:
            found = detector_accuracy(detector, truth.images, truth.ground_truth, conf=0.001)
            assert 0 <= found.map50_95 <= 1
