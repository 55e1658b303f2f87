from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from compress.training.ema import Ema


def tiny() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_each_update_follows_the_ramped_formula() -> None:
    model = tiny()
    ema = Ema(model, decay=0.9999, ramp=2000)
    expected = {key: value.double() for key, value in model.state_dict().items()}
    for update in range(1, 6):
        for parameter in model.parameters():
            parameter.data += 0.1
        model(torch.randn(2, 3, 8, 8))
        ema.update()
        d = 0.9999 * (1 - math.exp(-update / 2000))
        expected = {key: d * expected[key] + (1 - d) * value for key, value in model.state_dict().items()}
    for key, value in ema.module.state_dict().items():
        if value.dtype.is_floating_point:
            torch.testing.assert_close(value.double(), expected[key], rtol=1e-6, atol=1e-7)
    assert ema.updates == 5


def test_loaded_weights_are_followed() -> None:
    model, other = tiny(), nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    ema = Ema(model, decay=0.5, ramp=1e-9)
    start = model[0].weight.detach().clone()
    model.load_state_dict(other.state_dict())
    ema.update()
    torch.testing.assert_close(ema.module[0].weight, (start + other[0].weight.detach()) / 2)


def test_first_update_of_yolov5_is_nearly_a_copy() -> None:
    model = tiny()
    ema = Ema(model, decay=0.9999, ramp=2000)
    model[0].weight.data += 1
    ema.update()
    gap = (model[0].weight - ema.module[0].weight).mean().item()
    assert gap == pytest.approx(0.000499825, rel=1e-3)


def test_integer_buffers_keep_their_value_and_the_copy_is_frozen() -> None:
    model = tiny()
    ema = Ema(model, decay=0.9, ramp=1)
    model(torch.randn(2, 3, 8, 8))
    ema.update()
    assert ema.module[1].num_batches_tracked == 0
    assert model[1].num_batches_tracked == 1
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())
