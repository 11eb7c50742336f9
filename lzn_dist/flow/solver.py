"""Walking rectified flow's ODE dx/dt = v(t, x): from noise to data (`sample`) and back (`invert`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Velocity = Callable[[Tensor, Tensor], Tensor]  # (t scalar tensor, x [b, ...]) → dx/dt [b, ...]
Method = Literal["euler", "dopri5"]


@dataclass
class Solution:
    """x [b, ...] at the end of the walk, and how often the velocity was evaluated."""

    x: Tensor
    nfe: int


def sample(
    velocity: Velocity, x0: Tensor, *, method: Method = "euler", steps: int = 10, t_min: float = 1e-3,
    rtol: float = 1e-5, atol: float = 1e-5,
) -> Solution:  # fmt: skip
    """Walk x0 [b, ...] from t = t_min (noise) to t = 1 (data).

    method: "euler" takes ``steps`` equal steps; "dopri5" (Dormand–Prince 4(5), torchdiffeq) adapts its steps to rtol
    and atol. Its steps serve the whole batch, so that a sample depends on its neighbours within the tolerance.
    Raises ValueError for another method, steps < 1 or t_min outside [0, 1).
    """
    return _walk(velocity, x0, False, method, steps, t_min, rtol, atol)


def invert(
    velocity: Velocity, x1: Tensor, *, method: Method = "euler", steps: int = 10, t_min: float = 1e-3,
    rtol: float = 1e-5, atol: float = 1e-5,
) -> Solution:  # fmt: skip
    """Walk x1 [b, ...] from t = 1 (data) back to t = t_min (noise): `sample`'s inverse up to the solver's error."""
    return _walk(velocity, x1, True, method, steps, t_min, rtol, atol)


def _walk(
    velocity: Velocity, x: Tensor, backward: bool, method: str, steps: int, t_min: float, rtol: float, atol: float
) -> Solution:
    if not 0.0 <= t_min < 1.0:
        raise ValueError(f"t_min must be in [0, 1), got {t_min}")
    begin, end = (1.0, t_min) if backward else (t_min, 1.0)
    if method == "euler":
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        h = (end - begin) / steps
        for k in range(steps):
            x = x + h * velocity(torch.tensor(begin + k * h, dtype=x.dtype, device=x.device), x)
        return Solution(x, steps)
    if method != "dopri5":
        raise ValueError(f"method must be euler or dopri5, got {method!r}")
    if not len(x):
        return Solution(x, 0)
    nfe = 0

    def counted(t: Tensor, x: Tensor) -> Tensor:
        nonlocal nfe
        nfe += 1
        return velocity(t, x)

    span = torch.tensor([begin, end], dtype=x.dtype, device=x.device)
    from torchdiffeq import odeint  # here: with scipy it takes a second to import, and training does without

    end_point = odeint(counted, x, span, method="dopri5", rtol=rtol, atol=atol)[-1]
    return Solution(end_point, nfe)
