from __future__ import annotations

import pytest
import torch

from compress.compute.device import pick_device, synchronize, to_device
from runtime.errors import UnavailableError, UsageError


@pytest.mark.parametrize("wish", ["tpu", "cuda:", "cuda:x", "-1", ""])
def test_a_device_of_another_name_is_a_usage_error(wish: str) -> None:
    with pytest.raises(UsageError, match=r"is not known.*Use auto, cpu, cuda"):
        pick_device(wish)


@pytest.mark.parametrize("wish", ["99", "cuda:99"])
def test_a_gpu_that_is_not_here_is_named_with_a_remedy(wish: str) -> None:
    with pytest.raises(UnavailableError, match=r"is not here: torch sees .*Use --device cpu"):
        pick_device(wish)


def test_each_process_gets_the_gpu_of_its_own_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:0") == torch.device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert pick_device("cuda:0") == torch.device("cuda:1")
    assert pick_device("cpu") == torch.device("cpu")


def test_convolutions_move_channels_last_and_a_cpu_has_nothing_to_wait_for() -> None:
    moved = to_device(torch.nn.Conv2d(3, 4, 3), torch.device("cpu"))
    assert moved.weight.is_contiguous(memory_format=torch.channels_last)
    synchronize(torch.device("cpu"))
