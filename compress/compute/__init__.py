"""Devices, floating-point hygiene and stopwatches."""
