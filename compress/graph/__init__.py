"""ONNX graphs: trace them from torch, add preprocessing and NMS, rewrite them for each precision, and check them.

Everything here works on `onnx.ModelProto` or on plain tuples; nothing reads a recipe or a data set.
"""
