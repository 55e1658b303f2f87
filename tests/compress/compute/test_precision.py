from __future__ import annotations

import pytest
import torch

from compress.compute.precision import computing_in, pick_precision
from runtime.errors import UnavailableError

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def test_unasked_a_gpu_takes_float16_and_a_cpu_float32() -> None:
    assert (pick_precision("auto", CPU), pick_precision("auto", GPU)) == (torch.float32, torch.float16)
    assert pick_precision("float32", GPU) == torch.float32


def test_float16_on_a_cpu_is_refused_with_what_it_computes_in() -> None:
    with pytest.raises(UnavailableError, match=r"precision float16 is none in which this CPU computes. Choose float32"):
        pick_precision("float16", CPU)


@pytest.mark.parametrize(("capability", "served"), [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_bfloat16_needs_a_gpu_that_multiplies_in_it(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], served: bool
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla T4")
    if served:
        assert pick_precision("bfloat16", GPU) == torch.bfloat16
        return
    with pytest.raises(UnavailableError, match=r"bfloat16 is none in which Tesla T4 computes. Choose float32, float16"):
        pick_precision("bfloat16", GPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_matrices_are_multiplied_in_the_precision(dtype: torch.dtype) -> None:
    with computing_in(dtype, CPU):
        assert (torch.ones(2, 2) @ torch.ones(2, 2)).dtype == dtype


def test_a_torch_without_onednn_says_that_it_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    with pytest.raises(UnavailableError, match=r"precision bfloat16 .*Choose float32$"):
        pick_precision("bfloat16", CPU)
