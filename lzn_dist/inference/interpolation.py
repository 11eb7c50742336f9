"""Between two points of a Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor


def slerp(first: Tensor, second: Tensor, weights: Tensor) -> Tensor:
    """Spherical interpolation [w, ...] between two points of one shape: keeps a Gaussian draw's typical norm.

    weights [w]: 0 gives the first, 1 the second. Norms are interpolated linearly; nearly parallel points too.
    """
    shape = first.shape
    a, b = first.flatten().double(), second.flatten().double()
    norms = a.norm(), b.norm()
    cosine = ((a / norms[0]) @ (b / norms[1])).clamp(-1.0, 1.0)
    angle = torch.arccos(cosine)
    w = weights.to(a)[:, None]
    if angle < 1e-4:
        path = (1 - w) * a + w * b
    else:
        direction = (torch.sin((1 - w) * angle) * a / norms[0] + torch.sin(w * angle) * b / norms[1]) / angle.sin()
        path = direction * ((1 - w) * norms[0] + w * norms[1])
    return path.reshape(len(weights), *shape).to(first.dtype)
