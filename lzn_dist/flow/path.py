"""Rectified flow's path: a point between noise and data, its velocity, and the loss (arXiv 2209.03003, equation 1)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class PathSample:
    """x_t [b, ...] at times t [b], and the path's velocity there, dx_t [b, ...] = x_1 − x_0."""

    t: Tensor
    x_t: Tensor
    dx_t: Tensor


def times(uniforms: Tensor, t_min: float) -> Tensor:
    """Times in [t_min, 1), uniform where ``uniforms`` are in [0, 1); any shape."""
    return t_min + (1.0 - t_min) * uniforms


def interpolate(x_0: Tensor, x_1: Tensor, t: Tensor) -> PathSample:
    """The straight path x_t = t x_1 + (1−t) x_0 from noise x_0 to data x_1, both [b, ...], at times t [b].

    Raises ValueError where shapes do not fit: broadcasting would mix samples silently.
    """
    if x_0.shape != x_1.shape or t.shape != x_1.shape[:1]:
        raise ValueError(
            f"need x_0 and x_1 of one shape [b, ...] and t [b], got {[*x_0.shape]}, {[*x_1.shape]} and {[*t.shape]}"
        )
    weight = t.reshape(-1, *[1] * (x_1.ndim - 1))
    return PathSample(t, weight * x_1 + (1.0 - weight) * x_0, x_1 - x_0)


def loss(velocity: Tensor, point: PathSample) -> Tensor:
    """Scalar: mean over samples and elements of (velocity − dx_t)²; velocity has x_t's shape."""
    if velocity.shape != point.dx_t.shape:
        raise ValueError(f"velocity must be {[*point.dx_t.shape]}, got {[*velocity.shape]}")
    return (velocity - point.dx_t).square().mean()
