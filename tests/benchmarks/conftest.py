"""A made-up run, complete enough to fill every part of the page."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import numpy as np
import pytest

from benchmarks.accuracy import Accuracy
from benchmarks.latency import ROUNDS, Durations, Latency, Warmup
from benchmarks.report import Report, make_report
from benchmarks.rows import plain, time_over
from runtime.layers import EngineLayer, TensorType, facts_of

NAMES = ("bolt", "nut", "washer", "screw", "spring", "rivet", "bearing", "gear")


SETTINGS = {
    **{"imgsz": 320, "batch": 1, "conf": 0.25, "iou": 0.6, "max_det": 300, "accuracy_conf": 0.001},
    **{"accuracy_max_det": 100, "latency_samples": 200, "frames": 64, "warmup_ms": 200.0, "interval_ms": None},
    "threads": None,
    "as_written": False,
}

HALF = TensorType("Half", (1, 8, 160, 160)), TensorType("Half", (1, 16, 80, 80))
ENGINE_LAYERS = (
    EngineLayer("__myl_CorrSilu_myl0_1", "runtime_fusion", ("1.conv", "1.act"), HALF[:1], HALF[1:]),
    EngineLayer("__myl_Topk_myl0_17", "kgen", ("nms.best",), HALF[1:], HALF[1:]),
)


def latency_of(pre: float, infer: float, post: float, n: int, seed: int) -> Latency:
    rng = np.random.default_rng(seed)
    spans = [mean * (1 + rng.gamma(1.2, 0.05, n)) for mean in (pre, infer, post)]
    whole = sum(spans)
    medians = tuple(np.median(part) for part in np.array_split(whole, ROUNDS))
    return Latency(*map(Durations.of, (*spans, whole)), Warmup(25, 231.0, True), True, None, medians)  # type: ignore[arg-type]


def accuracy_of(ap: float, seed: int = 0) -> Accuracy:
    spread = np.random.default_rng(seed).normal(0, 0.06, len(NAMES))
    classes = np.clip(ap + np.sort(spread - spread.mean())[::-1], 0, 1)
    per_class = dict(zip(NAMES, classes.tolist(), strict=True))
    return Accuracy(ap, ap + 0.27, ap + 0.03, ap - 0.2, ap + 0.02, None, ap + 0.1, per_class, 240, 1873)


def make_row(
    file: str, precision: str, size: int, ap: float | None, times: tuple[float, ...], **more: Any
) -> dict[str, Any]:
    digest = f"{size:064x}"
    base = {"file": file, "role": "student", "precision": precision, "sha256": digest, "bytes": size, "backend": "onnx"}
    timed = latency_of(*times, n=700 if precision == "fp16" else 200, seed=size) if times else None
    return {
        **base,
        "device": "cpu",
        "settings": SETTINGS,
        "latency": plain(timed),
        "accuracy": plain(accuracy_of(ap, size)) if ap is not None else None,
        "gate": None,
        **more,
    }


def curves(last: float, distilled: bool) -> list[dict[str, float | int | None]]:
    steps = np.arange(60)
    rise = last * (1 - np.exp(-steps / 14))
    return [
        {
            "epoch": int(epoch),
            "box": 0.03 + 0.07 * float(np.exp(-epoch / 18)),
            "obj": 0.02 + 0.04 * float(np.exp(-epoch / 25)),
            "cls": 0.005 + 0.03 * float(np.exp(-epoch / 9)),
            **({"soft": 0.4 + 1.6 * float(np.exp(-epoch / 12))} if distilled else {}),
            "map50_95": float(rise[epoch]) if epoch % 5 == 4 else None,
            "map50": float(rise[epoch]) * 1.3 if epoch % 5 == 4 else None,
            "lr": 0.002,
        }
        for epoch in steps
    ]


LOSS = {"drop": 0.0054, "standard_error": 0.0007, "image_error": 0.0031, "draws": 4}
UNTIMED = {"standard_error": None, "latency_ratio": None}


def in_turns(row: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The row of a file that took turns with the reference."""
    found = time_over(row, reference)
    assert found
    ratio = {"of": reference["file"], "ratio": found.ratio, "low": found.low, "high": found.high}
    return row | {"latency": row["latency"] | {"ratio": ratio}}


def kept(reason: str = "mAP50-95 0.54480 is within 0.02 of fp32", **loss: float | None) -> dict[str, Any]:
    return {"gate": {"kept": True, "reason": reason, **loss}}


