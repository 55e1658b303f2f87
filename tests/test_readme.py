"""Every command block of the README runs, in its order, on a small data set."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
README = (REPOSITORY / "README.md").read_text()
BLOCKS = re.findall(r"^```(bash|python)\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
SHORT = (
    "--set teacher.epochs=1 --set distill.epochs=1 --set bench.latency_samples=11 --set quantize.calibration_images=4"
    " --set export.max_box_error=1 --set quantize.draws=1 --set quantize.float_layers=0"
)
SMALLER = {
    r"--imgsz 320": "--imgsz 64",
    r"--imgsz 384 640": "--imgsz 64 96",
    r"map50_95<0\.30": "map50_95<0",
    r"--epochs \d+": "--epochs 1",
    r"(edgestill run \S+)": rf"\1 {SHORT} --set quantize.max_map_drop=1",
    r"--seeds 5 --jobs 2": "--seeds 1 --arms scratch,soft --set distill.epochs=1",
    r"(edgestill export )": r"\1--set max_box_error=1 ",
    r"(edgestill bench )": r"\1--set latency_samples=11 ",
    r"(--quantize \S+)": r"\1 --epochs 1 --set quantize.calibration_images=4 --set quantize.float_layers=0"
    " --set quantize.draws=1 --set quantize.max_map_drop=1 --set export.max_box_error=1 --set bench.latency_samples=11",
    r"(edgestill quantize )": r"\1--set calibration_images=4 --set max_map_drop=1 --set draws=1 --set float_layers=0 ",
}
"""How a command that takes minutes becomes one that takes seconds; what it does stays.

One epoch on ten images may end in boxes of thousands of pixels, whose last bits are more than 0.05 pixels."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a reader: a data.yaml with images, and a checkpoint."""
    from compress.data.demo.generate import generate

    made = tmp_path_factory.mktemp("readme") / "job"
    generate(made, images=10, size=(96, 96), seed=1)
    shutil.copyfile(min((made / "images/val").iterdir()), made / "images/val/0.jpg")
    return made


def runnable(line: str, *, has_weights: bool) -> str:
    for pattern, smaller in SMALLER.items():
        line = re.sub(pattern, smaller, line)
    return (
        line
        if has_weights
        else line.replace("--weights yolov5n.pt", "").replace("train --data", "train --scale n --data")
    )


def run(command: list[str], cwd: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        command, cwd=cwd, capture_output=True, text=True, timeout=500,
        env=os.environ | {"PATH": path, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, f"{command}: {done.stderr[-2000:]}"


def test_every_make_target_of_the_readme_exists() -> None:
    targets = re.findall(r"^make (\w+)", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        subprocess.run(["make", "--dry-run", target], cwd=REPOSITORY, check=True, capture_output=True)


@pytest.mark.slow
def test_every_other_block_runs(folder: Path) -> None:
    weights = Path(os.environ.get("EDGESTILL_SHARED", REPOSITORY.parent / "shared")) / "yolov5/weights/yolov5n.pt"
    if weights.is_file():
        shutil.copyfile(weights, folder / "yolov5n.pt")
    for language, block in BLOCKS:
        if language == "python":
            run([sys.executable, "-c", block], folder)
            continue
        for line in filter(None, block.splitlines()):
            if not line.startswith("make "):
                run(["bash", "-c", runnable(line, has_weights=weights.is_file())], folder)


def test_the_picture_is_there() -> None:
    for picture in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", README):
        assert (REPOSITORY / picture).stat().st_size < 512 << 10
