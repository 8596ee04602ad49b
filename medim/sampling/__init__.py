"""Plans and the one loop that runs them."""

from medim.sampling.loop import Cost, Means, sample
from medim.sampling.plans import Plan, Sampling
from medim.sampling.walks import REVEALS, halton_order

__all__ = ["REVEALS", "Cost", "Means", "Plan", "Sampling", "halton_order", "sample"]
