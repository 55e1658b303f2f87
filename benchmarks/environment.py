"""The environment of a measurement: the machine, its load and its limits."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from runtime import machine

GOVERNOR = Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor")
THREAD_LIMIT = "OMP_NUM_THREADS"
METRIC_PACKAGE = "faster-coco-eval"


def environment() -> dict[str, Any]:
    """`runtime.machine.facts()` and, if they are known, CPU governor, load, thread limit and the mAP package."""
    facts = machine.facts()
    more = {"governor": _governor(), "load_1min": _load(), THREAD_LIMIT.lower(): os.environ.get(THREAD_LIMIT, "")}
    packages = facts["packages"] | {METRIC_PACKAGE: machine.installed_version(METRIC_PACKAGE)}
    return facts | {"packages": packages} | {key: value for key, value in more.items() if value not in (None, "")}


CPU = "cpu"
"""Name of the device that is no GPU."""
CPU_PROVIDERS = ("CPUExecutionProvider", "OpenVINO on the CPU")


def device_name(providers: tuple[str, ...]) -> str:
    """The device that runs a file: "cpu", or the first GPU's name. `providers` are those of the loaded detector."""
    if providers[0] in CPU_PROVIDERS:
        return CPU
    gpus = machine.facts()["gpus"]
    return gpus[0]["name"] if gpus else providers[0]


def _governor() -> str:
    return GOVERNOR.read_text().strip() if GOVERNOR.is_file() else ""


def _load() -> float | None:
    """Processes that wanted a CPU in the last minute: if there are more than cores, they raise the latency."""
    return round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None
