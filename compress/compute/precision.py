"""The arithmetic of networks by its name in a recipe, and where it runs.

Weights, losses, gradients and averages stay float32. Convolutions and maps have the precision; float16 is right only
with a gradient scaler, bfloat16 has float32's range and three binary digits less than float16.
"""

from __future__ import annotations

import torch

from compress.config import PrecisionName
from runtime.errors import UnavailableError

AUTO = {"cpu": torch.float32, "cuda": torch.float16}
"""Kind of device -> the precision that it takes unasked."""
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
AMPERE = (8, 0)
"""The first compute capability that multiplies in bfloat16."""


def pick_precision(request: PrecisionName, device: torch.device) -> torch.dtype:
    """The type of the networks' arithmetic on the device.

    Raises UnavailableError when the device does not compute in it.
    """
    dtype = AUTO[device.type] if request == "auto" else DTYPES[request]
    if not _is_served(dtype, device):
        others = ", ".join(name for name in DTYPES if _is_served(DTYPES[name], device))
        raise UnavailableError(f"precision {request} is none in which {_named(device)} computes", f"Choose {others}")
    return dtype


def _is_served(dtype: torch.dtype, device: torch.device) -> bool:
    if dtype == torch.float32:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.get_device_capability(device) >= AMPERE
    has_mkldnn = torch.backends.mkldnn.is_available()
    return dtype == torch.bfloat16 and has_mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "this CPU"


def computing_in(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which networks compute in `dtype`."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
