"""Trunk, head and tail joined into the two graphs that an export publishes."""

from __future__ import annotations

from collections.abc import Mapping

import onnx

from compress.graph.builder import FLOAT, UINT8, GraphBuilder
from compress.graph.heads import LetterboxGeometry, canvas_head, frame_head, rgb_unit
from compress.graph.tails import HeadShape, NmsShape, boxes_tail, rows_tail
from compress.graph.trunk import Trunk, fold_bgr_bytes, rename_input, split_detect

CANVAS, FRAME, DETECTIONS = "canvas", "frame", "detections"
"""Names of the shipped graph's input, of the input with the letterbox inside, and of the output."""


def yolov5_graph(trunk: Trunk, head: HeadShape, *, opset: int, metadata: Mapping[str, str]) -> onnx.ModelProto:
    """`images` float32 RGB 0..1 [batch,3,H,W] -> `output0` [batch,N,5+nc]: what YOLOv5's own tools read."""
    builder = GraphBuilder(opset)
    builder.extend(trunk.nodes, trunk.constants)
    output = rows_tail(builder, trunk.maps, head)
    return builder.build(
        {trunk.input: (FLOAT, ["batch", 3, *head.size_hw])},
        {output: (FLOAT, ["batch", head.rows, head.no])},
        metadata,
    )


def boxes_graph(
    trunk: Trunk,
    head: HeadShape,
    nms: NmsShape,
    *,
    opset: int,
    metadata: Mapping[str, str],
    frame_hw: tuple[int, int] | None = None,
) -> onnx.ModelProto:
    """uint8 BGR canvas [1,S,S,3] (or camera frame [1,H,W,3]) -> `detections` [1,max_det,6] in its pixels."""
    builder = GraphBuilder(opset)
    geometry = LetterboxGeometry(frame_hw, head.size_hw) if frame_hw else None
    source, size_hw = (FRAME, frame_hw) if frame_hw else (CANVAS, head.size_hw)
    pixels = frame_head(builder, source, geometry) if geometry else canvas_head(builder, source)
    folded = fold_bgr_bytes(trunk)
    if folded is None:
        pixels = rgb_unit(builder, pixels)
    split, pairs = split_detect(rename_input(folded or trunk, pixels), head.na)
    builder.extend(split.nodes, split.constants)
    output = boxes_tail(builder, pairs, head, nms, geometry)
    return builder.build(
        {source: (UINT8, [1, *size_hw, 3])},
        {output: (FLOAT, [1, nms.max_det, 6])},
        metadata,
    )
