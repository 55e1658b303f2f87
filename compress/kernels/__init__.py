"""The feature-matching losses as CUDA kernels that read student and teacher once and write the gradient once.

README.md has the map of this folder, formulas, traffic and measurements.
"""
