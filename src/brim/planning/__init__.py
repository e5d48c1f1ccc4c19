"""Which recipes to consider, the search among them, and why the losers lost. The exact predictor is passed in."""

from brim.planning.advice import advise
from brim.planning.constraints import Constraints
from brim.planning.offers import Offer
from brim.planning.search import plan
from brim.planning.ways_out import NothingFitsError

__all__ = ["Constraints", "NothingFitsError", "Offer", "advise", "plan"]
