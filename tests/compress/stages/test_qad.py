from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from benchmarks.latency import LatencyRatio
from compress.config import ExportConfig, Recipe
from compress.data import Dataset
from compress.gate import Choice, JudgedFile, Loss, Step
from compress.graph.metadata import read_card
from compress.models import Architecture, YOLOv5
from compress.models.checkpoint import save_model
from compress.stages.export import export
from compress.stages.qad import STAGE, Config, Inputs, is_better, qad, wanted
from runtime.errors import InputError, UsageError
from runtime.files import sha256, write_json

pytestmark = pytest.mark.usefixtures("one_thread")
SIZE = 64


def settings(**changes: Any) -> Config:
    base = {"epochs": 1, "batch": 5, "imgsz": SIZE, "workers": 0, "threads": 1, "tensorboard": False}
    quantize = {"flavours": ["fp16", "int8-openvino"], "calibration_images": 2, "draws": 2, "float_layers": 0}
    return Config.model_validate(
        {"qad": base | changes.pop("qad", {}), "quantize": quantize | changes.pop("quantize", {}), "device": "cpu"}
    )


class FixedGate:
    """FP32 has 0.5, every other file `figure` and half the time."""

    def __init__(self, figure: float) -> None:
        self.figure = figure

    def maps(self, path: Path, *_: Any) -> np.ndarray:
        is_reference = read_card(onnx.load(path), path.name).precision == "fp32"
        return np.full(3, 0.5 if is_reference else self.figure)

    def latency(self, *_: Any) -> LatencyRatio:
        return LatencyRatio(0.5, 0.5, 0.5, (0.5,) * 20)


def calibrated(*drops: float, kept: bool, float_layers: int = 0) -> dict[str, Any]:
    """An entry of quantize.json whose tries by one method after the other lost `drops`, the last one being the file.

    It was timed with no layers in float, too.
    """
    layers = [{"name": str(index), "error": 1.0, "is_float": index < float_layers} for index in range(3)]
    steps = [{"float_layers": 0, "drop": None}, *({"float_layers": float_layers, "drop": drop} for drop in drops)]
    return {"name": "int8-openvino", "kept": kept, "steps": steps, "layers": layers, "loss": {"drop": drops[-1]}}


def more_in_float(drop: float, *, kept: bool) -> dict[str, Any]:
    """An entry whose first try lost too much with one layer in float, and whose file with two loses `drop`."""
    entry = calibrated(drop, kept=kept, float_layers=2)
    return entry | {"steps": [{"float_layers": 1, "drop": 0.03}, *entry["steps"][1:]]}


