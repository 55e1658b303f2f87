from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from compress.config import NoSettings
from compress.flavours import FLAVOURS
from compress.stages.bundle import run
from runtime.bundle import model_files
from runtime.card import Artifact, Batches, ModelCard
from runtime.errors import EngineError, InputError
from runtime.files import sha256
from runtime.layers import EngineLayer, TensorType, read_layers, save_layers
from tests.runtime.toys import canvas_model, card

MINE = card()


def plan_in(folder: Path, identity: str) -> Artifact:
    plan = folder / "toy.fp32.plan"
    plan.write_bytes(b"vtrt")
    return Artifact(plan.name, sha256(plan), 4, "fp32", "tensorrt_rtx", ("sm86",), identity=identity)


@pytest.fixture
def folders(tmp_path: Path) -> dict[str, Path]:
    """Folders of the earlier stages, as they stand before the bundle is made, all of one model."""
    made = {name: tmp_path / name for name in ("export", "quantize", "qad", "build", "bench", "report")}
    for folder in made.values():
        folder.mkdir()
    canvas_model(made["export"] / "model.onnx", MINE)
    entry = {"name": "fp32", "file": "model.onnx", "kept": True, "reason": ""}
    (made["quantize"] / "quantize.json").write_text(json.dumps([entry]))
    (made["qad"] / "qad.json").write_text("[]")
    card(artifacts=(plan_in(made["build"], MINE.identity),)).save(made["build"] / "model.json")
    measured(made, sha256(made["export"] / "model.onnx"))
    (made["report"] / "report.html").write_text("<html>")
    return made


def measured(folders: dict[str, Path], digest: str) -> None:
    write_bench(folders, [row("fp32", digest, 1.0)])


def row(precision: str, digest: str, ratio: float, *, as_written: bool = False) -> dict[str, object]:
    return {
        "role": "student",
        "precision": precision,
        "latency": {"ratio": {"of": "model.onnx", "ratio": ratio, "low": ratio, "high": ratio}},
        "settings": {"as_written": as_written},
        "sha256": digest,
    }


def write_bench(folders: dict[str, Path], rows: list[dict[str, object]]) -> None:
    document = {"models": rows, "machine": {"cpu": "Toy CPU", "platform": "linux-toy"}}
    (folders["bench"] / "bench.json").write_text(json.dumps(document))


def bundle(folders: dict[str, Path], out: Path) -> Path:
    out.mkdir()
    run(NoSettings(), folders, out, lambda _: None)
    return out


def test_every_file_of_a_bundle_is_of_its_model(folders: dict[str, Path], tmp_path: Path) -> None:
    plan = folders["build"] / "toy.fp32.plan"
    layers = (EngineLayer("c", "correlation", ("stem",), (TensorType("Half", (1, 8)),), ()),)
    save_layers(plan, sha256(plan), layers)
    files = model_files(bundle(folders, tmp_path / "bundle"))
    assert [file.path.name for file in files] == ["toy.fp32.plan", "model.onnx"]
    assert read_layers(files[0].path, sha256(plan)) == layers
    assert {file.artifact.identity for file in files if file.artifact} == {MINE.identity}
    assert ModelCard.load(tmp_path / "bundle").identity == MINE.identity
    assert "python -m runtime build model.onnx" in (tmp_path / "bundle" / "README.txt").read_text()


@pytest.mark.parametrize(
    ("is_timed", "order"),
    [
        (True, [("int8-openvino", "openvino"), ("fp32", "onnx"), ("int8-ort", "onnx"), ("fp16", "onnx")]),
        (False, [("fp32", "onnx"), ("int8-ort", "onnx"), ("fp16", "onnx"), ("int8-openvino", "openvino")]),
    ],
)
def test_files_of_cpus_come_in_the_order_of_their_latency_in_the_library_that_runs_them(
    folders: dict[str, Path], tmp_path: Path, is_timed: bool, order: list[tuple[str, str]]
) -> None:
    ratios = {"fp32": 1.0, "fp16": 0.05, "int8-openvino": 0.5, "int8-ort": 1.5}
    written = {"fp16"} if is_timed else {"fp16", "int8-openvino"}
    files = {"fp32": folders["export"] / "model.onnx"}
    for name in ratios:
        if name != "fp32":
            made_for = {"backend": FLAVOURS[name].backend, "devices": FLAVOURS[name].devices}
            own = replace(MINE, precision=name, **made_for)
            files[name] = canvas_model(folders["quantize"] / f"model.{name}.onnx", own)
    entries = [{"name": name, "file": file.name, "kept": True, "reason": ""} for name, file in files.items()]
    (folders["quantize"] / "quantize.json").write_text(json.dumps(entries))
    write_bench(folders, [row(n, sha256(f), ratios[n], as_written=n in written) for n, f in files.items()])
    out = bundle(folders, tmp_path / "bundle")
    listed = ModelCard.load(out).artifacts[1:]
    assert [(item.precision, item.backend) for item in listed] == order
    assert all(item.devices == FLAVOURS[item.precision].devices for item in listed if item.precision != "fp32")
    readme = (out / "README.txt").read_text()
    assert "for CPUs was measured on Toy CPU (linux-toy)" in readme
    assert "python -m runtime build model.fp16.onnx" in readme
    assert f"pip install 'edgestill[{'openvino' if is_timed else 'cpu'}]'" in readme
    assert ModelCard.load(out).provenance["order_measured_on"] == "Toy CPU (linux-toy)"


def test_a_plan_of_another_model_is_not_shipped(folders: dict[str, Path], tmp_path: Path) -> None:
    card(artifacts=(plan_in(folders["build"], "a" * 64),)).save(folders["build"] / "model.json")
    with pytest.raises(EngineError, match="was made of model aaaaaaaaaaaa"):
        bundle(folders, tmp_path / "bundle")


def test_figures_of_another_file_are_not_shipped(folders: dict[str, Path], tmp_path: Path) -> None:
    measured(folders, "a" * 64)
    with pytest.raises(InputError, match="not the file that was measured"):
        bundle(folders, tmp_path / "bundle")


def test_each_file_of_a_bundle_tells_its_own_batches(folders: dict[str, Path], tmp_path: Path) -> None:
    model = canvas_model(folders["export"] / "model.onnx", card(batches=Batches(1, None)))
    measured(folders, sha256(model))
    plan = replace(plan_in(folders["build"], MINE.identity), batches=Batches(1, 8))
    card(artifacts=(plan,)).save(folders["build"] / "model.json")
    files = model_files(bundle(folders, tmp_path / "bundle"))
    assert [file.card.batches for file in files if file.card] == [(1, 8), (1, None)]
