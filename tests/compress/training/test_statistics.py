from __future__ import annotations

import torch
from torch import Tensor, nn

from compress.training.statistics import SoundStatistics


def network() -> nn.Sequential:
    return nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False))


def statistics(model: nn.Module) -> list[Tensor]:
    return [value.clone() for name, value in model.state_dict().items() if "running" in name]


def test_statistics_of_a_batch_without_a_finite_loss_are_taken_back() -> None:
    model = network()
    kept = SoundStatistics(model)
    model(torch.randn(2, 3, 4, 4))
    kept.keep_if(torch.tensor(True))
    before = statistics(model)
    model(torch.full((2, 3, 4, 4), float("inf")))
    assert not all(value.isfinite().all() for value in statistics(model))
    kept.keep_if(torch.tensor(False))
    assert all(map(torch.equal, statistics(model), before))
    model(torch.randn(2, 3, 4, 4))
    moved = statistics(model)
    kept.keep_if(torch.tensor(True))
    assert all(map(torch.equal, statistics(model), moved))


def test_loaded_statistics_are_kept() -> None:
    model, other = network(), network()
    other(torch.randn(2, 3, 4, 4))
    kept = SoundStatistics(model)
    model.load_state_dict(other.state_dict())
    kept.keep()
    kept.keep_if(torch.tensor(False))
    assert all(map(torch.equal, statistics(model), statistics(other)))
