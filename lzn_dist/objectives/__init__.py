"""What each task optimises: LZN's objective, and the baselines that the paper compares it with."""

from lzn_dist.objectives.base import Coupling, Gather, Objective, Samples
from lzn_dist.objectives.build import build_objective

__all__ = ["Coupling", "Gather", "Objective", "Samples", "build_objective"]
