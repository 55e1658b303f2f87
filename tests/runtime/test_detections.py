from __future__ import annotations

import json

import numpy as np
import pytest

from runtime import detections
from runtime.detections import Detections, draw

ROWS = np.array([[10, 20, 30, 40, 0.9, 1], [0, 0, 5.25, 6, 0.5, 7]], np.float32)


def test_they_count_iterate_and_slice():
    found = Detections.from_rows(ROWS)
    assert len(found) == 2
    assert [one.class_id for one in found] == [1, 7]
    assert next(iter(found)).xyxy == (10, 20, 30, 40)
    assert found[found.score > 0.6].class_id.tolist() == [1]
    assert found[1].class_id.tolist() == [7]
    assert found[[1, 0]].class_id.tolist() == [7, 1]
    assert len(found[:0]) == 0 == len(Detections.empty())


def test_dtypes_are_the_promised_ones():
    found = Detections(ROWS[:, :4].astype(float).tolist(), [1, 0], [0.0, 1.0])
    assert (found.xyxy.dtype, found.score.dtype, found.class_id.dtype) == (np.float32, np.float32, np.int64)


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"xyxy": np.zeros((3, 4))}, "shapes"),
        ({"xyxy": np.full((2, 4), np.nan)}, "finite"),
        ({"xyxy": np.array([[5, 0, 4, 9], [0, 0, 1, 1]])}, "corner"),
        ({"score": [0.5, 1.5]}, "score"),
        ({"score": [0.5, np.nan]}, "score"),
        ({"class_id": [0, -1]}, "class"),
    ],
)
def test_impossible_values_are_refused(change, word):
    values = {"xyxy": ROWS[:, :4], "score": ROWS[:, 4], "class_id": ROWS[:, 5]} | change
    with pytest.raises(ValueError, match=word):
        Detections(**values)


def test_the_list_is_json_and_names_what_it_can():
    listed = Detections.from_rows(ROWS).to_list(["bolt", "nut"])
    assert json.loads(json.dumps(listed)) == listed
    assert [entry["name"] for entry in listed] == ["nut", "7"]
    assert listed[1]["box"] == [0, 0, 5.25, 6]


def test_a_name_without_letters_in_opencv_is_drawn_as_its_class_number(monkeypatch):
    known = detections.has_glyph("\u87ba")  # version 5 brings a font for Chinese, version 4 has ASCII only
    assert detections.drawn_name(0, ["\u87ba\u6813"]) == ("\u87ba\u6813" if known else "class 0")
    assert detections.drawn_name(1, ["bolt", "\U0010ffff"]) == "class 1"
    assert detections.drawn_name(0, ["bolt"]) == "bolt"
    assert detections.label_problem(["bolt", "\U0010ffff"]).endswith("1 is \U0010ffff")
    assert detections.label_problem(["bolt"]) == ""


def test_drawing_leaves_the_image_alone_and_paints_near_the_box():
    image = np.zeros((100, 100, 3), np.uint8)
    drawn = draw(image, Detections.from_rows(ROWS), ["bolt", "nut"])
    assert not image.any()
    assert drawn[20, 10:30].any()
    assert not drawn[60:, 60:].any()
    assert np.array_equal(draw(image, Detections.empty()), image)
