"""Measure what `int8-ort` loses with none, one and two layers in float: `python losses.py DATA_YAML MODEL OUT`.

In: a data set with train and val, and the `model.onnx` that `edgestill export` wrote. Out: `OUT/results.json`: FP32's
mAP50-95, the layers, worst first, and for each case the mAP50-95 of every draw and the error of having measured these
images. A draw of the gate moves one scale by 3e-6; a calibration moves every activation range by up to 3 %. Cases that
are done are kept.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from benchmarks.bench import Plan
from benchmarks.statistics import standard_error
from compress.config import QuantizeConfig
from compress.data import index_dataset, load_data
from compress.flavours import FLAVOURS
from compress.gate import Choice, FileGate, Loss, Origin, origin_of
from compress.graph.preprocess import PIXELS
from compress.graph.ranges import Ranges
from compress.graph.untrusted_onnx import read_model
from compress.inputs import validation_of
from runtime.files import write_json

FLAVOUR = FLAVOURS["int8-ort"]
JITTER = 0.03


class Case(NamedTuple):
    """Files of one kind."""

    method: str
    draws: int
    moves_ranges: bool

    def __str__(self) -> str:
        return f"{self.method}, {'calibrations' if self.moves_ranges else 'draws of the gate'}"


CASES = (Case("minmax", 16, False), Case("mse", 16, False), Case("minmax", 24, True))
FLOATS = (0, 1, 2)


def moved(ranges: Ranges, seed: int) -> Ranges:
    """Each range times a number of its own; pixels keep theirs."""
    rng = np.random.default_rng(seed)
    shares = dict(zip(ranges, 1 + rng.uniform(-JITTER, JITTER, len(ranges)), strict=True))
    return {
        name: found if name in PIXELS else replace(found, low=found.low * shares[name], high=found.high * shares[name])
        for name, found in ranges.items()
    }


def draw_of(origin: Origin, case: Case, floats: Sequence[str], number: int) -> list[float]:
    """The `Gate.maps` of one file."""
    if case.moves_ranges:
        ranges, number = moved(origin.ranges(case.method), number), 0
        origin = replace(origin, ranges=lambda _: ranges)
    with tempfile.TemporaryDirectory() as folder:
        file = origin.write(FLAVOUR, Path(folder) / "model.onnx", Choice(case.method, tuple(floats)), number)
        return origin.gate.maps(file, FLAVOUR).tolist()


def entry_of(origin: Origin, case: Case, count: int) -> dict[str, Any]:
    """The case with so many layers in float."""
    floats = [layer.name for layer in origin.ranking(FLAVOUR, case.method)[:count]]
    maps = [draw_of(origin, case, floats, number) for number in range(case.draws)]
    image_error = Loss.of(origin.reference, [np.array(each) for each in maps]).image_error
    return {"in_float": floats, "map50_95": [each[0] for each in maps], "image_error": image_error}


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
    settings = QuantizeConfig(flavours=(FLAVOUR.name,))
    origin = origin_of(settings, read_model(given.model), model=given.model, images=images, gate=gate)
    results = given.out / "results.json"
    known: dict[str, Any] = json.loads(results.read_text()) if results.is_file() else {}
    known["fp32"] = float(origin.reference[0])
    for case in CASES:
        for count in FLOATS:
            key = f"{case}, {count} in float"
            known[key] = known.get(key) or entry_of(origin, case, count)
            write_json(results, known)
            drops = 100 * (known["fp32"] - np.array(known[key]["map50_95"]))
            spread = f"a file scatters by {drops.std(ddof=1):.2f}, the images by {100 * known[key]['image_error']:.2f}"
            print(f"{key}: {drops.mean():.2f} ± {standard_error(drops):.2f}; {spread}", flush=True)


if __name__ == "__main__":
    main()
