"""Measure what `int8-ort` loses with none, one and two layers in float: `python measure.py DATA_YAML MODEL OUT`.

In: a data set with train and val, and the `model.onnx` that `edgestill export` wrote. Out: `OUT/results.json`, mAP50-95
of FP32 and of every draw. A draw of the gate moves one scale by 3e-6; a `calibration` moves every activation range by
up to 3 %, as other images would. Draws that are done are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.bench import Plan
from benchmarks.statistics import standard_error
from compress.config import QuantizeConfig
from compress.data import index_dataset, load_data
from compress.flavours import FLAVOURS
from compress.gate import Choice, FileGate, Origin, origin_of
from compress.graph.preprocess import PIXELS
from compress.graph.ranges import Ranges
from compress.graph.untrusted_onnx import read_model
from compress.inputs import validation_of
from runtime.files import write_json

FLAVOUR, METHOD = FLAVOURS["int8-ort"], "minmax"
FLOATS = (0, 1, 2)
DRAWS = {"gate": 16, "calibration": 24}
JITTER = 0.03


def moved(ranges: Ranges, seed: int) -> Ranges:
    """Each range times a number of its own; pixels keep theirs."""
    rng = np.random.default_rng(seed)
    shares = dict(zip(ranges, 1 + rng.uniform(-JITTER, JITTER, len(ranges)), strict=True))
    return {
        name: found if name in PIXELS else replace(found, low=found.low * shares[name], high=found.high * shares[name])
        for name, found in ranges.items()
    }


def draw_of(origin: Origin, kind: str, floats: int, number: int) -> float:
    """mAP50-95 of one file."""
    names = tuple(layer.name for layer in origin.ranking(FLAVOUR, METHOD)[:floats])
    if kind == "calibration":
        ranges, number = moved(origin.ranges(METHOD), number), 0
        origin = replace(origin, ranges=lambda _: ranges)
    with tempfile.TemporaryDirectory() as folder:
        file = origin.write(FLAVOUR, Path(folder) / "model.onnx", Choice(METHOD, names), number)
        return float(origin.gate.maps(file, FLAVOUR)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args()
    data = index_dataset(load_data(given.data), ("train", "val"))
    val = validation_of(data)
    gate = FileGate(Plan(val.images, val.ground_truth, device="cpu", threads=1))
    images = [sample.image for sample in data.splits["train"].samples]
    settings = QuantizeConfig(flavours=(FLAVOUR.name,), method=METHOD)
    origin = origin_of(settings, read_model(given.model), model=given.model, images=images, gate=gate)
    results = given.out / "results.json"
    known: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    known["fp32"] = float(origin.reference[0])
    for kind, draws in DRAWS.items():
        for floats in FLOATS:
            maps = known.setdefault(f"{kind}, {floats} in float", [])
            while len(maps) < draws:
                maps.append(draw_of(origin, kind, floats, len(maps)))
                write_json(results, known)
            drops = 100 * (known["fp32"] - np.array(maps))
            print(f"{kind}, {floats} in float: {drops.mean():.2f} ± {standard_error(drops):.2f}", flush=True)


if __name__ == "__main__":
    main()
