from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress.data import Dataset
from compress.validate_file import FileAccuracy, validate_file
from runtime.errors import UsageError
from tests.runtime.toys import canvas_model, card


def validate(data: Dataset, weights: Path, backend: str) -> FileAccuracy:
    options: dict[str, Any] = {
        "split": "val", "imgsz": 64, "batch": 4, "rect": False, "conf": 0.001, "iou": 0.6, "max_det": 300,
        "single_label": False, "annotations": None, "half": False, "device": "cpu",
    }  # fmt: skip
    return validate_file(data=data.path, weights=weights, backend=backend, **options)


@pytest.mark.parametrize(("backend", "told"), [("auto", ""), ("onnx", ", in onnx"), ("openvino", ", in openvino")])
def test_a_shipped_file_is_measured_in_the_backend_that_is_named(
    tiny_data: Dataset, tmp_path: Path, backend: str, told: str
) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    found = validate(tiny_data, canvas_model(tmp_path / "a.onnx", card(names=("red", "green"))), backend)
    assert found.to_text().splitlines()[0].endswith(f"boxes of the labels{told}")
    assert found.coco.images == 4


def test_a_checkpoint_is_not_run_by_a_backend_of_files(tiny_data: Dataset, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"best\.pt is a checkpoint, which torch runs"):
        validate(tiny_data, tmp_path / "best.pt", "openvino")
