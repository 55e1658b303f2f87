"""Devices, checks of floating-point numbers, and stopwatches."""
