"""The whole pipeline on a handful of small images: run, skipped, changed, killed, and used on the device."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import cv2
import pytest

from compress.data import index
from compress.data.demo.generate import generate
from compress.data.index import ImageOutcome, index_image
from compress.flavours import FLAVOURS, REFERENCE
from compress.pipeline import ORDER, run_recipe
from compress.recipe import load_recipe
from compress.store import Outcome

EDGESTILL = Path(sys.executable).with_name("edgestill")
RECIPE = """\
name: tiny
data: belt/data.yaml
imgsz: 64
teacher: {scale: n, epochs: 2, batch: 4, val_interval: 2, tensorboard: false}
student: {scale: p}
distill: {epochs: 2, batch: 4, val_interval: 2, tensorboard: false, losses: {soft: 1.0, feat_mse: 0.1}}
quantize: {calibration_images: 4, draws: 2, max_map_drop: 1.0, max_latency_ratio: 1000}
build: {targets: [sm86]}
bench: {latency_samples: 11}
"""
TRAINED = ["data", "teacher", "distill"]
REPORTS = {f"report.{kind}" for kind in ("json", "html", "md", "csv")}

pytestmark = pytest.mark.slow


def run(folder: Path, *arguments: str) -> tuple[list[dict[str, object]], str]:
    """Outcomes of `edgestill run`, and what it said on the way."""
    command = [str(EDGESTILL), "run", "tiny.yaml", "--json", *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout), done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("tiny")
    generate(made / "belt", images=10, size=(96, 96), seed=3)
    (made / "tiny.yaml").write_text(RECIPE)
    return made


@pytest.fixture(scope="module")
def indexed() -> Counter[str]:
    """How often the first run has indexed each image."""
    return Counter()


@pytest.fixture(scope="module")
def first(folder: Path, indexed: Counter[str]) -> list[Outcome]:
    """The outcomes of a first run, in this process, so that its calls can be counted."""

    def counted(image: Path, *arguments: object) -> ImageOutcome:
        indexed[image.relative_to(folder).as_posix()] += 1
        return index_image(image, *arguments)  # type: ignore[arg-type]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(index, "index_image", counted)
        return run_recipe(load_recipe(folder / "tiny.yaml"), folder / "runs/tiny", log=lambda _: None)


def test_a_first_run_does_every_stage(first: list[Outcome]) -> None:
    assert [outcome.stage for outcome in first] == list(ORDER)
    assert not any(outcome.skipped for outcome in first)


def test_a_run_indexes_every_image_once(folder: Path, first: list[Outcome], indexed: Counter[str]) -> None:
    images = [path.relative_to(folder).as_posix() for path in folder.glob("belt/images/[tv][ra]*/*")]
    assert len(images) == 10
    assert indexed == dict.fromkeys(images, 1)


@pytest.mark.parametrize(
    ("stage", "arguments", "more", "fewer"),
    [
        ("export", "--weights runs/tiny/distill/student.safetensors --imgsz 64", set(), {"teacher.onnx"}),
        (
            "quantize",
            "--model runs/tiny/export/model.onnx --set quantize.calibration_images=4 --set draws=2 "
            "--set max_map_drop=1 --set max_latency_ratio=1000 --set bench.latency_samples=11",
            set(),
            set(),
        ),
        ("build", "--model runs/tiny/export/model.onnx --set build.backend=none", set(), set()),
        ("bench", "--model runs/tiny/export/model.onnx --set latency_samples=11", REPORTS, set()),
    ],
)
def test_a_command_alone_leaves_the_files_of_its_stage(
    folder: Path,
    first: list[Outcome],
    tmp_path: Path,
    stage: str,
    arguments: str,
    more: set[str],
    fewer: set[str],
) -> None:
    data = [] if stage == "build" else ["--data", "belt/data.yaml"]
    command = [str(EDGESTILL), stage, *arguments.split(), *data, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    alone, of_run = ({p.name: p for p in where.iterdir()} for where in (tmp_path, folder / "runs/tiny" / stage))
    plans = {name for name in of_run if ".plan" in name}
    assert alone.keys() == (of_run.keys() - {"stage.json"} - fewer - plans) | more
    same = [name for name in alone if name.endswith(".onnx")]
    assert all(alone[name].read_bytes() == of_run[name].read_bytes() for name in same)


def test_a_second_run_skips_every_stage(folder: Path, first: list[Outcome]) -> None:
    outcomes, _ = run(folder)
    assert all(outcome["skipped"] for outcome in outcomes)


def test_a_changed_setting_runs_its_stage_and_later_ones_only(folder: Path, first: list[Outcome]) -> None:
    outcomes, _ = run(folder, "--set", "quantize.draws=1", "--set", "quantize.float_layers=0")
    redone = [outcome["stage"] for outcome in outcomes if not outcome["skipped"]]
    assert redone[0] == "quantize"
    assert set(redone) >= {"quantize", "bench", "report", "bundle"}


def test_force_runs_a_stage_that_is_done(folder: Path, first: list[Outcome]) -> None:
    outcomes, _ = run(folder, "--force", "export", "--until", "export")
    assert [outcome["stage"] for outcome in outcomes if not outcome["skipped"]] == ["export"]


def test_the_bundle_detects_on_a_device_without_torch(folder: Path, first: list[Outcome]) -> None:
    code = (
        "import sys, cv2\nfrom runtime import Detector\n"
        f"image = cv2.imread({str(min((folder / 'belt/images/val').iterdir()))!r})\n"
        f"with Detector.load({str(folder / 'runs/tiny/bundle')!r}, conf=0.0) as detector:\n"
        "    found = detector(image)\n"
        "print(len(found), detector.artifact.file)\n"
        "assert not {'torch', 'onnx', 'compress'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    count, file = done.stdout.split()
    assert int(count) > 0
    assert file.endswith(".onnx")


def test_the_report_holds_every_file_and_its_renderings(folder: Path, first: list[Outcome]) -> None:
    report = json.loads((folder / "runs/tiny/report/report.json").read_text())
    student = {row["precision"] for row in report["models"] if row["role"] == "student"}
    assert student == {REFERENCE, *FLAVOURS}
    assert {row["role"] for row in report["torch"]} == {"teacher", "student"}
    assert [[point["epoch"] for point in training["curves"]] for training in report["training"]] == [[1, 2], [1, 2]]
    assert {loss["name"] for loss in report["distillation"]["losses"]} == {"soft", "feat_mse"}
    assert all(row["latency"]["end_to_end"]["n"] == 11 for row in report["models"])
    assert {path.suffix for path in (folder / "runs/tiny/report").glob("report.*")} == {".json", ".html", ".md", ".csv"}


def test_a_run_killed_in_training_goes_on_and_ends_with_the_same_student(folder: Path, tmp_path: Path) -> None:
    settings = ["--set", "teacher.epochs=1", "--set", "distill.epochs=6", "--until", "distill"]
    straight, _ = run(folder, *settings, "--out", str(tmp_path / "straight"))
    killed = tmp_path / "killed"
    command = [str(EDGESTILL), "run", "tiny.yaml", *settings, "--out", str(killed)]
    process = subprocess.Popen(command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while not list(killed.glob(".work/distill-*/state.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (killed / "distill").exists()
    outcomes, _ = run(folder, *settings, "--out", str(killed))
    assert [outcome["skipped"] for outcome in outcomes] == [True, True, False]
    assert len(straight) == 3
    student = [path / "distill" / "student.safetensors" for path in (tmp_path / "straight", killed)]
    assert student[0].read_bytes() == student[1].read_bytes()


def test_frames_with_the_letterbox_baked_in_go_through_the_pipeline(
    folder: Path, first: list[Outcome], tmp_path: Path
) -> None:
    out = str(tmp_path / "frame")
    for stage in TRAINED:
        shutil.copytree(folder / "runs/tiny" / stage, tmp_path / "frame" / stage)
    short = ["--set", "quantize.flavours=[int8-ort]", "--set", "quantize.float_layers=0"]
    outcomes, _ = run(folder, "--set", "export.frame=[96, 96]", "--set", "build.backend=none", *short, "--out", out)
    assert [outcome["stage"] for outcome in outcomes if outcome["skipped"]] == TRAINED
    from runtime import Detector

    image = cv2.imread(str(min((folder / "belt/images/val").iterdir())))
    with Detector.load(f"{out}/bundle", conf=0.0) as detector:
        assert detector.card.frame_hw == (96, 96)
        assert len(detector(image)) > 0
    command = [str(EDGESTILL), "run", "tiny.yaml", "--set", "export.frame=[48, 80]", "--out", out]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    assert done.returncode == 1
    assert "another size" in done.stderr.splitlines()[-1]
