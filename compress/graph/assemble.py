"""Preprocessing, network, decode and NMS joined into the two graphs that an export writes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from compress.graph.builder import FLOAT, UINT8, GraphBuilder
from compress.graph.decode import HeadShape, decode_all_rows, decode_candidates
from compress.graph.network import NetworkGraph, fold_bgr_bytes, rename_input, split_detect
from compress.graph.nms import NmsShape, detections
from compress.graph.preprocess import FrameLetterbox, canvas_pixels, frame_pixels, unit_rgb

CANVAS, FRAME, DETECTIONS = "canvas", "frame", "detections"
"""Names of the shipped graph's input, of the input with the letterbox inside, and of the output."""


def yolov5_graph(network: NetworkGraph, head: HeadShape, *, opset: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """`images` float32 RGB 0..1 [batch,3,H,W] -> `output0` [batch,N,5+nc]: what YOLOv5's own tools read."""
    builder = GraphBuilder(opset)
    builder.extend(network.nodes, network.constants)
    output = decode_all_rows(builder, network.maps, head)
    return builder.build(
        {network.input: (FLOAT, ["batch", 3, *head.size_hw])},
        {output: (FLOAT, ["batch", head.rows, head.no])},
        metadata,
    )


def boxes_graph(
    network: NetworkGraph,
    head: HeadShape,
    nms: NmsShape,
    *,
    opset: int,
    metadata: Mapping[str, str],
    frame_hw: tuple[int, int] | None = None,
) -> onnx.ModelProto:
    """uint8 BGR canvas [1,S,S,3] (or camera frame [1,H,W,3]) -> `detections` [1,max_det,6] in its pixels."""
    builder = GraphBuilder(opset)
    letterbox = FrameLetterbox(frame_hw, head.size_hw) if frame_hw else None
    source, size_hw = (FRAME, frame_hw) if frame_hw else (CANVAS, head.size_hw)
    pixels = frame_pixels(builder, source, letterbox) if letterbox else canvas_pixels(builder, source)
    folded = fold_bgr_bytes(network)
    if folded is None:
        pixels = unit_rgb(builder, pixels)
    split, pairs = split_detect(rename_input(folded or network, pixels), head.na)
    builder.extend(split.nodes, split.constants)
    count = min(nms.candidates, head.rows)
    output = detections(builder, decode_candidates(builder, pairs, head, count), count, nms, letterbox)
    return builder.build(
        {source: (UINT8, [1, *size_hw, 3])},
        {output: (FLOAT, [1, nms.max_det, 6])},
        metadata,
    )
