"""Examine this machine: one `Finding` for each capability, with the command that installs what is missing."""

from __future__ import annotations

import importlib
import platform
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from compress.kernels import toolchain
from runtime.errors import EdgestillError, one_line
from runtime.machine import gpus, installed_version

LOW_DISK_GIB = 5.0


@dataclass(frozen=True)
class Finding:
    """One capability. `ok` is None if it is not needed here; `remedy` is a command or an instruction."""

    name: str
    ok: bool | None
    detail: str
    remedy: str = ""


PACKAGES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "compress": (
        ("torch", "onnx", "accelerate", "safetensors", "pydantic", "pyyaml", "scipy", "rich", "tensorboard", "psutil"),
        "train, distil, export",
    ),
    "bench": (("faster-coco-eval", "jinja2", "jsonschema", "matplotlib"), "measure and report"),
    "cpu": (("onnxruntime",), "run .onnx on this CPU"),
}
"""Extra of pyproject.toml -> (its packages, their use)."""


def examine() -> list[Finding]:
    """Every finding, in the order in which a pipeline needs them."""
    return [
        _python(),
        _disk(Path.cwd()),
        *(_extra(extra, names, use) for extra, (names, use) in PACKAGES.items()),
        _torch_device(),
        _fused_kernels(),
        _providers(),
        _openvino(),
        *_engines(),
        _plan_runner(),
    ]


def to_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    return [asdict(finding) for finding in findings]


def as_text(findings: Iterable[Finding]) -> str:
    marks = {True: "ok     ", False: "MISSING", None: "-      "}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.ok]}  {finding.name:<16} {finding.detail}")
        if finding.remedy and not finding.ok:
            lines.append(f"{'':<9}{'':<17}-> {finding.remedy}")
    return "\n".join(lines)


def _python() -> Finding:
    version = platform.python_version()
    return Finding(
        "python", (3, 10) <= sys.version_info[:2] <= (3, 13), f"{version} on {platform.platform()}", "Use 3.10 to 3.13"
    )


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 2**30
    return Finding("disk", free > LOW_DISK_GIB, f"{free:.0f} GiB free here", f"Free at least {LOW_DISK_GIB:.0f} GiB")


def _extra(extra: str, names: Iterable[str], use: str) -> Finding:
    versions = {name: installed_version(name, f"{name}-gpu") for name in names}
    absent = [name for name, version in versions.items() if not version]
    detail = ", ".join(f"{name} {version or 'absent'}" for name, version in versions.items())
    return Finding(use, not absent, detail, f"pip install 'edgestill[{extra}]'")


def _probe(name: str, module: str, look: Callable[[Any], Finding], remedy: str) -> Finding:
    """The finding of `look` in an optional module; a missing module or a failing import is a finding too."""
    try:
        return look(importlib.import_module(module))
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        return Finding(name, None, one_line(error), remedy)


def _torch_device() -> Finding:
    def look(torch: Any) -> Finding:
        if torch.cuda.is_available():
            return Finding("training GPU", True, torch.cuda.get_device_name())
        return Finding("training GPU", None, f"none; torch {torch.__version__} trains on the CPU")

    return _probe("training GPU", "torch", look, "pip install 'edgestill[compress]'")


def _fused_kernels() -> Finding:
    """Distillation losses run as CUDA kernels if there are a GPU, NVRTC and CUDA's headers."""
    here = gpus()
    try:
        compiler = f"NVRTC {toolchain.compiler_version()}, headers in {toolchain.header_folders()[0]}"
        if not here:
            return Finding("fused kernels", None, f"{compiler}; no NVIDIA GPU here, plain torch is used")
        major, minor = map(int, here[0]["compute_capability"].split("."))
        architecture = toolchain.architecture_for((major, minor))
        from compress.kernels.rescale import SOURCE  # needs torch, which may be absent

        toolchain.code_for(SOURCE, architecture)
    except (EdgestillError, ImportError) as error:
        return Finding("fused kernels", False if here else None, one_line(error), toolchain.REMEDY)
    return Finding("fused kernels", True, f"{compiler}; for {architecture}, kept in {toolchain.cache_folder()}")


def _providers() -> Finding:
    def look(onnxruntime: Any) -> Finding:
        names = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
        return Finding("onnxruntime on", True, ", ".join(names))

    return _probe("onnxruntime on", "onnxruntime", look, "pip install 'edgestill[cpu]' or 'edgestill[gpu]'")


def _openvino() -> Finding:
    def look(openvino: Any) -> Finding:
        return Finding("OpenVINO", True, f"{openvino.__version__}: runs and judges int8-openvino on this CPU")

    return _probe("OpenVINO", "openvino", look, "pip install 'edgestill[openvino]'")


def _engines() -> list[Finding]:
    def look(name: str) -> Callable[[Any], Finding]:
        return lambda module: Finding(name, True, f"{module.__version__}: builds plans here")

    return [
        _probe("TensorRT", "tensorrt", look("TensorRT"), "pip install 'edgestill[gpu]' (NVIDIA GPU, or JetPack's own)"),
        _probe("TensorRT-RTX", "tensorrt_rtx", look("TensorRT-RTX"), "pip install 'edgestill[rtx]'"),
    ]


def _plan_runner() -> Finding:
    """Building a plan ahead of time needs no GPU; running one needs a GPU and access to its memory."""
    here, access = gpus(), {name: installed_version(name) for name in ("cuda-bindings", "pycuda")}
    if not here:
        return Finding("run plans", None, "no NVIDIA GPU here; plans run on the machine they are built for")
    detail = ", ".join([here[0]["name"], *(f"{name} {version or 'absent'}" for name, version in access.items())])
    return Finding("run plans", any(access.values()), detail, "pip install cuda-bindings")
