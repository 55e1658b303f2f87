from __future__ import annotations

from pathlib import Path

import pytest

from compress.config import BenchConfig
from compress.data import Dataset
from compress.inputs import MeasuredFile
from compress.models import Architecture, YOLOv5, complexity, save_model
from compress.stages.bench import Config, Inputs, dataset_row, measured_images, run, torch_row
from runtime.files import read_json
from tests.runtime.toys import canvas_model, card


def test_the_report_tells_of_the_images_that_were_measured_and_no_others(tiny_data: Dataset) -> None:
    val = tiny_data.splits["val"]
    whole, three = (dataset_row(tiny_data, measured_images(BenchConfig(max_images=n), tiny_data)) for n in (0, 3))
    assert (whole["images"], whole["instances"]) == (4, val.boxes)
    assert (three["images"], three["instances"]) == (3, sum(len(sample.labels) for sample in val.samples[:3]))
    assert whole["sha256"] != three["sha256"]


def test_torch_rows_count_the_shape_of_the_files_and_name_the_size_they_were_measured_at(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    network = YOLOv5(Architecture.of_scale("p", tiny_data.names))
    file = tmp_path / "student.safetensors"
    save_model(network, file)
    samples = tiny_data.splits["val"].samples[:2]
    row = torch_row("student", file, samples, 64, (32, 96), lambda _: None)
    assert row["gflops"] == 2e-9 * complexity(network.arch, (32, 96)).macs
    assert "at 64 pixels" in row["note"]


@pytest.mark.parametrize(
    ("precision", "asked", "ran"),
    [
        ("fp32", "auto", "onnx"),
        ("fp32", "openvino", "openvino"),
        ("int8-openvino", "auto", "openvino"),
        ("int8-openvino", "onnx", "onnx"),
    ],
)
def test_a_row_tells_what_ran_its_file(
    tiny_data: Dataset, tmp_path: Path, precision: str, asked: str, ran: str
) -> None:
    pytest.importorskip("openvino")
    model = canvas_model(tmp_path / "a.onnx", card(names=tiny_data.names, precision=precision))
    config = Config(bench=BenchConfig(latency_samples=11, warmup_ms=0))
    run(config, Inputs([MeasuredFile(model)], tiny_data, backend=asked), tmp_path, lambda _: None)
    (row,) = read_json(tmp_path / "bench.json")["models"]
    assert (row["backend"], row["device"], row["settings"]["as_written"]) == (ran, "cpu", False)
    assert ("made for OpenVINO" in row["note"]) == (precision == "int8-openvino" and asked == "onnx")


def test_the_files_of_a_run_take_turns_with_fp32(tiny_data: Dataset, tmp_path: Path) -> None:
    own = card(names=tiny_data.names)
    files = [MeasuredFile(canvas_model(tmp_path / f"{role}.onnx", own), role) for role in ("teacher", "student")]
    config, told = Config(bench=BenchConfig(latency_samples=11, warmup_ms=0)), []
    run(config, Inputs(files, tiny_data), tmp_path, told.append)
    rows = read_json(tmp_path / "bench.json")["models"]
    assert [row["latency"]["ratio"]["of"] for row in rows] == ["student.onnx"] * 2
    assert [len(row["latency"]["rounds"]) for row in rows] == [11, 11]
    assert told[0] == "timing 2 files in turns"
    assert " of student.onnx (end to end, n 11)" in told[1]
    assert told[2].endswith(" ms (end to end, n 11)")
