"""The recipe as ordered stages: the only place that knows which result feeds which."""

from compress.pipeline.run import STAGES, run_recipe

__all__ = ["STAGES", "run_recipe"]
