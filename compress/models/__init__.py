"""YOLOv5 networks and the files that hold them."""

from compress.models.architecture import DEFAULT_ANCHORS, LAYOUTS, Architecture
from compress.models.checkpoint import Checkpoint, describe, load, load_model, network_digest, save_model, transfer
from compress.models.complexity import complexity
from compress.models.network import YOLOv5

__all__ = [
    "DEFAULT_ANCHORS",
    "LAYOUTS",
    "Architecture",
    "Checkpoint",
    "YOLOv5",
    "complexity",
    "describe",
    "load",
    "load_model",
    "network_digest",
    "save_model",
    "transfer",
]
