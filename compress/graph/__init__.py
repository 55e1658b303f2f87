"""ONNX graphs as data: traced, extended with heads and tails, rewritten per precision, and checked.

Everything here works on `onnx.ModelProto` or on plain tuples; nothing reads a recipe or a data set.
"""
