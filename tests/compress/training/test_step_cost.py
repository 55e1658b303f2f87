from __future__ import annotations

import random
from pathlib import Path

import pytest

from compress.losses.distill import LOSSES, FeatureLoss
from compress.training.step_cost import MEASURED, PLAIN, SOFT, TEACHER, WAYS, Steps, document, main, measure, parser
from runtime.files import read_json

pytestmark = pytest.mark.usefixtures("one_thread")
SETTINGS = {"rounds": 2, "calls": 1, "teacher": "n", "student": "p", "batch": 1, "imgsz": 32, "device": "cpu"}


def test_every_feature_loss_is_a_way_to_take_a_step() -> None:
    features = {name for name, loss in LOSSES.items() if issubclass(loss, FeatureLoss)}
    assert set(WAYS) == {PLAIN, TEACHER, SOFT, MEASURED, *(f"soft + {name}" for name in features)}


def test_ways_take_turns_and_a_round_has_the_median_of_its_steps() -> None:
    now, taken, costs = [0.0], [], {"a": iter([9, 9, 9, 1, 2, 9, 1, 1, 1]), "b": iter([9.0] * 9)}

    def way(name: str):
        def step() -> None:
            taken.append(name)
            now[0] += next(costs[name]) / 1e3

        return step

    found = measure({"a": way("a"), "b": way("b")}, 2, 3, random.Random(0), lambda: now[0])
    assert found["a"] == pytest.approx([2, 1])
    assert found["b"] == pytest.approx([9, 9])
    assert sorted(taken[6:12]) == ["a"] * 3 + ["b"] * 3


def test_ratios_are_of_one_round_and_measurements_are_spread_over_their_steps() -> None:
    found = {TEACHER: [10.0, 20.0], SOFT: [11.0, 22.0], MEASURED: [16.5, 33.0]}
    made = document(found, SETTINGS)
    ratio = made["ways"][SOFT][f"times {TEACHER}"]
    assert [ratio[key] for key in ("median", "low", "high")] == pytest.approx([1.1] * 3)
    assert made["share of measurements, every 50 steps"]["median"] == pytest.approx(0.5 / 50)
    assert made["ways"][SOFT]["ms"] == {"median": 16.5, "min": 11.0, "max": 22.0, "rounds": 2}


@pytest.mark.parametrize(("name", "measures"), [(SOFT, False), (MEASURED, True)])
def test_only_the_measured_way_measures_and_every_step_moves_the_weights(
    name: str, measures: bool, tmp_path: Path
) -> None:
    steps = Steps(WAYS[name], parser().parse_args(["--imgsz", "32", "--batch", "2", "--device", "cpu"]), tmp_path)
    for _ in range(2):
        steps()
    assert steps.trainer.objective.weights.count.tolist() == [2 if measures else 0]
    assert steps.trainer.ema.updates == 2


def test_the_table_and_its_figures_are_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--imgsz", "32", "--batch", "2", "--rounds", "2", "--calls", "1", "--ways", "plain", "--device", "cpu"]
    assert main([*options, "--out", str(tmp_path / "new")]) == 0
    made, table = read_json(tmp_path / "new" / "step_cost.json"), (tmp_path / "new" / "step_cost.md").read_text()
    assert list(made["ways"]) == [PLAIN, TEACHER, SOFT, MEASURED]
    assert all(way["ms"]["rounds"] == 2 for way in made["ways"].values())
    assert capsys.readouterr().out.endswith(table)
    assert "| plain + teacher |" in table
    assert "n teaches p, batch 2, 32 pixels, on cpu" in table
