"""Measure what quantisation-aware distillation gains over calibration: `python measure.py DATA_YAML OUT NAME=FILE ...`.

In: a data set with val and test, and networks by name, one file for each seed that the network was trained with
(`p=RUN-0/student.safetensors p=RUN-1/student.safetensors`); `--teacher FILE` teaches in the cases with a big teacher.
Out: `OUT/results.json`, a row a case and seed: mAP50-95 lost against FP32, mean of val and test, four draws; and
`OUT/table.md`, the means over the seeds with their intervals. Cases that are done are kept, and a training that was
killed goes on. The cheap cases of all networks come first.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.accuracy import detector_accuracy
from benchmarks.bench import Plan, compare_files
from benchmarks.latency import LatencyRatio
from benchmarks.statistics import standard_error
from compress.config import ExportConfig, QadConfig, QuantizeConfig
from compress.data import Dataset, index_dataset, load_data
from compress.data.coco import to_coco
from compress.flavours import FLAVOURS, Flavour
from compress.gate import Choice, Origin, origin_of
from compress.graph.sensitivity import number_form
from compress.graph.untrusted_onnx import read_model
from compress.log import Log
from compress.schemes import SCHEMES
from compress.stages.export import export
from compress.study.figures import half_width
from compress.training.qad import Start, train_for_int8
from runtime.files import write_json

NAME = "int8-openvino"
METHOD: Final = "mse"
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
        choice = Choice(METHOD, float_layers)
        files = [origin.write(FLAVOUR, Path(folder) / f"{draw}.onnx", choice, draw) for draw in range(DRAWS)]
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
    """One way to an INT8 file, by calibration alone or with a training behind it."""

    name: str
    floats: int
    """The worst layers that stay in float."""
    is_trained: bool = False
    has_teacher: bool = False


CASES = (
    Case("calibration", 0),
    Case("calibration, 2 in float", 2),
    Case("QAD, 2 in float", 2, is_trained=True),
    Case("QAD, 2 in float, big teacher", 2, is_trained=True, has_teacher=True),
    Case("QAD", 0, is_trained=True),
)
"""The cheap ones first."""


class Network(NamedTuple):
    """A network that was trained with one of its seeds, 0 the first; `teacher` is the big one, if it has one."""

    name: str
    seed: int
    file: Path
    teacher: Path | None


def networks(texts: Sequence[str], teacher: Path | None) -> list[Network]:
    """From NAME=FILE: the files of one name are its seeds. A network does not teach itself."""
    found: list[Network] = []
    for name, file in (text.split("=", 1) for text in texts):
        seed, own = sum(network.name == name for network in found), Path(file)
        has_teacher = teacher is not None and teacher.resolve() != own.resolve()
        found.append(Network(name, seed, own, teacher if has_teacher else None))
    return found


class Measurement(NamedTuple):
    """The images, the folder of the results, and the settings of every training."""

    data: Dataset
    out: Path
    qad: QadConfig
    imgsz: int
    say: Log

    @property
    def rows(self) -> list[dict[str, Any]]:
        results = self.out / "results.json"
        return json.loads(results.read_text()) if results.is_file() else []

    def origin(self, network: Network) -> Origin:
        """FP32 and its calibration."""
        model = self.folder(network) / "model.onnx"
        if not model.is_file():
            export(ExportConfig(), model=network.file, out=model.parent, imgsz=self.imgsz, log=self.say)
        images = [sample.image for sample in self.data.splits["train"].samples]
        settings = QuantizeConfig(flavours=(NAME,), method=METHOD, draws=DRAWS)
        return origin_of(settings, read_model(model), model=model, images=images, gate=Judge(self.data))

    def folder(self, network: Network) -> Path:
        return self.out / f"{network.name}-{network.seed}"

    def measure(self, network: Network, cases: Sequence[Case]) -> None:
        """Add those cases of one network to results.json that it does not have."""
        known = {(row["network"], row["seed"], row["case"]) for row in self.rows}
        cases = [case for case in cases if network.teacher or not case.has_teacher]
        cases = [case for case in cases if (network.name, network.seed, case.name) not in known]
        if not cases:
            return
        origin = self.origin(network)
        self.say(f"{network.name}, seed {network.seed}: FP32 {origin.reference.tolist()}")
        for case in cases:
            row = self.row(network, case, origin)
            write_json(self.out / "results.json", [*self.rows, row])
            (self.out / "table.md").write_text(table(self.rows))
            told = f"{row['drop']:+.4f} ± {row['standard_error']:.4f}"
            self.say(f"{network.name}, seed {network.seed}, {case.name}: drop {told}")

    def row(self, network: Network, case: Case, origin: Origin) -> dict[str, Any]:
        ranking = [layer.name for layer in origin.rank(METHOD, number_form(SCHEME))]
        layers, seconds, judged = tuple(ranking[: case.floats]), None, origin
        if case.is_trained:
            learned = train_for_int8(
                self.qad.model_copy(update={"seed": network.seed}),
                Start(network.file, origin.source, origin.ranges(METHOD), SCHEME, layers),
                teachers=[network.teacher] if network.teacher and case.has_teacher else [], data=self.data,
                out=self.folder(network) / case.name.replace(", ", "-").replace(" ", "_"), device="cpu", log=self.say,
            )  # fmt: skip
            judged = replace(origin, source=learned.model, ranges=lambda _: learned.ranges)
            seconds = learned.training.figures.get("seconds")
        fp32 = dict(zip(SPLITS, origin.reference.tolist(), strict=True))
        common = {"network": network.name, "case": case.name, "seed": network.seed, "fp32": fp32, "seconds": seconds}
        return common | row_of(judged, layers)


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Markdown: points of mAP50-95 lost against FP32, and how many less than by calibration with the same layers.

    Means over the seeds of a network with their 95 % interval by Student's t; of one seed there is none.
    """
    lines = ["| network | FP32 | case | seeds | lost | less than calibration |", "|---|---|---|---|---|---|"]
    drops = {(row["network"], row["case"], row["seed"]): row["drop"] for row in rows}
    for name in dict.fromkeys(row["network"] for row in rows):
        fp32 = {row["seed"]: np.mean(list(row["fp32"].values())) for row in rows if row["network"] == name}
        for case in CASES:
            seeds = [seed for seed in sorted(fp32) if (name, case.name, seed) in drops]
            if not seeds:
                continue
            base = next(other.name for other in CASES if other.floats == case.floats and not other.is_trained)
            own = [drops[name, case.name, seed] for seed in seeds]
            gained = [drops[name, base, seed] - drops[name, case.name, seed] for seed in seeds]
            cells = (name, f"{100 * np.mean(list(fp32.values())):.2f}", case.name, str(len(seeds)))
            lines.append(f"| {' | '.join((*cells, points(own), points(gained) if case.is_trained else ''))} |")
    return "\n".join(lines) + "\n"


def points(values: Sequence[float]) -> str:
    """The mean with its interval."""
    mean, half = 100 * float(np.mean(values)), half_width(values)
    return f"{mean:.2f}" if half is None else f"{mean:.2f} [{mean - 100 * half:.2f}, {mean + 100 * half:.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("networks", nargs="+", metavar="NAME=FILE")
    parser.add_argument("--teacher", type=Path)
    parser.add_argument("--epochs", type=int, default=QadConfig().epochs)
    parser.add_argument("--imgsz", type=int, default=IMGSZ)
    given = parser.parse_args()
    data = index_dataset(load_data(given.data), ("train", *SPLITS))
    qad = QadConfig(imgsz=given.imgsz, epochs=given.epochs, threads=1, tensorboard=False)
    measurement = Measurement(data, given.out, qad, given.imgsz, lambda line: print(line, flush=True))
    for cases in ([case for case in CASES if not case.is_trained], CASES):
        for network in networks(given.networks, given.teacher):
            measurement.measure(network, cases)
    print(table(measurement.rows), end="")


if __name__ == "__main__":
    main()
