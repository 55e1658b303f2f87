"""Measure what quantisation-aware distillation gains over calibration: `python measure.py DATA_YAML OUT NAME=FILE ...`.

In: a data set with val and test, and networks by name; `--teacher FILE` teaches in the cases with a big teacher. Out:
`OUT/results.json`, a row a case and seed: mAP50-95 lost against FP32, mean of val and test, four draws. Cases that are
done are kept, and a training that was killed goes on.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.accuracy import detector_accuracy
from benchmarks.bench import Plan, compare_files
from benchmarks.latency import LatencyRatio
from benchmarks.statistics import standard_error
from compress.config import ExportConfig, QadConfig, QuantizeConfig
from compress.data import Dataset, index_dataset, load_data
from compress.data.coco import to_coco
from compress.flavours import FLAVOURS, Flavour
from compress.gate import Origin, origin_of
from compress.graph.sensitivity import number_form
from compress.graph.untrusted_onnx import read_model
from compress.log import Log
from compress.schemes import SCHEMES
from compress.stages.export import export
from compress.training.qad import Start, train_for_int8
from runtime.files import write_json

NAME = "int8-openvino"
FLAVOUR, SCHEME, IMGSZ, DRAWS = FLAVOURS[NAME], SCHEMES["openvino"], 320, 4
SPLITS = ("val", "test")


class Judge:
    """The gate of this measurement: mAP50-95 on both splits."""

    def __init__(self, data: Dataset) -> None:
        self.plans = [self._plan(data, split) for split in SPLITS]

    @staticmethod
    def _plan(data: Dataset, split: str) -> Plan:
        samples = data.splits[split].samples
        return Plan(
            [(number, sample.image) for number, sample in enumerate(samples, 1)],
            to_coco(samples, data.names),
            backend="onnx",
            as_written=True,
        )

    def maps(self, path: Path, flavour: Flavour | None = None) -> np.ndarray:
        """As the files are written, whatever a flavour's own library is."""
        return np.array([self._map(path, plan) for plan in self.plans])

    @staticmethod
    def _map(path: Path, plan: Plan) -> float:
        assert plan.ground_truth
        with plan.detector(path, spin=False) as detector:
            return detector_accuracy(detector, plan.images, plan.ground_truth).map50_95

    def latency(self, reference: Path, other: Path, flavour: Flavour) -> LatencyRatio:
        return compare_files(reference, other, self.plans[0], backend=flavour.backend)


def row_of(origin: Origin, float_layers: tuple[str, ...]) -> dict[str, Any]:
    """The loss of a file over its draws."""
    with tempfile.TemporaryDirectory() as folder:
        files = [origin.write(FLAVOUR, Path(folder) / f"{draw}.onnx", float_layers, draw) for draw in range(DRAWS)]
        maps = np.array([origin.gate.maps(file) for file in files])
    drops = (origin.reference - maps).mean(1)
    return {
        "map50_95": dict(zip(SPLITS, maps.mean(0).tolist(), strict=True)),
        "drop": float(drops.mean()),
        "standard_error": standard_error(drops),
        "draws": drops.tolist(),
        "float_layers": list(float_layers),
    }


class Case(NamedTuple):
    """One way to an INT8 file; without a seed by calibration alone."""

    name: str
    floats: int
    """The worst layers that stay in float."""
    seed: int | None = None
    has_teacher: bool = False


def cases(seeds: int, teacher: Path | None) -> Iterator[Case]:
    """The cheap ones first."""
    yield Case("calibration", 0)
    yield Case("calibration, 2 in float", 2)
    for seed in range(seeds):
        yield Case("QAD, 2 in float", 2, seed)
        if teacher:
            yield Case("QAD, 2 in float, big teacher", 2, seed, has_teacher=True)
        yield Case("QAD", 0, seed)


def measure(network: str, file: Path, teacher: Path | None, data: Dataset, out: Path, seeds: int, say: Log) -> None:
    """Add every case of one network to results.json that it does not have."""
    folder, results = out / network, out / "results.json"
    model = folder / "model.onnx"
    if not model.is_file():
        export(ExportConfig(), model=file, out=folder, imgsz=IMGSZ, log=say)
    source, judge = read_model(model), Judge(data)
    images = [sample.image for sample in data.splits["train"].samples]
    settings = QuantizeConfig(flavours=(NAME,), method="mse", draws=DRAWS)
    origin = origin_of(settings, source, model=model, images=images, gate=judge)
    ranking = [layer.name for layer in origin.rank(number_form(SCHEME))]
    say(f"{network}: FP32 {origin.reference.tolist()}")
    for case in cases(seeds, teacher):
        rows = json.loads(results.read_text()) if results.is_file() else []
        if any((row["network"], row["case"], row["seed"]) == (network, case.name, case.seed) for row in rows):
            continue
        layers = tuple(ranking[: case.floats])
        judged, figures = origin, dict[str, float]()
        if case.seed is not None:
            learned = train_for_int8(
                QadConfig(imgsz=IMGSZ, seed=case.seed, threads=1, tensorboard=False),
                Start(file, source, origin.ranges, SCHEME, layers),
                teachers=[teacher] if teacher and case.has_teacher else [], data=data,
                out=folder / f"{case.name.replace(', ', '-').replace(' ', '_')}-{case.seed}", device="cpu", log=say,
            )  # fmt: skip
            judged = replace(origin, source=learned.model, ranges=learned.ranges)
            figures = learned.training.figures
        fp32 = dict(zip(SPLITS, origin.reference.tolist(), strict=True))
        row = {"network": network, "case": case.name, "seed": case.seed, "fp32": fp32, **row_of(judged, layers)}
        row |= {"seconds": figures.get("seconds")}
        write_json(results, [*rows, row])
        say(f"{network}, {case.name}, seed {case.seed}: drop {row['drop']:+.4f} ± {row['standard_error']:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("networks", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    data = index_dataset(load_data(given.data), ("train", *SPLITS))
    for network, file in (text.split("=", 1) for text in given.networks):
        teacher = given.teacher if given.teacher and given.teacher.resolve() != Path(file).resolve() else None
        measure(network, Path(file), teacher, data, given.out, given.seeds, lambda line: print(line, flush=True))


if __name__ == "__main__":
    main()
