"""What a run optimises: LZN's objective, and the baselines that the paper compares it with."""

from lzn_dist.objectives.base import Gather, Needs, Objective, Related, Samples, View
from lzn_dist.objectives.build import build_networks, build_objective, given_for, needs

__all__ = [
    "Gather",
    "Needs",
    "Objective",
    "Related",
    "Samples",
    "View",
    "build_networks",
    "build_objective",
    "given_for",
    "needs",
]
