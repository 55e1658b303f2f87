from __future__ import annotations

import re
from pathlib import Path

import pytest

from compress import doctor
from runtime.errors import UnavailableError

RTX = {"name": "RTX 4060", "compute_capability": "8.9"}
H100 = {"name": "H100", "compute_capability": "9.0"}


@pytest.mark.parametrize(
    ("gpus", "installed", "ok"),
    [([], "", None), ([RTX], "", False), ([RTX], "13.0", True)],
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


@pytest.mark.parametrize(
    ("gpus", "missing", "ok", "says"),
    [
        ([], False, None, "no NVIDIA GPU here, plain torch is used"),
        ([], True, None, "NVRTC is not here"),
        ([H100], True, False, "NVRTC is not here"),
        ([H100], False, True, "for sm_90, kept in"),
    ],
)
def test_it_is_told_whether_the_fused_kernels_can_run_and_why_not(monkeypatch, gpus, missing, ok, says) -> None:
    def version() -> str:
        if missing:
            raise UnavailableError("the CUDA compiler NVRTC is not here")
        return "13.0"

    monkeypatch.setattr(doctor, "gpus", lambda: gpus)
    monkeypatch.setattr(doctor.toolchain, "compiler_version", version)
    monkeypatch.setattr(doctor.toolchain, "header_folders", lambda: ("include",))
    monkeypatch.setattr(doctor.toolchain, "architecture_for", "sm_{0[0]}{0[1]}".format)
    monkeypatch.setattr(doctor.toolchain, "code_for", lambda source, architecture: b"")
    finding = {found.name: found for found in doctor.examine()}["fused kernels"]
    assert finding.ok is ok
    assert says in finding.detail
    assert ("edgestill[kernels]" in doctor.as_text([finding])) is missing


@pytest.mark.parametrize("extra", doctor.PACKAGES)
def test_the_packages_of_an_extra_are_those_that_it_installs(extra: str) -> None:
    tomllib = pytest.importorskip("tomllib")
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = [re.match(r"[\w-]+", line)[0] for line in project["optional-dependencies"][extra]]
    assert {name for name in names if name != "edgestill"} == set(doctor.PACKAGES[extra][0])
