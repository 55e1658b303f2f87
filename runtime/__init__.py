"""Detection on the device: a model file and frames in, boxes out. It needs NumPy, OpenCV and one inference library.

from runtime import Detector
with Detector.load("bundle/") as detector:
    detections = detector(frame)  # uint8 (H, W, 3) BGR
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from runtime.errors import EdgestillError, EngineError, InputError, UnavailableError, UsageError

if TYPE_CHECKING:
    from runtime.card import ModelCard
    from runtime.detections import Detections
    from runtime.detector import Detector

__version__ = "0.1.0"

__all__ = [
    "Detections",
    "Detector",
    "EdgestillError",
    "EngineError",
    "InputError",
    "ModelCard",
    "UnavailableError",
    "UsageError",
    "__version__",
]

_LAZY = {"Detections": "runtime.detections", "Detector": "runtime.detector", "ModelCard": "runtime.card"}


def __getattr__(name: str) -> Any:
    """OpenCV takes 0.15 s to load, so it is loaded with the first name that needs it."""
    if name not in _LAZY:
        raise AttributeError(f"module 'runtime' has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)
