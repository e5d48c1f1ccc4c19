"""Which recipes to consider, the search among them, and why the losers lost. The exact predictor is passed in."""

from brim.planning.advice import advise
from brim.planning.candidates import Constraints
from brim.planning.search import NothingFitsError, plan

__all__ = ["Constraints", "NothingFitsError", "advise", "plan"]
