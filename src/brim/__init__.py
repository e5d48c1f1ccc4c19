"""Brim fills the memory you have to the brim and never over it.

`import brim` brings plain values only (no torch): a model's description, a recipe, results. Work that needs torch is
imported by its own name: `brim.rehearsal`, `brim.training`, `brim.checkpoints`.
"""

from brim.errors import BrimError
from brim.models import ModelSpec, describe
from brim.recipe import Recipe
from brim.report import Ledger, Plan, Prediction, RunReport

__version__ = "0.1.0"

__all__ = ["BrimError", "Ledger", "ModelSpec", "Plan", "Prediction", "Recipe", "RunReport", "describe"]
