from __future__ import annotations

import pytest

from compress.stages.report import require_one_model
from runtime.errors import InputError
from tests.runtime.toys import card


def test_rows_of_one_student_and_its_plans_are_one_model() -> None:
    mine, other = card(), card(iou=0.45)
    teacher = {"role": "teacher", "file": "teacher.onnx", "identity": "a" * 64}
    student = {"role": "student", "file": "model.onnx", "identity": mine.identity}
    require_one_model([teacher, student, student], mine)
    with pytest.raises(InputError, match=f"model.onnx is of model {mine.identity[:12]}, the plans are of"):
        require_one_model([teacher, student], other)
    with pytest.raises(InputError, match=f"{other.identity[:12]}"):
        require_one_model([student, student | {"identity": other.identity}], mine)
