"""YOLOv5 networks and the files that hold them."""

from compress.models.architecture import LAYOUTS, Architecture
from compress.models.checkpoint import describe, load, load_model, network_digest, save_model, transfer
from compress.models.complexity import complexity
from compress.models.network import YOLOv5

__all__ = [
    "LAYOUTS",
    "Architecture",
    "YOLOv5",
    "complexity",
    "describe",
    "load",
    "load_model",
    "network_digest",
    "save_model",
    "transfer",
]
