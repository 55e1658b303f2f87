"""The compression half of edgestill: from a YOLOv5 checkpoint to a measured engine."""

from importlib.metadata import version

__version__ = version("edgestill")
