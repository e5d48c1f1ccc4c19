"""How models grew, and what training one from scratch would take. No torch."""

from brim.growth.feasibility import Feasibility, feasibility
from brim.growth.fit import Growth, fit_growth
from brim.growth.history import Release, releases
from brim.growth.trends import Trend, trends

__all__ = ["Feasibility", "Growth", "Release", "Trend", "feasibility", "fit_growth", "releases", "trends"]
