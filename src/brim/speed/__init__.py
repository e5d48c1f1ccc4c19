"""How fast: a roofline of the training step."""

from brim.speed.roofline import Work, step_time, step_work, tokens_per_s
from brim.speed.writing import writing_time

__all__ = ["Work", "step_time", "step_work", "tokens_per_s", "writing_time"]
