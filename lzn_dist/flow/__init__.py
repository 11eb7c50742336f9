"""Rectified flow (arXiv 2209.03003): the path from noise to data, its loss, and the ODE solvers that walk it.

Time, everywhere in this folder: ``t`` is rectified flow's time, 0 = noise, 1 = data, x_t = t x_1 + (1−t) x_0. (The
noise level σ of `lzn_dist.zones` runs the other way: there 1 is the prior.) Times start at a small t_min instead of 0.
The folder imports torch and torchdiffeq alone.
"""

from lzn_dist.flow.path import PathSample, interpolate, loss, times
from lzn_dist.flow.solver import Solution, invert, sample

__all__ = ["PathSample", "Solution", "interpolate", "invert", "loss", "sample", "times"]
