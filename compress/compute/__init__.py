"""Where computing happens and how it is timed: devices, floating-point hygiene, stopwatches."""
