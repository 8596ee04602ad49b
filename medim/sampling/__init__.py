"""Plans and the one loop that runs them."""

from medim.sampling.loop import Cost, sample
from medim.sampling.plans import Plan

__all__ = ["Cost", "Plan", "sample"]
