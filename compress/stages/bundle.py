"""Bundle: what to copy to the device, in the order in which the device should try it.

In: the folders of earlier stages. Out: every kept file, `model.json`, `report.html` and a README, loadable by
`runtime.Detector.load`.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.rows import Row, preference
from compress.config import NoSettings
from compress.flavours import REFERENCE
from compress.inputs import kept_files
from compress.log import Log
from compress.stages import Figures, Stage
from compress.store import Folders
from runtime.bundle import card_of, model_files, problems
from runtime.card import CARD_FILE, Artifact, ModelCard
from runtime.detector import Detector
from runtime.errors import EngineError, InputError
from runtime.files import read_json, sha256, write_text
from runtime.layers import FP16, layers_file

README = """\
edgestill bundle "{name}": {classes} classes, {size} pixels, mAP and latency in report.html.

Run it on the device (Python 3.10+, NumPy, OpenCV, and an inference library):

    pip install 'edgestill[{extra}]'{space}# or {others}
    python -m runtime detect --model . image.jpg

    from runtime import Detector
    with Detector.load(".") as detector:
        detections = detector(frame)      # uint8 (H, W, 3) BGR

model.json lists the files in order of preference; the first one that works on the machine is used. The order of those
for CPUs was measured on {cpu}. For an engine that fits the device's own GPU and TensorRT:

    python -m runtime build {source}
"""


def run(_: NoSettings, folders: Folders, out: Path, log: Log) -> Figures:
    """Copy every kept file into `out`, write the card that lists them, check it, and load the bundle once.

    Raises InputError when the measurements are of another file, EngineError when a file is of another model.
    """
    models = kept_files(folders)
    plans = ModelCard.load(folders["build"]).artifacts
    reference = card_of(models[REFERENCE])
    bench = read_json(folders["bench"] / "bench.json")
    onnx = [_copied(precision, models[precision], out) for precision in _by_preference(models, bench["models"])]
    for plan in plans:
        for file in (folders["build"] / plan.file, layers_file(folders["build"] / plan.file)):
            if file.is_file():
                shutil.copyfile(file, out / file.name)
    cpu = f"{bench['machine']['cpu']} ({bench['machine']['platform']})"
    provenance = {**reference.provenance, "order_measured_on": cpu}
    card = replace(reference, artifacts=(*plans, *onnx), provenance=provenance)
    card.save(out / CARD_FILE)
    shutil.copyfile(folders["report"] / "report.html", out / "report.html")
    source = models.get(FP16, models[REFERENCE]).name
    write_text(out / "README.txt", _readme(card, onnx[0], cpu, source))
    if wrong := [problem for file in model_files(out) for problem in problems(file)]:
        raise EngineError(wrong[0])
    with Detector.load(out, device="cpu") as detector:
        runs = f"{detector.artifact.file} with {detector.artifact.backend}" if detector.artifact else ""
    log(f"bundle: {len(card.artifacts)} files; this machine runs {runs}")
    return {"files": len(card.artifacts)}


EXTRAS = {"onnx": "cpu", "openvino": "openvino"}
"""Backend of a CPU -> the extra that installs its library."""


def _readme(card: ModelCard, best: Artifact, cpu: str, source: str) -> str:
    """`source` is the file that the device builds its own plan from."""
    extra = EXTRAS[best.backend]
    others = ", ".join(f"edgestill[{other}]" for other in ("cpu", "openvino", "gpu", "rtx") if other != extra)
    size = "x".join(map(str, card.size_hw))
    return README.format(
        name=card.name, classes=len(card.names), size=size, extra=extra, space=" " * (13 - len(extra)), others=others,
        cpu=cpu, source=source,
    )  # fmt: skip


def _copied(precision: str, source: Path, out: Path) -> Artifact:
    target, card = out / source.name, card_of(source)
    shutil.copyfile(source, target)
    return Artifact(
        target.name, sha256(target), target.stat().st_size, precision, card.backend or "onnx",
        identity=card.identity, batches=card.batches, devices=card.devices,
    )  # fmt: skip


def _by_preference(models: Mapping[str, Path], measured: Sequence[Row]) -> list[str]:
    """As users of the benchmark's CPU should take them."""
    rows = {row["precision"]: row for row in measured if row["role"] == "student"}
    known = {row["sha256"] for row in rows.values()}
    if changed := [file for file in models.values() if sha256(file) not in known]:
        raise InputError(f"{changed[0]} is not the file that was measured", "Run again with --force bench")
    return sorted(models, key=lambda precision: preference(rows[precision]))


STAGE = Stage(
    "bundle",
    settings=NoSettings,
    inputs=lambda _, folders: folders,
    run=run,
    after=("export", "quantize", "qad", "build", "bench", "report"),
    version=3,
)
