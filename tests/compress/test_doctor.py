from __future__ import annotations

import pytest

from compress import doctor


@pytest.mark.parametrize(
    ("gpus", "installed", "ok"),
    [([], "", None), ([{"name": "RTX 4060"}], "", False), ([{"name": "RTX 4060"}], "13.0", True)],
)
def test_a_gpu_without_access_to_its_memory_cannot_run_plans(monkeypatch, gpus, installed, ok) -> None:
    monkeypatch.setattr(doctor, "gpus", lambda: gpus)
    monkeypatch.setattr(doctor, "installed_version", lambda *names: installed)
    finding = {found.name: found for found in doctor.examine()}["run plans"]
    assert finding.ok is ok
    assert ("pip install cuda-bindings" in doctor.as_text([finding])) == (ok is False)


def test_a_package_whose_library_is_missing_is_a_finding(monkeypatch) -> None:
    def load(name: str) -> None:
        raise OSError("libcudart.so.12: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", load)
    found = {finding.name: finding for finding in doctor.examine()}
    assert found["TensorRT"].ok is None
    assert "libcudart" in found["TensorRT"].detail
