from __future__ import annotations

import functools
import shutil
import subprocess
import sys
from types import SimpleNamespace

import pytest
from shim import figures

from compress.kernels import toolchain
from compress.kernels.adapter_mse import _Kind, source_of
from compress.kernels.losses import SOURCES
from compress.kernels.rescale import SOURCE as RESCALE
from compress.kernels.toolchain import (
    ARCHITECTURES,
    FOLDER,
    Compiled,
    Resources,
    Source,
    architecture_for,
    code_for,
    compile_for,
    kernel_names,
)
from runtime.errors import EdgestillError, UnavailableError

REGISTERS = {
    "adapter_mse": 192,
    "cwd": 128,
    "pkd": 128,
}
"""Most registers per thread, by source; 64 if nothing is said, which keep four blocks of 256 on a multiprocessor."""


every_source = pytest.mark.parametrize("source", SOURCES, ids=lambda source: source.folder)
compiled = functools.cache(compile_for)


@pytest.fixture(scope="module")
def nvrtc():
    try:
        toolchain.header_folders()
        return toolchain.load_nvrtc()
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def cache(monkeypatch, tmp_path):
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@every_source
def test_every_kernel_compiles_for_every_architecture_without_spills(nvrtc, source, architecture):
    code, kernels = compiled(source, architecture).code, compiled(source, architecture).resources
    assert code[:4] == b"\x7fELF"
    assert kernels
    most = REGISTERS.get(source.folder, 64)
    figures.compiled.setdefault(architecture, set()).update(kernels)
    assert kernel_names(code) == sorted(kernels)
    for name, resources in kernels.items():
        assert resources.spill_bytes == 0, name
        assert resources.registers <= most, (name, resources)


@pytest.mark.parametrize("channels", [(64, 128), (24, 40)], ids=str)
def test_two_blocks_of_a_narrow_adapter_fit_without_spills(nvrtc, channels):
    kernels = compiled(source_of(_Kind(*channels, True)), "sm_90").resources
    assert all(resources.registers <= 128 and resources.spill_bytes == 0 for resources in kernels.values())


@every_source
def test_every_kernel_is_there_on_every_architecture(nvrtc, source):
    """A `__global__` under an architecture's condition would be missing on another."""
    first, *others = (set(compiled(source, architecture).resources) for architecture in ARCHITECTURES)
    assert all(names == first for names in others)


@pytest.mark.parametrize(
    ("capability", "architecture"),
    [((9, 0), "sm_90"), ((12, 0), "sm_120"), ((9, 9), "compute_90"), ((99, 0), "compute_121"), ((7, 0), "sm_70")],
)
def test_a_gpu_newer_than_the_compiler_gets_what_its_driver_can_compile(monkeypatch, capability, architecture):
    known = SimpleNamespace(nvrtcGetSupportedArchs=lambda: (0, [75, 80, 90, 120, 121]))
    monkeypatch.setattr(toolchain, "load_nvrtc", lambda: known)
    assert architecture_for(capability) == architecture


def test_what_a_driver_compiles_has_the_same_kernels(nvrtc, cache):
    code = code_for(RESCALE, "compute_90")
    assert b".target sm_90" in code
    assert code.endswith(b"\0"), "the driver reads as far as that"
    assert kernel_names(code) == sorted(compiled(RESCALE, "sm_90").resources)


def test_an_empty_log_is_not_written_over_what_python_shares(nvrtc):
    assert compile_for(RESCALE, "compute_90").log == ""
    assert bytes([32]).hex() == "20"


