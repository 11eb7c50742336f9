"""Batches for the tests of the zones, and one function that runs latents and alignment on them with all gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lzn_dist.zones import Alignment, align, alignment_loss, compute_latents
from lzn_dist.zones.schedules import Schedule, alignment_schedule, dpm_solver_schedule, euler_schedule


@dataclass
class Batch:
    """anchors [n, d] and others [n, d]: of the two views. noise [b, d], index [b]: of this process's samples."""

    anchors: Tensor
    others: Tensor
    noise: Tensor
    index: Tensor


def make(
    dim: int, n: int, b: int, scale: float, *, spread: float | None = 0.5, near: bool = False, seed: int = 0
) -> Batch:
    """Anchors N(0, scale²), numbers that float32 holds exactly. others: at spread · scale from them, None: independent.

    near: among the samples, anchors 1 and 3 are equal and 5 and 7 are 1e-6 apart (float64 only).
    """
    g = torch.Generator().manual_seed(seed)

    def draw(rows: int) -> Tensor:
        return torch.randn(rows, dim, generator=g)

    anchors = (scale * draw(n)).double()
    fresh = scale * draw(n).double()
    others = fresh if spread is None else (anchors + spread * fresh).float().double()
    noise = (0.45 * draw(b)).double()
    index = torch.arange(b) if b == n else torch.randperm(n, generator=g)[:b]
    if near:
        one, two, three, four = index[:4].tolist()
        direction = draw(1)[0].double()
        anchors[one] = anchors[two]
        anchors[three] = anchors[four] + 1e-6 * direction / direction.norm()
    return Batch(anchors, others, noise, index)


def relative(
    e: Tensor, anchors: Tensor, index: Tensor, schedule: Schedule, log_weights: Tensor | None = None,
    groups: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Third derivation, dense and by autograd: x = (1−σ) a_o + σ e and de/dr = Σ_j w_j (a_j − a_o), r = (1−σ)/σ.

    log_weights [n]: −inf for no reference. groups [n]: then the weight is of the reference's whole group.
    Returns the end point and log w_o at each step. On x, the plain twin amplifies its own rounding by 1/σ; here
    nothing is amplified, so that the tiled path can be held to a tighter bound.
    """
    difference = anchors[None] - anchors[index][:, None]
    log_probs: list[Tensor] = []
    deltas: list[Tensor] = []
    names = torch.arange(len(anchors)) if groups is None else groups
    group = names == names[index][:, None]
    ratios = 0.0 if log_weights is None else log_weights - log_weights[index][:, None]
    for r, coefficients in zip(schedule.r, schedule.coefficients, strict=True):
        logits = r * torch.einsum("bd,bnd->bn", e, difference) - 0.5 * r * r * difference.square().sum(-1) + ratios
        delta = torch.einsum("bn,bnd->bd", logits.softmax(1), difference)
        outside = logits.masked_fill(group, -torch.inf).logsumexp(1) - logits.masked_fill(~group, -torch.inf).logsumexp(
            1
        )
        log_probs.append(-torch.logaddexp(outside, torch.zeros_like(outside)))
        deltas.insert(0, delta)
        e = e + sum(c * d for c, d in zip(coefficients, deltas, strict=False))
    end = delta if schedule.sigma_end == 0 else schedule.sigma_end * e - schedule.sigma_end * anchors[index]
    return anchors[index] + end, torch.stack(log_probs)


def run(
    batch: Batch, *, backend: str, dtype: torch.dtype = torch.float64, solver: str = "euler", steps: int = 20,
    log_weights: Tensor | None = None, anchor_weights: Tensor | None = None, groups: Tensor | None = None,
    dense: bool = False, **options: Any,
) -> dict[str, Tensor]:  # fmt: skip
    """Latents, their alignment along the other anchors, and gradients; all as float64.

    dense: the objective has a cotangent everywhere (latents, every step's log-probability, end points); otherwise it
    is the training loss, which keeps one step a sample. An own anchor's gradient is the sum over its two roles.
    log_weights, groups: of the other anchors; anchor_weights: of the anchors.
    backend: also "relative". options: of latents and alignment alike.
    """
    anchors = batch.anchors.to(dtype).requires_grad_()
    others = batch.others.to(dtype).requires_grad_()
    noise = batch.noise.to(dtype).requires_grad_()
    if backend == "relative":
        schedule = (euler_schedule if solver == "euler" else dpm_solver_schedule)(steps)
        latents, _ = relative(noise, anchors, batch.index, schedule, anchor_weights)
        end, log_probs = relative(latents, others, batch.index, alignment_schedule(steps), log_weights, groups)
        found = Alignment(log_probs, end)
    else:
        own = anchors[batch.index]
        options |= {"steps": steps, "backend": backend}
        latents = compute_latents(
            own, noise, anchors, index=batch.index, log_weights=anchor_weights, solver=solver, **options  # type: ignore[arg-type]
        )  # fmt: skip
        found = align(latents, others, batch.index, log_weights=log_weights, groups=groups, **options)
    loss = alignment_loss(found.log_probs)
    objective = loss
    if dense:
        g = torch.Generator().manual_seed(1)
        for value in (latents, found.log_probs, found.endpoint):
            objective = objective + (value * torch.randn(value.shape, generator=g).to(dtype)).sum()
    grads = torch.autograd.grad(objective, (anchors, others, noise))
    names = ("latents", "log_probs", "endpoint", "loss", "grad_anchors", "grad_others", "grad_noise")
    values = (latents, found.log_probs, found.endpoint, loss, *grads)
    return {name: value.detach().double() for name, value in zip(names, values, strict=True)}


def error(value: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm; what is under 1e-30 counts as 0 (a loss whose targets hold all weight)."""
    value, expected = value.detach(), expected.detach()
    return float((value - expected).norm() / expected.norm().clamp_min(1e-30))


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    errors = {name: error(found[name], expected[name]) for name in expected}
    assert all(e <= tolerance for e in errors.values()), errors