@pytest.fixture(scope="module")
def files(tiny_data: Dataset, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An untrained student, and its model.onnx."""
    folder = tmp_path_factory.mktemp("files")
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", tiny_data.names)).eval()
    for conv in network.detect.m:
        torch.nn.init.normal_(conv.weight, 0, 2.0)
    save_model(network, folder / "student.safetensors")
    loose = ExportConfig(max_box_error=1, max_score_error=1)
    made = export(loose, model=folder / "student.safetensors", out=folder, imgsz=SIZE, log=lambda _: None)
    return folder / "student.safetensors", made.model_onnx


def run(
    tiny_data: Dataset, files: tuple[Path, Path], out: Path, figure: float, entries: Mapping[str, Any]
) -> list[dict[str, Any]]:
    student, model = files
    inputs = Inputs(model, student, tiny_data, (), entries)
    return qad(settings(qad={"when": "always"}), inputs, out=out, gate=FixedGate(figure), log=lambda _: None)


def test_a_trained_file_that_holds_replaces_a_calibrated_one_that_does_not(
    tiny_data: Dataset, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (entry,) = run(tiny_data, files, tmp_path, 0.49, {"int8-openvino": calibrated(0.1, kept=False)})
    file = tmp_path / "model.int8-openvino.onnx"
    assert (entry["replaces"], entry["kept"], entry["file"]) == (True, True, file.name)
    assert entry["sha256"] == sha256(file)
    assert entry["loss"]["drop"] == pytest.approx(0.01)
    assert entry["training"]["epochs"] == 1
    card, reference = (read_card(onnx.load(path), path.name) for path in (file, files[1]))
    assert card.identity == reference.identity
    assert card.precision == "int8-openvino"
    assert card.provenance["qad"] == sha256(tmp_path / "int8-openvino" / "best.safetensors")


def test_the_calibrated_file_stays_where_the_trained_one_loses_more(
    tiny_data: Dataset, files: tuple[Path, Path], tmp_path: Path
) -> None:
    (entry,) = run(tiny_data, files, tmp_path, 0.4, {"int8-openvino": calibrated(0.01, kept=True)})
    assert (entry["replaces"], entry["kept"]) == (False, False)
    assert not (tmp_path / "model.int8-openvino.onnx").exists()


@pytest.mark.parametrize(
    ("when", "entry", "expected"),
    [
        ("needed", calibrated(0.03, kept=False), True),
        ("needed", calibrated(0.03, 0.04, kept=False, float_layers=2), True),
        ("needed", more_in_float(0.03, kept=False), True),
        ("needed", more_in_float(0.01, kept=False), True),
        ("needed", more_in_float(0.01, kept=True), False),
        ("needed", calibrated(0.03, 0.01, kept=True), False),
        ("needed", calibrated(0.01, kept=True), False),
        ("needed", calibrated(0.01, kept=False), False),
        ("needed", calibrated(0.03, 0.01, kept=False), False),
        ("needed", calibrated(float("nan"), kept=False), False),
        ("needed", calibrated(0.03, kept=False) | {"steps": []}, False),
        ("always", calibrated(0.01, kept=True), True),
        ("never", calibrated(0.03, kept=False), False),
    ],
    ids=[
        "lost too much",
        "by both methods",
        "with more layers in float, too",
        "too slow with more layers in float",
        "holds with more layers in float",
        "holds by the other method",
        "holds",
        "too slow",
        "too slow by the other method",
        "not measurable",
        "not made",
        "always",
        "never",
    ],
)
def test_it_runs_where_no_calibrated_file_passes_and_the_fewest_layers_in_float_lose_too_much(
    when: str, entry: dict[str, Any], expected: bool
) -> None:
    found = wanted(settings(qad={"when": when}), {"fp16": {}, "int8-openvino": entry})
    assert found == (("int8-openvino",) if expected else ())


def judged(drop: float, *, kept: bool = True, float_layers: tuple[str, ...] = ()) -> JudgedFile:
    loss = Loss(drop, 0.0, 0.0, 2)
    step = Step(Choice("mse", float_layers), loss=loss)
    return JudgedFile("int8-openvino", Path("file"), kept, "", 0.5, loss, steps=(step,))


@pytest.mark.parametrize(
    ("trained", "before", "expected"),
    [
        (judged(0.01), calibrated(0.03, kept=False), True),
        (judged(0.03, kept=False), calibrated(0.04, kept=False), False),
        (judged(0.03, kept=False), calibrated(0.01, kept=True), False),
        (judged(0.01), calibrated(0.02, kept=True), True),
        (judged(0.01), calibrated(0.005, kept=True), False),
        (judged(0.01, float_layers=("1",)), calibrated(0.0, kept=True, float_layers=2), True),
        (judged(0.0, float_layers=("1",)), calibrated(0.01, kept=True), False),
    ],
    ids=[
        "only it passes", "none passes", "only the other passes", "loses less", "loses more", "fewer layers in float",
        "more layers in float",
    ],
)  # fmt: skip
def test_it_replaces_the_calibrated_file_only_if_it_is_better(
    trained: JudgedFile, before: dict[str, Any], expected: bool
) -> None:
    assert is_better(trained, before) is expected


@pytest.mark.parametrize("with_teacher", [True, False])
def test_the_teacher_of_the_run_teaches_where_the_recipe_wants_it(
    tiny_data: Dataset, tmp_path: Path, with_teacher: bool
) -> None:
    folders = {name: tmp_path / name for name in STAGE.after}
    folders["data"].mkdir()
    tiny_data.save(folders["data"] / "index.json")
    write_json(folders["quantize"] / "quantize.json", [calibrated(0.1, kept=False)])
    recipe = Recipe.model_validate({"data": tiny_data.path, "qad": {"with_teacher": with_teacher}})
    inputs = STAGE.inputs(recipe, folders)
    assert inputs.teachers == ((folders["teacher"] / "teacher.safetensors",) if with_teacher else ())
    assert inputs.student == folders["distill"] / "student.safetensors"
    assert inputs.calibrated["int8-openvino"]["loss"] == {"drop": 0.1}


def test_nothing_is_read_where_it_is_not_needed(tiny_data: Dataset, tmp_path: Path) -> None:
    inputs = Inputs(tmp_path / "no.onnx", tmp_path / "none", tiny_data, (), {"int8-openvino": calibrated(0, kept=True)})
    assert qad(settings(), inputs, out=tmp_path, gate=FixedGate(0.5), log=print) == []
    assert not list(tmp_path.iterdir())


def test_another_network_than_that_of_the_graph_is_one_line(
    tiny_data: Dataset, files: tuple[Path, Path], tmp_path: Path
) -> None:
    other = tmp_path / "other.safetensors"
    save_model(YOLOv5(Architecture.of_scale("p", tiny_data.names)), other)
    with pytest.raises(InputError, match=r"other\.safetensors is not the network of .*model\.onnx"):
        run(tiny_data, (other, files[1]), tmp_path / "out", 0.5, {"int8-openvino": calibrated(0.1, kept=False)})


@pytest.mark.parametrize("missing", ["teachers", "unlabelled"])
def test_a_file_to_learn_from_is_opened_before_the_layers_are_ranked(
    tiny_data: Dataset, files: tuple[Path, Path], tmp_path: Path, missing: str
) -> None:
    class NoGate(FixedGate):
        def maps(self, path: Path, *_: Any) -> np.ndarray:
            raise AssertionError(f"{path} is measured before the files were opened")

    (student, model), absent = files, tmp_path / "absent.pt"
    config = settings(qad={"when": "always"} | ({"unlabelled": absent} if missing == "unlabelled" else {}))
    inputs = Inputs(model, student, tiny_data, (absent,) if missing == "teachers" else (), {})
    with pytest.raises(InputError, match=r"absent\.pt(: no| cannot be read: No) such"):
        qad(config, inputs, out=tmp_path, gate=NoGate(0.5), log=print)


def test_a_strategy_that_trains_the_teacher_is_refused(tiny_data: Dataset, tmp_path: Path) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "qad": {"strategy": "joint"}})
    with pytest.raises(UsageError, match=r"qad\.strategy joint trains the teacher"):
        STAGE.check(recipe.part(Config))


def test_the_size_and_seed_of_the_recipe_are_its_own(tiny_data: Dataset) -> None:
    recipe = Recipe.model_validate({"data": tiny_data.path, "imgsz": 96, "seed": 5, "qad": {"epochs": 3}})
    assert (recipe.qad.imgsz, recipe.qad.seed, recipe.qad.epochs) == (96, 5, 3)
