"""The solvers of the flow as schedules: where the field is evaluated, and how updates combine its values."""

from __future__ import annotations

import math
from dataclasses import dataclass

SIGMA_MIN = 1e-4  # where Euler's latent computation starts


DPM_EPSILON = 1e-3  # DPM-Solver++ runs from this noise level to one minus it


@dataclass(frozen=True)
class Schedule:
    """r [k]: where the field is evaluated. coefficients [k][j]: weight of Δ_{k−j} in step k's update of e.

    sigma_end: noise level of the last state, x = (1−σ) a_o + σ e.
    """

    r: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    sigma_end: float

    @property
    def memory(self) -> int:
        """How many earlier Δ an update takes up."""
        return max(len(update) for update in self.coefficients) - 1


def ratio(sigma: float) -> float:
    return (1.0 - sigma) / sigma


def euler_schedule(steps: int) -> Schedule:
    """Euler in σ from SIGMA_MIN to 1 (method section of the paper): e ← e − (r_k − r_{k+1}) Δ_k."""
    h = (1.0 - SIGMA_MIN) / steps
    sigmas = [SIGMA_MIN + k * h for k in range(steps)] + [1.0]
    r = [ratio(s) for s in sigmas]
    return Schedule(tuple(r[:-1]), tuple((r[k + 1] - r[k],) for k in range(steps)), 1.0)


def alignment_schedule(steps: int) -> Schedule:
    """Euler in σ from 1 to 0. The last update would reach r = ∞; its end point is the posterior mean itself."""
    r = [ratio(1.0 - k / steps) for k in range(steps)]
    updates = [(r[k + 1] - r[k],) for k in range(steps - 1)] + [(0.0,)]
    return Schedule(tuple(r), tuple(updates), 0.0)


def dpm_solver_schedule(steps: int) -> Schedule:
    """DPM-Solver++, multistep, data prediction (arXiv 2211.01095), order 3, from small σ to large.

    With λ = log((1−σ)/σ) = log r. Orders 1, 2, then 3; with fewer than 10 steps the order falls again at the end.
    The terms that a constant posterior mean contributes drop out against x = (1−σ) a_o + σ e.
    """
    sigmas = [DPM_EPSILON + (1.0 - 2 * DPM_EPSILON) * k / steps for k in range(steps + 1)]
    lam = [math.log(ratio(s)) for s in sigmas]
    updates: list[tuple[float, ...]] = []
    for k in range(1, steps + 1):
        order = min(k, 3, steps + 1 - k) if steps < 10 else min(k, 3)
        h = lam[k] - lam[k - 1]
        phi_1 = math.expm1(-h)
        c = [-phi_1, 0.0, 0.0]  # of m_{k−1}, m_{k−2}, m_{k−3}, in units of r_k
        if order == 2:
            r0 = (lam[k - 1] - lam[k - 2]) / h
            c[0] -= 0.5 * phi_1 / r0
            c[1] += 0.5 * phi_1 / r0
        elif order == 3:
            r0, r1 = (lam[k - 1] - lam[k - 2]) / h, (lam[k - 2] - lam[k - 3]) / h
            phi_2 = phi_1 / h + 1.0
            phi_3 = phi_2 / h - 0.5
            d = (1 / r0, -1 / r0, 0.0)
            d11 = (0.0, 1 / r1, -1 / r1)
            d2 = tuple((a - b) / (r0 + r1) for a, b in zip(d, d11, strict=True))
            d1 = tuple(a + r0 * b for a, b in zip(d, d2, strict=True))
            c = [c[j] + phi_2 * d1[j] - phi_3 * d2[j] for j in range(3)]
        updates.append(tuple(ratio(sigmas[k]) * value for value in c[:order]))
    return Schedule(tuple(ratio(s) for s in sigmas[:-1]), tuple(updates), sigmas[-1])
