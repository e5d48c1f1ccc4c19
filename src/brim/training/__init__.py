"""Build a recipe's model, optimizer and step on any device, and run it."""

from brim.training.build import Workload, build
from brim.training.step import train_step

__all__ = ["Workload", "build", "train_step"]