@every_source
def test_nvcc_compiles_the_same_source(source, tmp_path):
    """A whole-program compiler refuses what NVRTC lets through."""
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("nvcc is not installed")
    options = ["-std=c++17", "-cubin", "-arch=sm_90", "-Werror", "all-warnings", "-o", str(tmp_path / "k.cubin")]
    options += [f"-I{FOLDER}", *(f"-D{define}" for define in source.defines)]
    done = subprocess.run([nvcc, *options, str(source.path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_second_start_compiles_nothing(nvrtc, cache, monkeypatch):
    first = code_for(RESCALE, "sm_90")
    monkeypatch.setattr(toolchain, "compile_for", None)
    assert code_for(RESCALE, "sm_90") == first


@pytest.mark.parametrize("change", ["architecture", "defines", "source", "header", "compiler"])
def test_whatever_machine_code_depends_on_is_in_the_key(nvrtc, monkeypatch, tmp_path, change):
    copy = tmp_path / "kernels"
    shutil.copytree(FOLDER, copy)
    monkeypatch.setattr(toolchain, "FOLDER", copy)
    before, architecture, source = toolchain._key(RESCALE, "sm_90"), "sm_90", RESCALE
    if change == "architecture":
        architecture = "sm_80"
    elif change == "defines":
        source = RESCALE.replaced(THREADS=128)
    elif change == "compiler":
        monkeypatch.setattr(toolchain, "compiler_version", lambda: "99.0")
    else:
        file = copy / ("rescale/kernel.cu" if change == "source" else "common.cuh")
        file.write_text(file.read_text() + "\n// another\n")
    assert toolchain._key(source, architecture) != before


def test_a_constant_of_the_host_half_is_the_kernels_own(nvrtc):
    """No other copy of it is left in the source."""
    code = compiled(RESCALE, "sm_90").code
    assert compile_for(RESCALE.replaced(THREADS=128), "sm_90").code != code
    with pytest.raises(EdgestillError, match=r"rescale/kernel.cu does not compile"):
        compile_for(Source("rescale"), "sm_90")


def test_constants_are_replaced_or_added_by_name():
    assert Source("x", ("A=1", "B=2")).replaced(B=3, C=1e-9) == Source("x", ("A=1", "B=3", "C=1e-09"))


def test_damaged_code_is_compiled_anew(nvrtc, cache):
    whole = code_for(RESCALE, "sm_90")
    (kept,) = (cache / "kernels").iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    assert code_for(RESCALE, "sm_90") == whole
    assert len(kept.read_bytes()) > len(whole)


def test_a_cache_that_cannot_be_written_costs_only_time(nvrtc, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("EDGESTILL_CACHE", str(tmp_path / "file"))
    assert code_for(RESCALE, "sm_90")


def test_a_source_that_does_not_compile_is_told_with_its_first_error(nvrtc, monkeypatch, tmp_path):
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "kernel.cu").write_text('extern "C" __global__ void k(int x) { y = x; }')
    monkeypatch.setattr(toolchain, "FOLDER", tmp_path)
    with pytest.raises(EdgestillError, match=r'broken/kernel.cu does not compile for sm_90: .*"y" is undefined'):
        compile_for(Source("broken"), "sm_90")


@pytest.mark.parametrize(
    ("look", "package", "says"),
    [
        (toolchain.load_nvrtc, "cuda.bindings", "NVRTC is not here"),
        (toolchain.header_folders, "cuda.pathfinder", "cannot be looked for"),
    ],
    ids=["compiler", "headers"],
)
def test_without_the_compiler_or_what_finds_its_headers_the_remedy_is_told(monkeypatch, look, package, says):
    look.cache_clear()
    monkeypatch.setitem(sys.modules, package, None)
    try:
        with pytest.raises(UnavailableError, match=rf"{says}.*edgestill\[kernels\]"):
            look()
    finally:
        look.cache_clear()


def test_the_assemblers_report_is_read():
    log = (
        "ptxas info    : Compiling entry function 'a_f16' for 'sm_90'\n"
        "    8 bytes stack frame, 12 bytes spill stores, 16 bytes spill loads\n"
        "ptxas info    : Used 40 registers, used 1 barriers, 128 bytes smem\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_90'\n"
        "ptxas info    : Used 16 registers, used 0 barriers\n"
    )
    assert Compiled(b"", log).resources == {"a_f16": Resources(40, 12, 128), "b": Resources(16, 0, 0)}


def test_every_kernel_of_the_package_is_in_the_table():
    assert {source.path for source in SOURCES} == set(FOLDER.rglob("*.cu"))
