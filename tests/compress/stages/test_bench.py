from __future__ import annotations

from pathlib import Path

from compress.config import BenchConfig
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, complexity, save_model
from compress.stages.bench import dataset_row, measured_images, torch_row


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
