"""Boxes, devices, checks of floating-point numbers, and stopwatches."""
