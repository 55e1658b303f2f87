"""The facts of this machine, and the reasons why an engine that was built elsewhere cannot run on it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from runtime.backends import BACKENDS
from runtime.card import Artifact

PACKAGES = {
    "numpy": ("numpy",),
    "opencv": ("opencv-python-headless", "opencv-python", "opencv-contrib-python", "opencv-contrib-python-headless"),
    **{spec.library: spec.distributions for spec in BACKENDS.values()},
    "cuda-bindings": ("cuda-bindings",),
    "pycuda": ("pycuda",),
    "torch": ("torch",),
}
"""Import name -> the distributions that install it."""
UNKNOWN = "unknown"
"""The version of a backend's library that was installed without metadata, as TensorRT is by JetPack."""
VERSION_PARTS = 3
NO_GPU = "nvidia-smi shows none"
GPU_FIELDS = {
    "name": "name",
    "compute_capability": "compute_cap",
    "driver": "driver_version",
    "memory_mib": "memory.total",
}
JETSON_MODEL = Path("/proc/device-tree/model")
JETSON_CAPABILITY = {"Thor": "11.0", "Orin": "8.7", "Xavier": "7.2", "TX2": "6.2", "Nano": "5.3"}
"""nvidia-smi of a Jetson, if there is one, does not give the compute capability. The order matters: an Orin Nano
must be found as Orin."""
NVIDIA_BOARD = re.compile("NVIDIA|Jetson")
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"
"""Logical CPUs that share the core of this one."""

CGROUPS, CGROUPS_OF_PROCESS = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
QUOTA_FILES = ("cpu.cfs_quota_us", "cpu.cfs_period_us")


@lru_cache(maxsize=1)
def facts() -> dict[str, Any]:
    """CPU, memory, system, GPUs, package versions and ONNX Runtime's providers, as plain JSON values.

    Nothing is imported but ONNX Runtime, and nothing that could name the machine or its user is read.
    """
    return {
        "cpu": cpu_model(),
        "cores": usable_cores(),
        "ram_bytes": _ram_bytes(),
        "os": f"{platform.system()} {platform.release()}",
        "platform": platform_tag(),
        "python": platform.python_version(),
        "board": _read_text(JETSON_MODEL).rstrip("\0"),
        "gpus": gpus(),
        "packages": package_versions(),
        "providers": onnx_providers(),
    }


def usable_cpus() -> list[int]:
    """Numbers of the logical CPUs that this process may use."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def usable_cores() -> int:
    """Logical CPUs that this process may use at once: their number, or the container's CPU quota if it is less."""
    return _within_quota(len(usable_cpus()))


def compute_threads() -> int:
    """Threads of one inference: one for each core that this process may use, hyper-threads not counted."""
    return _within_quota(len({_read_text(Path(SIBLINGS.format(cpu))) or str(cpu) for cpu in usable_cpus()}))


def _within_quota(cores: int) -> int:
    """`cores`, or the CPU quota rounded down: with more threads than that, all stop for the rest of each period."""
    quota = cpu_quota()
    return cores if quota is None else max(1, min(cores, int(quota)))


def cpu_quota() -> float | None:
    """CPUs that the control groups (version 1 or 2) of this process allow, the least of all levels; None without."""
    quotas = []
    for line in _read_text(CGROUPS_OF_PROCESS).splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers in ("", "cpu", "cpu,cpuacct", "cpuacct,cpu"):
            levels = Path("/", name)
            folders = [CGROUPS / controllers / str(level).strip("/") for level in (levels, *levels.parents)]
            quotas += [quota for folder in folders if (quota := _quota_in(folder)) is not None]
    return min(quotas, default=None)


def _quota_in(folder: Path) -> float | None:
    """From `cpu.max` ("150000 100000": microseconds in each period) of version 2, or version 1's two files."""
    text = _read_text(folder / "cpu.max") or " ".join(_read_text(folder / file) for file in QUOTA_FILES)
    numbers = text.split()
    if len(numbers) != 2 or not all(number.isdecimal() for number in numbers) or int(numbers[1]) == 0:
        return None  # "max", -1, or no such file: no limit here
    return int(numbers[0]) / int(numbers[1])


def platform_tag() -> str:
    """For example "linux-x86_64": an engine never runs on another."""
    return f"{sys.platform}-{platform.machine().lower()}"


def cpu_model() -> str:
    lines = _read_text(Path("/proc/cpuinfo")).splitlines()
    named = (line.partition(":")[2].strip() for line in lines if line.startswith(("model name", "Model")))
    return next(named, "") or platform.processor() or platform.machine()


VNNI_FLAGS = {"avx512_vnni", "avx_vnni"}


def has_vnni() -> bool:
    """Whether the CPU is known to sum products of 8-bit integers in 32 bits; False where nothing says so."""
    lines = _read_text(Path("/proc/cpuinfo")).splitlines()
    flags = next((line.partition(":")[2].split() for line in lines if line.startswith("flags")), [])
    return not VNNI_FLAGS.isdisjoint(flags)


def exact_sums() -> str:
    """The value of ONNX Runtime's `session.x64quantprecision`.

    Without VNNI its kernels for weights of 8 bits cut sums off, and "1" takes slower, exact ones; ONNX Runtime would
    take them with VNNI too, where yolov5n then needs 1.6 times as long. Weights of 7 bits are exact either way.
    """
    return str(int(not has_vnni()))


