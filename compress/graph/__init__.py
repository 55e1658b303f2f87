"""ONNX graphs: traced from torch, given preprocessing and NMS, rewritten for each precision, and checked.

Everything here works on `onnx.ModelProto` or on plain tuples; nothing reads a recipe or a data set.
"""
