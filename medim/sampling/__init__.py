"""Plans and the one loop that runs them."""

from medim.sampling.loop import Cost, sample
from medim.sampling.plans import REVEALS, Plan

__all__ = ["REVEALS", "Cost", "Plan", "sample"]
