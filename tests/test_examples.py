"""Every example runs, on small inputs, as its docstring says."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import camera_loop
import cv2
import files_to_json
import numpy as np
import pytest
import read_report
import toys

REPOSITORY = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((REPOSITORY / "examples").glob("*.py"))
WHITE = np.full((48, 64, 3), 255, np.uint8)


def python(*arguments: object) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    return subprocess.run(
        [sys.executable, *map(str, arguments)], capture_output=True, text=True, timeout=300, env=environment
    )


@pytest.fixture
def model(tmp_path: Path) -> str:
    """A detector that sees a bolt and a nut on white."""
    return str(toys.canvas_model(tmp_path / "toy.onnx"))


@pytest.fixture
def video(tmp_path: Path) -> str:
    """Six white frames."""
    path = str(tmp_path / "white.avi")
    writer = cv2.VideoWriter(path, cv2.VideoWriter.fourcc(*"MJPG"), 10, (64, 48))
    for _ in range(6):
        writer.write(WHITE)
    writer.release()
    return path


def test_the_readme_lists_every_example() -> None:
    listed = re.findall(r"^\| \[(\w+\.py)\]", (REPOSITORY / "examples/README.md").read_text(), re.MULTILINE)
    assert sorted(listed) == [path.name for path in EXAMPLES]


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_says_how_to_run_it_and_has_help(example: Path) -> None:
    assert f"python examples/{example.name} " in ast.get_docstring(ast.parse(example.read_text()))
    done = python(example, "--help")
    assert done.returncode == 0, done.stderr
    assert done.stdout.lower().startswith(f"usage: {example.name} ")


def test_a_video_is_detected_to_its_end_with_its_rate(
    model: str, video: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        camera_loop.main([video, "--model", model, "--every", "3"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["frame 2: 2 objects", "frame 5: 2 objects"]
    assert all(re.search(r", \d+\.\d FPS$", line) for line in lines)


class Camera:
    """Gives so many white frames, then none."""

    def __init__(self, count: int) -> None:
        self.count = count

    def get(self, _key: int) -> float:
        return 0.0

    def grab(self) -> bool:
        self.count -= 1
        return self.count >= 0

    def retrieve(self) -> tuple[bool, np.ndarray]:
        return True, WHITE

    def release(self) -> None: ...


def test_a_camera_that_drops_out_is_connected_again_until_it_stays_away(
    model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts = iter([2, 0, 1, 0, 0, 1])  # the frames of each connection
    monkeypatch.setattr("cv2.VideoCapture", lambda _number: Camera(next(counts)))
    monkeypatch.setattr("runtime.frames.RECONNECT_PAUSE_S", 0)
    with pytest.raises(SystemExit, match="1"):
        camera_loop.main(["0", "--model", model, "--every", "1", "--reconnect", "2"])
    shown = capsys.readouterr()
    assert [line.split(":")[0] for line in shown.out.splitlines()] == ["frame 0", "frame 1", "frame 2"]
    assert shown.err.count("connecting again") == 4
    assert list(counts) == [1]  # two attempts in a row had failed


def test_a_model_that_is_not_there_is_one_line(video: str) -> None:
    for example in ("camera_loop.py", "files_to_json.py"):
        done = python(REPOSITORY / "examples" / example, "--model", "none.onnx", video)
        assert done.returncode == 1
        assert done.stderr.startswith("error: none.onnx")
        assert len(done.stderr.splitlines()) == 1


def test_a_batch_of_files_is_one_json_that_names_the_unreadable(model: str, tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    cv2.imwrite(str(images / "a.png"), WHITE)
    cv2.imwrite(str(images / "b.png"), np.zeros_like(WHITE))
    (images / "c.png").write_bytes(b"no image")
    with pytest.raises(SystemExit, match="1"):
        files_to_json.main([str(images), "--model", model, "--out", str(tmp_path / "found.json")])
    found = json.loads((tmp_path / "found.json").read_text())
    assert [box["name"] for box in found["images"][str(images / "a.png")]] == ["nut", "bolt"]
    assert found["images"][str(images / "b.png")] == []
    assert [reason.split(": ")[0] for reason in found["skipped"]] == [str(images / "c.png")]


def test_a_report_is_a_table_with_a_row_for_each_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    timed = {"accuracy": {"map50_95": 0.61}, "latency": {"end_to_end": {"p50": 30.0}}}
    untimed = {"accuracy": None, "latency": None}
    teacher = {"file": "teacher.onnx", "role": "teacher", "precision": "fp32", "bytes": 7_500_000, **timed}
    student = {"file": "model.onnx", "role": "student", "precision": "fp32", "bytes": 2_100_000, **timed}
    student["latency"] = {"end_to_end": {"p50": 10.0}}
    plan = {"file": "model.plan", "role": "student", "precision": "fp16", "bytes": 1_000_000, **untimed}
    (tmp_path / "report.json").write_text(json.dumps({"models": [teacher, student, plan]}))
    read_report.main([str(tmp_path / "report.json")])
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[1:] == [
        ["teacher.onnx", "teacher", "fp32", "7.5", "0.6100", "30.00", "1.00x"],
        ["model.onnx", "student", "fp32", "2.1", "0.6100", "10.00", "3.00x"],
        ["model.plan", "student", "fp16", "1.0", "-", "-", "-"],
    ]


@pytest.mark.slow
def test_a_student_is_distilled_with_the_custom_loss(tmp_path: Path) -> None:
    example = REPOSITORY / "examples/custom_loss.py"
    data = tmp_path / "belt"
    assert python(example, "data", "make", data, "--images", 8, "--size", 64).returncode == 0
    short = ("--data", data / "data.yaml", "--imgsz", 64, "--epochs", 1, "--batch", 4, "--exist-ok")
    taught = python(example, "train", *short, "--scale", "n", "--project", tmp_path, "--name", "teacher")
    assert taught.returncode == 0, taught.stderr
    done = python(
        example, "distill", *short, "--scale", "p", "--teacher", tmp_path / "teacher/best.safetensors",
        "--project", tmp_path, "--name", "student", "--set", "distill.losses={soft: 1, objectness_l1: 0.5}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "objectness_l1" in (tmp_path / "student/results.csv").read_text().splitlines()[0]
