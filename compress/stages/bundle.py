"""Bundle: what to copy to the device, in the order in which the device should try it.

In: the folders of earlier stages. Out: every kept file, `model.json`, `report.html` and a README, loadable by
`runtime.Detector.load`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from compress.config import NoSettings
from compress.flavours import FLAVOURS, REFERENCE
from compress.inputs import kept_files, read_json
from compress.log import Log
from compress.stages import Figures, Stage
from compress.store import Folders
from runtime.bundle import card_of, model_files, problems
from runtime.card import CARD_FILE, Artifact, ModelCard
from runtime.detector import Detector
from runtime.errors import EngineError, InputError
from runtime.files import sha256

README = """\
edgestill bundle "{name}": {classes} classes, {size} pixels, mAP and latency in report.html.

Run it on the device (Python 3.10+, NumPy, OpenCV, and ONNX Runtime or TensorRT):

    pip install 'edgestill[cpu]'          # or edgestill[gpu], edgestill[rtx]
    python -m runtime detect --model . image.jpg

    from runtime import Detector
    with Detector.load(".") as detector:
        detections = detector(frame)      # uint8 (H, W, 3) BGR

model.json lists the files in order of preference; the first one that works on the machine is used. For an engine
that fits the device's own GPU and TensorRT:

    python -m runtime build model.fp16.onnx
"""


def run(_: NoSettings, folders: Folders, out: Path, log: Log) -> Figures:
    """Copy every kept file into `out`, write the card that lists them, check it, and load the bundle once.

    Raises InputError when the measurements are of another file, EngineError when a file is of another model.
    """
    models = kept_files(folders)
    plans = ModelCard.load(folders["build"]).artifacts
    reference = card_of(models[REFERENCE])
    order = _by_latency(models, folders["bench"])
    onnx = [_copied(precision, models[precision], out) for precision in order]
    for plan in plans:
        shutil.copyfile(folders["build"] / plan.file, out / plan.file)
    card = replace(reference, artifacts=(*plans, *onnx))
    card.save(out / CARD_FILE)
    shutil.copyfile(folders["report"] / "report.html", out / "report.html")
    text = README.format(name=card.name, classes=len(card.names), size="x".join(map(str, card.size_hw)))
    (out / "README.txt").write_text(text)
    if wrong := [problem for file in model_files(out) for problem in problems(file)]:
        raise EngineError(wrong[0])
    with Detector.load(out, device="cpu") as detector:
        runs = detector.artifact.file if detector.artifact else ""
    log(f"bundle: {len(card.artifacts)} files; this machine runs {runs}")
    return {"files": len(card.artifacts)}


def _copied(precision: str, source: Path, out: Path) -> Artifact:
    target, card = out / source.name, card_of(source)
    shutil.copyfile(source, target)
    return Artifact(
        target.name, sha256(target), target.stat().st_size, precision, "onnx",
        identity=card.identity, batches=card.batches,
    )  # fmt: skip


def _by_latency(models: Mapping[str, Path], bench: Path) -> list[str]:
    """Fastest first, as measured on the CPU that ran the benchmark; flavours for other hardware last."""
    rows = [row for row in read_json(bench / "bench.json")["models"] if row["role"] == "student"]
    p50 = {row["precision"]: row["latency"]["end_to_end"]["p50"] for row in rows}
    measured = {row["sha256"] for row in rows}
    if changed := [file for file in models.values() if sha256(file) not in measured]:
        raise InputError(f"{changed[0]} is not the file that was measured", "Run again with --force bench")
    elsewhere = {flavour.name for flavour in FLAVOURS.values() if not flavour.for_this_cpu}
    return sorted(models, key=lambda precision: (precision in elsewhere, p50[precision]))


STAGE = Stage(
    "bundle",
    settings=NoSettings,
    inputs=lambda _, folders: folders,
    run=run,
    after=("export", "quantize", "qad", "build", "bench", "report"),
)
