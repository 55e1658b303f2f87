"""The compression package of edgestill: from a YOLOv5 checkpoint to a measured engine."""

from runtime import __version__

__all__ = ["__version__"]
