from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch

from compress.training.adapters import fit_adapters

from . import toys

pytestmark = pytest.mark.usefixtures("one_thread")


def test_fitting_makes_the_losses_smaller_and_logs_one_line(tmp_path: Path) -> None:
    made = toys.trainer(toys.config(losses={"soft": "auto", "feat_mse": "auto", "pkd": "auto"}), tmp_path, distils=True)
    lines: list[str] = []
    assert made.job.teacher
    found = fit_adapters(made.objective, made.job.teacher, made.job.train, made.config, lines.append)
    assert set(found) == {"feat_mse", "pkd"}
    assert all(after < 0.9 * before for before, after in found.values())
    told = ", ".join(f"{name} {before:.3g} to {after:.3g}" for name, (before, after) in found.items())
    assert lines == [f"adapters fitted on 8 images: {told}"]


def test_fitting_changes_nothing_but_the_adapters_and_draws_nothing_at_random(tmp_path: Path) -> None:
    made = toys.trainer(toys.config(losses={"cwd": "auto"}), tmp_path, distils=True)
    before, random = copy.deepcopy(made.objective.state_dict()), torch.get_rng_state()
    assert made.job.teacher
    fit_adapters(made.objective, made.job.teacher, made.job.train, made.config, toys.quiet)
    changed = {name for name, value in made.objective.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"losses.cwd.adapters.{level}.weight" for level in range(3)}
    assert all(parameter.grad is None for parameter in made.objective.parameters())
    assert torch.equal(torch.get_rng_state(), random)


def test_without_a_feature_loss_there_is_nothing_to_fit(tmp_path: Path) -> None:
    made = toys.trainer(toys.config(losses={"soft": "auto"}), tmp_path, distils=True)
    lines: list[str] = []
    assert made.job.teacher
    assert fit_adapters(made.objective, made.job.teacher, made.job.train, made.config, lines.append) == {}
    assert lines == []
