"""`edgestill val`: the accuracy of a checkpoint, or of a file that runs on the device."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.accuracy import Accuracy, YoloMetrics, detector_accuracy
from benchmarks.bench import Plan
from benchmarks.rows import plain
from compress.compute.numerics import flush_denormals
from compress.data import DataConfig, index_dataset, load_data
from compress.data.class_names import class_conflict
from compress.evaluate import NmsSettings, evaluate
from compress.inputs import suited, validation_of
from compress.models import load_model
from runtime.errors import InputError, UsageError

CHECKPOINTS = (".pt", ".pth", ".safetensors")
OF_CHECKPOINTS = ("imgsz", "batch", "rect", "iou", "max_det", "single_label", "annotations", "half")
"""Arguments of `validate_file` that say nothing to a file for the device, in which they are fixed."""
ANNOTATIONS = Path("annotations", "instances.json")
"""COCO JSON beside the images of a data set that was made from COCO: it has crowd regions, which text labels lack."""


@dataclass(frozen=True)
class FileAccuracy:
    """Figures of one file; a torch network has `yolo` and `speed_ms` too."""

    file: str
    images: int
    truth: str
    coco: Accuracy
    yolo: YoloMetrics | None = None
    speed_ms: dict[str, float] | None = None
    backend: str = ""
    """Ran a shipped file, where it was chosen; empty where it is the first that reads the file."""
    as_written: bool = False
    """Whether quantised layers were computed in float, because the file is made for other hardware."""

    def to_json(self) -> dict[str, Any]:
        return plain(self)

    def to_text(self) -> str:
        lines = [
            f"{self.file} on {self.images} images, {self.coco.instances} boxes of {self.truth}"
            + (f", in {self.backend}" if self.backend else ""),
            f"COCO    mAP50-95 {self.coco.map50_95:.4f}  mAP50 {self.coco.map50:.4f}  mAP75 {self.coco.map75:.4f}",
        ]
        if self.yolo:
            lines.append(
                f"YOLOv5  mAP50-95 {self.yolo.map50_95:.4f}  mAP50 {self.yolo.map50:.4f}  "
                f"P {self.yolo.precision:.4f}  R {self.yolo.recall:.4f}"
            )
        if self.speed_ms:
            spans = "  ".join(f"{name} {ms:.1f}" for name, ms in self.speed_ms.items())
            lines.append(f"speed   {spans}  ms per image")
        if self.as_written:
            lines.append("computed in float, as the file is written: it is made for other hardware")
        return "\n".join(lines)


def validate_file(
    *,
    data: Path,
    weights: Path,
    split: str,
    imgsz: int,
    batch: int,
    rect: bool,
    conf: float,
    iou: float,
    max_det: int,
    single_label: bool,
    annotations: Path | None,
    half: bool,
    device: str,
    backend: str = "auto",
) -> FileAccuracy:
    """Measure a checkpoint by both protocols; an ONNX file, engine or bundle by COCO's, as it runs on the device.

    Raises InputError when the file knows other classes than the data, UnavailableError for `half` without a GPU,
    UsageError when a checkpoint is to be run by a backend of files.
    """
    config = load_data(data)
    if not is_checkpoint(weights):
        return _validate_shipped(weights, config, split, conf, device, backend)
    if backend != "auto":
        raise UsageError(f"--backend {backend}: {weights.name} is a checkpoint, which torch runs", "Give an .onnx file")
    flush_denormals()
    model = load_model(weights)
    require_same_classes(weights, model.arch.names, config)
    truth = annotations or _annotations_of(config)
    samples = index_dataset(config, [split]).splits[split].samples
    nms = NmsSettings(conf, iou, max_det, not single_label)
    found = evaluate(
        model, samples, imgsz=imgsz, batch=batch, rect=rect, nms=nms, device=device,
        precision="float16" if half else "float32", annotations=truth,
    )  # fmt: skip
    assert found.coco is not None
    named = truth.name if truth else "the labels"
    return FileAccuracy(weights.name, found.images, named, found.coco, found.yolo, dict(found.speed_ms))


def is_checkpoint(file: Path) -> bool:
    return file.suffix.lower() in CHECKPOINTS


def _annotations_of(config: DataConfig) -> Path | None:
    file = config.root / ANNOTATIONS
    return file if file.is_file() else None


def _validate_shipped(
    path: Path, config: DataConfig, split: str, conf: float, device: str, backend: str
) -> FileAccuracy:
    if split != "val":
        raise UsageError(f"--split {split}: shipped files are measured on val", "Leave --split out")
    truth = validation_of(index_dataset(config, ["val"]))
    plan, _ = suited(Plan(truth.images, device=device, backend=backend), path)
    with plan.detector(path, spin=False) as detector:
        require_same_classes(path, detector.card.names, config)
        found = detector_accuracy(detector, truth.images, truth.ground_truth, conf=conf)
    named = "" if plan.backend == "auto" else plan.backend
    return FileAccuracy(
        path.name, len(truth.images), "the labels", found, backend=named, as_written=plan.as_written
    )  # fmt: skip


def require_same_classes(file: Path, names: tuple[str, ...], config: DataConfig) -> None:
    if tuple(names) != config.names:
        raise InputError(
            class_conflict(file.name, names, config.path.name, config.names),
            "Give a model of these classes, or the data it was trained on",
        )
