"""YOLOv5 networks and the files that hold them."""

from compress.models.architecture import DEFAULT_ANCHORS, LAYOUTS, SCALES, Architecture
from compress.models.yolov5 import YOLOv5

__all__ = ["DEFAULT_ANCHORS", "LAYOUTS", "SCALES", "Architecture", "YOLOv5"]
