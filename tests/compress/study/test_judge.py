from __future__ import annotations

from pathlib import Path

import pytest
import torch

from compress.config import Recipe
from compress.data import Dataset
from compress.models import Architecture, YOLOv5, save_model
from compress.study.judge import accuracy_of, teacher_accuracy_of

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_teacher_of_other_classes_is_judged_by_those_that_they_are_for_the_data(
    tiny_data: Dataset, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    network = YOLOv5(Architecture.of_scale("p", tiny_data.names))
    state = network.state_dict()
    files = {}
    for names in (tiny_data.names, ("crimson", "lime")):
        same = YOLOv5(Architecture.of_scale("p", names))
        same.load_state_dict(state)
        files[names] = tmp_path / f"{names[0]}.safetensors"
        save_model(same, files[names], {})
    class_map = {"crimson": "red", "lime": "green"}
    recipe = Recipe.model_validate(
        {"data": tiny_data.path, "imgsz": 64, "device": "cpu", "distill": {"class_map": class_map | {"far": None}},
         "study": {"split": "val"}}
    )  # fmt: skip
    own, other = files.values()
    expected = accuracy_of(own, recipe, tiny_data)
    assert expected["map50"] > 0
    assert teacher_accuracy_of(other, recipe, tiny_data) == pytest.approx(expected, abs=1e-6)
    assert teacher_accuracy_of(own, recipe, tiny_data) == expected