def _ram_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows has no sysconf
        return None


def _read_text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def gpus() -> list[dict[str, str]]:
    """NVIDIA GPUs by nvidia-smi, or a Jetson's own by its board name; empty if there is none."""
    program = shutil.which("nvidia-smi")
    command = [str(program), f"--query-gpu={','.join(GPU_FIELDS.values())}", "--format=csv,noheader,nounits"]
    listed = parse_gpus(_output(command)) if program else []
    return listed or jetson_gpu(_read_text(JETSON_MODEL).rstrip("\0"))


def _output(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)  # noqa: S603
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def parse_gpus(text: str) -> list[dict[str, str]]:
    """One dictionary for each line of nvidia-smi's CSV that tells a compute capability."""
    rows = ([cell.strip() for cell in line.split(",")] for line in text.splitlines())
    found = [dict(zip(GPU_FIELDS, row, strict=True)) for row in rows if len(row) == len(GPU_FIELDS)]
    return [gpu for gpu in found if gpu["compute_capability"].replace(".", "").isdecimal()]


def jetson_gpu(board: str) -> list[dict[str, str]]:
    capability = next((value for key, value in JETSON_CAPABILITY.items() if key in board), None)
    return [{"name": board, "compute_capability": capability}] if capability and NVIDIA_BOARD.search(board) else []


def package_versions() -> dict[str, str]:
    """Version of every package of `PACKAGES` that is installed."""
    found = {name: installed_version(*options) for name, options in PACKAGES.items()}
    libraries = [spec.library for spec in BACKENDS.values()]
    found |= {name: UNKNOWN for name in libraries if not found.get(name) and find_spec(name)}
    return {name: version for name, version in found.items() if version}


def installed_version(*distributions: str) -> str:
    """Version of the first distribution that is installed; empty without one."""
    for distribution in distributions:
        with suppress(importlib.metadata.PackageNotFoundError):
            return importlib.metadata.version(distribution)
    return ""


def onnx_providers() -> list[str]:
    """Providers that the installed ONNX Runtime was built with, its libraries present or not; empty without it."""
    try:
        import onnxruntime
    except ImportError:
        return []
    return list(onnxruntime.get_available_providers())


def sm_name(compute_capability: str) -> str:
    """Name of the target: compute capability 8.6 is "sm86"."""
    return "sm" + compute_capability.replace(".", "")


def mismatches(artifact: Artifact, machine: Mapping[str, Any]) -> list[str]:
    """The reasons why the artifact cannot run on the machine, each with both values; empty when there is none.

    An engine needs the exact version of its library, the platform, and a GPU that it was built for. Files of a
    portable backend run anywhere.
    """
    if BACKENDS[artifact.backend].portable:
        return []
    checks = (_version_mismatch, _platform_mismatch, _target_mismatch)
    return [reason for check in checks if (reason := check(artifact, machine))]


def lacks(artifact: Artifact, machine: Mapping[str, Any]) -> list[str]:
    """The needs of a file of a portable backend that the machine does not meet.

    It may run all the same, in another way than it is made for, where the backend is named.
    """
    return [reason for check in (_library_lack, _gpu_lack) if (reason := check(artifact, machine))]


def _library_lack(artifact: Artifact, machine: Mapping[str, Any], version: str = "") -> str:
    library = BACKENDS[artifact.backend].library
    installed = machine["packages"].get(library)
    return "" if installed else f"it needs {library} {version}".rstrip() + ", which is not installed"


def _gpu_lack(artifact: Artifact, machine: Mapping[str, Any]) -> str:
    devices = artifact.devices
    if machine["gpus"] or not devices or "cpu" in devices:
        return ""
    return f"it is made for {' or '.join(devices)} on an NVIDIA GPU, and {NO_GPU}"


def _version_mismatch(artifact: Artifact, machine: Mapping[str, Any]) -> str:
    library = BACKENDS[artifact.backend].library
    built = artifact.versions.get(library, "")
    if lack := _library_lack(artifact, machine, built):
        return lack
    here = machine["packages"][library]
    same = not built or here == UNKNOWN or same_version(built, here)
    return "" if same else f"it was built with {library} {built}, here is {here}"


def same_version(left: str, right: str) -> bool:
    """Whether versions are equal as far as both are given: a module says 10.3.0 and its package 10.3.0.26."""
    pairs = list(zip(left.split("."), right.split("."), strict=False))
    return len(pairs) >= VERSION_PARTS and all(a == b for a, b in pairs)


def _platform_mismatch(artifact: Artifact, machine: Mapping[str, Any]) -> str:
    built, here = artifact.versions.get("platform", ""), machine["platform"]
    return f"it was built for {built}, this is {here}" if built and built != here else ""


def _target_mismatch(artifact: Artifact, machine: Mapping[str, Any]) -> str:
    if not machine["gpus"]:
        return f"it needs an NVIDIA GPU, and {NO_GPU}"
    here = [sm_name(gpu["compute_capability"]) for gpu in machine["gpus"]]
    if not artifact.targets or here[0] in artifact.targets:
        return ""
    return f"it was built for {', '.join(artifact.targets)}, this GPU is {here[0]} ({machine['gpus'][0]['name']})"
