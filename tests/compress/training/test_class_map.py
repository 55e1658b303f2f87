from __future__ import annotations

import pytest
import torch

from compress.training.class_map import map_classes, map_to_write, require_known
from runtime.errors import UsageError

TEACHER = ("person", "car", "truck")
DATA = ("helmet", "vehicle")
MERGE: dict[str, str | None] = {"car": "vehicle", "truck": "vehicle", "person": None}


def rows(*logits: float, objectness: float = 3.0) -> torch.Tensor:
    return torch.tensor([[0.1, 0.2, 0.3, 0.4, objectness, *logits]])


def test_equal_classes_change_nothing() -> None:
    same = map_classes("it", TEACHER, TEACHER, {})
    raw = rows(1.0, 2.0, 3.0)
    assert same.is_identity
    assert same(raw) is raw


def test_another_order_is_sorted_by_name() -> None:
    found = map_classes("it", ("nut", "bolt"), ("bolt", "nut"), {})
    assert torch.equal(found(rows(1.0, 2.0))[0, 5:], torch.tensor([2.0, 1.0]))
    assert found.first == (1, 0)


def test_merged_classes_have_the_probability_of_their_union() -> None:
    found = map_classes("it", TEACHER, DATA, MERGE)
    for car, truck in ((0.5, -1.0), (-8.0, -9.0), (12.0, 3.0), (60.0, 60.0), (-200.0, -200.0)):
        union = found(rows(-20.0, car, truck).double().float())[0, 6]
        p = [torch.tensor(z, dtype=torch.float64).sigmoid() for z in (car, truck)]
        assert union.isfinite()
        torch.testing.assert_close(union.double().sigmoid(), p[0] + p[1] - p[0] * p[1], rtol=1e-5, atol=1e-12)


def test_a_class_that_the_teacher_lacks_is_not_told() -> None:
    found = map_classes("it", TEACHER, DATA, MERGE)
    assert (found.unknown, found.first, found.dropped) == ((0,), (None, 1), (0,))
    assert found(rows(0.0, 1.0, 2.0))[0, 5].isnan()


def test_an_object_of_a_class_that_the_data_lacks_is_background() -> None:
    found = map_classes("it", TEACHER, DATA, MERGE)
    person, car = found(rows(6.0, -6.0, -7.0)), found(rows(-6.0, 6.0, -7.0))
    assert person[0, 4].sigmoid() < 0.01
    torch.testing.assert_close(car[0, 4], torch.tensor(3.0), rtol=0, atol=0.06)
    half = found(rows(2.0, 2.0, -9.0))[0, 4].sigmoid()
    torch.testing.assert_close(half, torch.tensor(3.0).sigmoid() / 2)
    assert found(rows(-90.0, 90.0, 9.0, objectness=90.0)).nan_to_num(0).isfinite().all()


def test_boxes_stay() -> None:
    assert torch.equal(map_classes("it", TEACHER, DATA, MERGE)(rows(1.0, 1.0, 1.0))[:, :4], rows(0.0)[:, :4])


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"car": "vehicel"}, r"the data has no class 'vehicel'\. Did you mean 'vehicle'"),
        ({"car": None}, r"class_map leaves no class of it for the data\. .*class_map: \{person: null, car: null"),
    ],
)
def test_a_map_that_cannot_be_is_refused(changes: dict[str, str | None], complaint: str) -> None:
    with pytest.raises(UsageError, match=complaint):
        map_classes("it", TEACHER, DATA, changes)


def test_a_class_that_no_teacher_has_is_refused() -> None:
    require_known({"car": None, "nut": None}, [TEACHER, ("nut",)])
    with pytest.raises(UsageError, match=r"no teacher has a class 'cra'\. Did you mean 'car'"):
        require_known({"cra": None}, [TEACHER])


def test_the_hint_shows_the_map_to_write() -> None:
    assert map_to_write(("bolt", "nut"), ("nut", "bolt")).endswith("distill.class_map: {}")
    assert map_to_write(("a", "nut", "b", "c", "d"), ("nut",)).endswith("{a: null, b: null, c: null, ...}")
    renamed = map_to_write(("bird", "person", "airplane", "RBC"), ("rbc", "aeroplane", "bird", "blimp"))
    assert renamed.endswith("{airplane: aeroplane, RBC: rbc, person: null}")
