from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.data.labels import label_path, parse_labels, read_labels


def test_boxes_are_read_in_file_order() -> None:
    labels, problems = parse_labels(["1 0.5 0.5 0.2 0.1", "", "  0\t0.25 0.75 .5 5e-1 \r"], nc=2)
    np.testing.assert_allclose(labels, [[1, 0.5, 0.5, 0.2, 0.1], [0, 0.25, 0.75, 0.5, 0.5]])
    assert labels.dtype == np.float32
    assert not problems


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ("2 0.5 0.5 0.2 0.1", "class 2, expected 0 to 1"),
        ("-1 0.5 0.5 0.2 0.1", "class -1"),
        ("0.5 0.5 0.5 0.2 0.1", "not a whole number"),
        ("nan 0.5 0.5 0.2 0.1", "not a whole number"),
        ("0 nan 0.5 0.2 0.1", "coordinate nan"),
        ("0 0.5 inf 0.2 0.1", "coordinate inf"),
        ("0 0.5 0.5 1.01 0.1", "coordinate 1.01"),
        ("0 -0.2 0.5 0.2 0.1", "coordinate -0.2"),
        ("0 320 240 50 60", "coordinate 320"),
        ("0 0.5 0.5 0 0.1", "width 0"),
        ("0 0.5 0.5 0.2", "4 columns"),
        ("0 0.5 0.5 0.2 0.1 0.9", "6 columns"),
        ("0 0.1 0.1 0.2 0.2 0.3 0.3 0.4", "8 columns"),
        ("0 0.1 0.1 0.1 0.2 0.1 0.3", "width 0"),
        ("cat 0.5 0.5 0.2 0.1", "not all numbers"),
        ("\x00\x01 \ufffd 1 2 3", "not all numbers"),
        ("0,0.5,0.5,0.2,0.1", "1 columns"),
    ],
)
def test_a_bad_row_is_named_by_its_line_and_only_it_is_skipped(row: str, what: str) -> None:
    good = "1 0.5 0.5 0.2 0.1"
    labels, problems = parse_labels(["", good, row, "0 0.1 0.1 0.1 0.1"], nc=2)
    assert len(labels) == 2
    assert [problem.line for problem in problems] == [3]
    assert what in problems[0].what
    assert problems[0].what.isprintable()


def test_repeated_rows_are_kept_once() -> None:
    labels, problems = parse_labels(["0 0.5 0.5 0.2 0.1"] * 3 + ["0 0.5 0.5 0.2 0.10"], nc=1)
    assert len(labels) == 1
    assert [problem.line for problem in problems] == [2, 3, 4]


def test_polygons_become_their_bounding_boxes() -> None:
    labels, problems = parse_labels(["1 0.1 0.2 0.5 0.2 0.5 0.6 0.1 0.4"], nc=2)
    np.testing.assert_allclose(labels, [[1, 0.3, 0.4, 0.4, 0.4]], atol=1e-6)
    assert not problems


def test_key_points_may_have_a_visibility_and_any_place() -> None:
    labels, problems = parse_labels(
        ["0 0.5 0.5 0.2 0.1 0.4 0.4 2 -0.1 1.2 0", "0 0.1 0.1 0.2 0.2"], 1, keypoint_values=6
    )
    np.testing.assert_allclose(labels, [[0, 0.5, 0.5, 0.2, 0.1], [0, 0.1, 0.1, 0.2, 0.2]])
    assert not problems


@given(st.lists(st.text(), max_size=5), st.integers(1, 3))
def test_any_text_gives_valid_boxes_or_problems(lines: list[str], nc: int) -> None:
    labels, problems = parse_labels(lines, nc)
    assert labels.shape[1] == 5
    assert np.isfinite(labels).all()
    assert len(labels) + len(problems) <= len(lines)


@given(st.lists(st.tuples(st.integers(0, 4), *[st.floats(0.001, 1)] * 4), unique=True, max_size=20))
def test_written_boxes_are_read_back(rows: list[tuple[float, ...]]) -> None:
    labels, problems = parse_labels([" ".join(map(repr, row)) for row in rows], nc=5)
    np.testing.assert_allclose(labels, np.array(rows).reshape(-1, 5), rtol=1e-6)
    assert not problems


@pytest.mark.parametrize(
    ("image", "label"),
    [
        ("/d/images/train/a.jpg", "/d/labels/train/a.txt"),
        ("/images/x/images/a.b.png", "/images/x/labels/a.b.txt"),
        ("/d/pictures/a.jpg", "/d/pictures/a.txt"),
        ("/d/myimages/a.jpg", "/d/myimages/a.txt"),
    ],
)
def test_the_label_lies_beside_the_last_images_folder(image: str, label: str) -> None:
    assert label_path(Path(image)) == Path(label)


def test_a_missing_label_file_is_background_and_an_unreadable_one_is_reported(tmp_path: Path) -> None:
    assert read_labels(tmp_path / "none.txt", 1)[1] == []
    (tmp_path / "folder.txt").mkdir()
    labels, problems = read_labels(tmp_path / "folder.txt", 1)
    assert len(labels) == 0
    assert problems[0].line == 0


def test_the_public_labels_of_coco128_have_no_problem(shared: Path) -> None:
    files = sorted((shared / "data/coco128/labels/all").glob("*.txt"))
    parsed = [read_labels(file, 80) for file in files]
    assert sum(len(labels) for labels, _ in parsed) == 929
    assert not [problem for _, problems in parsed for problem in problems]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
def test_lines_may_end_in_any_way(tmp_path: Path, end: str) -> None:
    rows = ("0 0.5 0.5 0.1 0.1", "1 0.2 0.2 0.1 0.1", "0 0.7 0.7 0.1 0.1", "9 0.5 0.5 0.1 0.1")
    (tmp_path / "a.txt").write_bytes(end.join(rows).encode())
    labels, problems = read_labels(tmp_path / "a.txt", nc=2)
    np.testing.assert_allclose(labels[:, :2], [[0, 0.5], [1, 0.2], [0, 0.7]])
    assert [problem.line for problem in problems] == [4]