def build_sample() -> Report:
    models = [
        make_row("teacher.onnx", "fp32", 7_534_201, 0.6113, (0.9, 29.4, 0.11), role="teacher", parameters=1_770_000),
        make_row("model.onnx", "fp32", 2_105_388, 0.5502, (0.9, 11.2, 0.10), **kept("reference")),
        make_row("model.fp16.onnx", "fp16", 1_084_120, 0.5500, (0.9, 12.9, 0.10), **kept("0.55000 of 0.55020")),
        make_row("model.int8-ort.onnx", "int8-ort", 674_331, 0.5448, (0.9, 8.1, 0.10), **kept(**LOSS)),
        make_row(
            "model.int8-trt.onnx",
            "int8-trt",
            802_114,
            0.5121,
            (0.9, 13.6, 0.10),
            gate={"kept": False, "reason": "mAP50-95 0.51210 is more than 0.02 below 0.55020 of fp32"},
        ),
    ]
    models = [in_turns(row, models[1]) for row in models]
    machine = {
        "cpu": "AMD EPYC 7763 64-Core Processor",
        "cores": 2,
        "ram_bytes": 8_589_934_592,
        "os": "Linux 6.1",
        "platform": "linux-x86_64",
        "python": "3.11.7",
        "board": "",
        "gpus": [],
        "packages": {"numpy": "2.4.6", "opencv": "5.0.0.93", "onnxruntime": "1.32.0", "tensorrt_rtx": "1.7.1"},
        "providers": ["CPUExecutionProvider"],
    }
    checks = [
        {"name": "zero if student equals teacher", "passed": True, "detail": "0 at 4 random batches"},
        {"name": "falls when stepped against its gradient", "passed": True, "detail": "1.842 to 1.790 in 5 steps"},
    ]
    return make_report(
        "Conveyor, YOLOv5n to p",
        machine=machine,
        argv=["edgestill", "run", "recipe.yaml"],
        dataset={"name": "conveyor", "split": "val", "images": 240, "instances": 1873, "sha256": "ab" * 32},
        models=models,
        created=datetime(2026, 11, 23, 21, 4, 9, tzinfo=timezone.utc),
        torch=[
            {
                **{"name": "yolov5n, fine-tuned", "role": "teacher", "parameters": 1_770_000, "gflops": 4.2},
                "accuracy": plain(accuracy_of(0.6114)),
            },
            {
                **{"name": "yolov5p, distilled", "role": "student", "parameters": 466_000, "gflops": 1.2},
                "accuracy": plain(accuracy_of(0.5503)),
            },
            {
                **{"name": "yolov5p, plain training", "role": "baseline", "parameters": 466_000, "gflops": 1.2},
                "accuracy": plain(accuracy_of(0.5127)),
            },
        ],
        training=[
            {"name": "teacher", "epochs": 60, "best_epoch": 59, "seconds": 812.4, "curves": curves(0.62, False)},
            {"name": "student", "epochs": 60, "best_epoch": 54, "seconds": 644.9, "curves": curves(0.56, True)},
        ],
        distillation={
            "losses": [{"name": "soft", "weight": None, "share": 0.97, "checks": checks}],
            "shares_of": "the gradient of soft",
            "inheritance": {
                **{"parameters": 452_000, "total": 466_000, "classes": ["bolt"], "fresh": []},
                "loss_from_scratch": {"box": 0.11, "obj": 0.04, "cls": 0.02},
                "loss_before_first_step": {"box": 0.07, "obj": 0.02, "cls": 0.01},
            },
            "teacher": {"map50_95": 0.62, "student_map50_95": 0.5503, "retained": 0.8876},
            "strategy": {"name": "label_free", "label_weight": 0.0, "unlabelled_images": 205},
        },
        gain={
            **{"study": "conveyor-study", "split": "test", "arm": "soft", "missing": ""},
            "over": [
                {"against": "scratch", "mean": 0.0512, "low": 0.0391, "high": 0.0633, "pairs": 5},
                {"against": "inherit", "mean": 0.0213, "low": None, "high": None, "pairs": 1},
            ],
        },
        export={
            **{"max_box_error_px": 0.0021, "max_score_error": 2.4e-6, "box_limit_px": 0.05, "score_limit": 0.001},
            **{"images": 16, "candidates": 512, "nms_iterations": 8},
        },
        calibration={"images": 128, "sha256": "cd" * 32, "method": "minmax", "split": "train"},
        quantisation=[
            {
                "precision": "int8-ort",
                "layers": [
                    {"name": name, "error": error, "is_float": error > 0.1}
                    for name, error in [
                        ("2.cv1", 0.131),
                        ("1", 0.108),
                        *((f"4.m.{i}", 0.05 / (i + 1)) for i in range(30)),
                    ]
                ],
                "steps": [
                    {
                        "method": "mse",
                        "float_layers": 0,
                        "predicted_error": 0.187,
                        "drop": None,
                        **UNTIMED,
                        "latency_ratio": 0.6,
                    },
                    {
                        **{"float_layers": 2, "predicted_error": 0.062, "drop": 0.0054, "standard_error": 0.0007},
                        "latency_ratio": 0.61,
                    },
                ],
            }
        ],
        engines=[
            {
                **{"file": f"model.{precision}.plan", "precision": precision, "backend": "tensorrt_rtx"},
                **{"targets": ["sm86", "sm89", "sm120"], "bytes": size, "seconds": 9.7, "ran": False},
                "note": "no GPU",
                **(facts_of(ENGINE_LAYERS) if precision == "fp16" else {}),
            }
            for precision, size in (("fp32", 2_904_212), ("fp16", 1_640_772))
        ],
        stages=[
            {"name": name, "seconds": seconds, "skipped": skipped}
            for name, seconds, skipped in (
                ("teacher", 812.4, True),
                ("distill", 644.9, False),
                ("export", 14.2, False),
                ("quantize", 41.7, False),
                ("build", 28.3, False),
                ("bench", 96.5, False),
            )
        ],
    )


@pytest.fixture(scope="session")
def sample() -> Report:
    return build_sample()


def with_models(sample: Report, **changes: dict[str, Any]) -> Report:
    """The sample with some keys of some files changed."""
    models = [row | changes.get(row["precision"].replace("-", "_"), {}) for row in sample.data["models"]]
    return Report({**sample.data, "models": models})


def minimal(models: list[dict[str, Any]] | None = None) -> Report:
    return make_report("small", machine={}, models=models or [], created=datetime(2026, 1, 1))
