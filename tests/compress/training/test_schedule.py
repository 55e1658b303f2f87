from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from compress.config import PRESETS, AugmentConfig, OptimizerConfig
from compress.training.schedule import Schedule, blend, fading_factor, mosaic_epochs

RUNS = {"linear": {}, "cosine": {"schedule": "cosine"}, "adam": {"name": "adam"}}


def yolov5_schedule(**changes: object) -> Schedule:
    config = OptimizerConfig.model_validate(PRESETS["yolov5-low"]["optimizer"] | changes)
    return Schedule(config, epochs=5, batches=32, batch_size=2)


@pytest.mark.parametrize("run", RUNS)
def test_every_iteration_of_the_reference_runs_is_reproduced(run: str, reference: Path) -> None:
    expected = json.loads((reference / "schedule_reference.json").read_text())[run]
    schedule, steps, last_step = yolov5_schedule(**RUNS[run]), 0, -1
    for ni, lr_bias, lr_weight, lr_norm, momentum, _, _, steps_so_far in expected["rows"]:
        rates = schedule.at(ni)
        assert rates.lr == pytest.approx((lr_bias, lr_weight, lr_norm), abs=1e-9)
        if run != "adam":
            assert rates.momentum == pytest.approx(momentum, abs=1e-9)
        if ni - last_step >= rates.accumulate:
            steps, last_step = steps + 1, ni
        assert steps == steps_so_far
    assert schedule.weight_decay == pytest.approx(expected["weight_decay_per_group"][1], abs=1e-12)


def test_without_warmup_the_first_iteration_runs_at_full_rate() -> None:
    schedule = yolov5_schedule(warmup_epochs=0)
    assert schedule.at(0).lr == (0.01, 0.01, 0.01)


def test_without_a_nominal_batch_every_batch_steps_and_decay_is_not_scaled() -> None:
    schedule = yolov5_schedule(nominal_batch=0)
    assert {schedule.at(i).accumulate for i in range(160)} == {1}
    assert schedule.weight_decay == 0.0005


def test_blend_ends_are_exact() -> None:
    assert blend(0, 10, 0.1, 0.7) == 0.1
    assert blend(10, 10, 0.1, 0.7) == 0.7
    assert blend(0, 0, 0.1, 0.7) == 0.7


def test_mosaic_closes_for_a_fifth_of_the_epochs_at_most() -> None:
    config = AugmentConfig(close_mosaic=10)
    assert [mosaic_epochs(config, n) for n in (100, 50, 20, 4)] == [90, 40, 16, 4]


def test_a_loss_fades_from_one_to_nothing_at_its_part_of_the_epochs() -> None:
    factors = [fading_factor(epoch, 10, 0.7) for epoch in range(10)]
    assert factors[0] == 1.0
    assert factors[7:] == pytest.approx([0.0, 0.0, 0.0])
    assert factors == sorted(factors, reverse=True)
    assert factors[6] > 0


def test_a_loss_that_stays_has_factor_one_to_the_end() -> None:
    assert [fading_factor(epoch, 10, 1.0) for epoch in range(10)] == [1.0] * 10


@given(
    epochs=st.integers(1, 30), batches=st.integers(1, 40), batch_size=st.integers(1, 128),
    warmup=st.floats(0, 5), curve=st.sampled_from(["linear", "cosine"]), nominal=st.sampled_from([0, 64]),
    at=st.floats(0, 1, exclude_max=True),
)  # fmt: skip
def test_rates_stay_within_their_settings(
    epochs: int, batches: int, batch_size: int, warmup: float, curve: str, nominal: int, at: float
) -> None:
    config = OptimizerConfig.model_validate(
        {"lr0": 0.01, "lrf": 0.1, "warmup_epochs": warmup, "warmup_bias_lr": 0.1, "schedule": curve,
         "nominal_batch": nominal}
    )  # fmt: skip
    rates = Schedule(config, epochs, batches, batch_size).at(int(at * epochs * batches))
    bias, *others = rates.lr
    slack = 1e-12
    assert all(-slack <= rate <= config.lr0 + slack for rate in others)
    assert 0 <= bias <= max(config.lr0, config.warmup_bias_lr) + slack
    assert config.warmup_momentum - slack <= rates.momentum <= config.momentum + slack
    assert 1 <= rates.accumulate <= max(1, round(nominal / batch_size))


def test_the_rate_ends_near_lrf_and_never_rises_after_the_warm_up() -> None:
    schedule = Schedule(OptimizerConfig(lr0=0.01, lrf=0.1, warmup_epochs=1), epochs=50, batches=4, batch_size=8)
    rates = [schedule.at(iteration).lr[1] for iteration in range(200)]
    after = rates[schedule.warmup_iterations + 1 :]
    assert after == sorted(after, reverse=True)
    assert rates[-1] == pytest.approx(0.001, rel=0.1)
