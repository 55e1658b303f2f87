from __future__ import annotations

import pytest
import torch

from compress.kernels import toolchain, warm
from compress.kernels.rescale import SOURCE as RESCALE
from runtime.errors import EdgestillError, UnavailableError


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path))
    try:
        toolchain.header_folders()
        toolchain.load_nvrtc()
    except UnavailableError as error:
        pytest.skip(str(error))
    return tmp_path / "kernels"


def test_what_was_compiled_ahead_is_not_compiled_at_first_use(cache, monkeypatch):
    sources = [RESCALE, RESCALE.replaced(THREADS=128)]
    assert warm.warm(sources, "sm_90") == ["rescale_bf16", "rescale_f16", "rescale_f32"]
    assert len(list(cache.iterdir())) == 2
    monkeypatch.setattr(toolchain, "compile_for", None)
    assert toolchain.code_for(sources[1], "sm_90")[:4] == b"\x7fELF"


def test_a_source_that_does_not_compile_is_told(cache):
    with pytest.raises(EdgestillError, match=r"rescale/kernel\.cu does not compile for sm_90"):
        warm.warm([RESCALE, toolchain.Source("rescale")], "sm_90")


def test_without_a_gpu_an_architecture_is_asked_for(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert warm.main([]) == 1
    told = capsys.readouterr().err
    assert told == "error: torch sees no NVIDIA GPU here. Name an architecture, such as sm_120\n"
