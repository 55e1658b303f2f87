"""Preprocessing, network, decode and NMS joined into the two graphs that an export writes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from compress.graph.builder import FLOAT, UINT8, GraphBuilder, Shape
from compress.graph.decode import decode_all_rows, decode_candidates
from compress.graph.head import HeadShape
from compress.graph.network import NetworkGraph, fold_bgr_bytes, rename_input, split_detect
from compress.graph.nms import DETECTIONS, NmsShape, detections
from compress.graph.preprocess import FrameLetterbox, canvas_pixels, frame_pixels, unit_rgb
from runtime.backends import CUTOFF

CANVAS, FRAME = "canvas", "frame"
"""Names of the shipped graph's input, without and with the letterbox inside."""
BATCH = "batch"
"""Name of an open batch."""


def yolov5_graph(
    network: NetworkGraph,
    head: HeadShape,
    *,
    opset: int,
    metadata: Mapping[str, str],
    batch: int | None = 1,
) -> onnx.ModelProto:
    """`images` float32 RGB 0..1 [B,3,H,W] -> `output0` [B,N,5+nc]: what YOLOv5's own tools read.

    `batch` None leaves B, H and W open, as YOLOv5's `--dynamic` does.
    """
    builder = GraphBuilder(opset)
    builder.extend(network.nodes, network.constants)
    output = decode_all_rows(builder, network.maps, head, fixed=batch is not None)
    images: Shape = [batch, 3, *head.size_hw] if batch else [BATCH, 3, "height", "width"]
    rows: Shape = [batch, head.rows, head.no] if batch else [BATCH, "anchors", head.no]
    return builder.build({network.input: (FLOAT, images)}, {output: (FLOAT, rows)}, metadata)


def boxes_graph(
    network: NetworkGraph,
    head: HeadShape,
    nms: NmsShape,
    *,
    opset: int,
    metadata: Mapping[str, str],
    frame_hw: tuple[int, int] | None = None,
    batch: int | None = 1,
) -> onnx.ModelProto:
    """uint8 BGR canvas [B,H,W,3] (or frame) -> `detections` [B,max_det,6] in its pixels, and `cutoff` [B].

    `batch` None leaves B open.
    """
    builder = GraphBuilder(opset)
    letterbox = FrameLetterbox(frame_hw, head.size_hw) if frame_hw else None
    source, size_hw = (FRAME, frame_hw) if frame_hw else (CANVAS, head.size_hw)
    pixels = frame_pixels(builder, source, letterbox, batch) if letterbox else canvas_pixels(builder, source)
    folded = fold_bgr_bytes(network)
    if folded is None:
        pixels = unit_rgb(builder, pixels)
    split, pairs = split_detect(rename_input(folded or network, pixels), head.na, head.few_classes)
    builder.extend(split.nodes, split.constants)
    count = min(nms.candidates, head.rows)
    detections(builder, decode_candidates(builder, pairs, head, count), count, nms, letterbox)
    images = batch or BATCH
    return builder.build(
        {source: (UINT8, [images, *size_hw, 3])},
        {DETECTIONS: (FLOAT, [images, nms.max_det, 6]), CUTOFF: (FLOAT, [images])},
        metadata,
    )
