"""Latents of samples: from their anchors back to the prior (paper, section 2)."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from lzn_dist.zones.arguments import (
    Backend,
    check_backend,
    check_count,
    check_index,
    check_log_weights,
    check_points,
)
from lzn_dist.zones.block import Rows
from lzn_dist.zones.field import AnchorField, FieldFactory
from lzn_dist.zones.partial import Sums
from lzn_dist.zones.reference import posterior_mean
from lzn_dist.zones.schedules import DPM_EPSILON, SIGMA_MIN, dpm_solver_schedule, euler_schedule, ratio
from lzn_dist.zones.trajectory import full_precision, integrate

Solver = Literal["euler", "dpm_solver_pp", "dopri5"]


def compute_latents(
    anchors: Tensor,
    noise: Tensor,
    all_anchors: Tensor | None = None,
    *,
    index: Tensor | None = None,
    log_weights: Tensor | None = None,
    solver: Solver = "euler",
    steps: int = 20,
    backend: Backend = "auto",
    field: FieldFactory | None = None,
    store_every: int = 1,
) -> Tensor:
    """A latent [b, d] in each sample's zone: the flow from its anchor back to the prior (paper, section 2).

    anchors [b, d]: the samples' own. noise [b, d]: ε, already scaled; it chooses the point of the zone.
    all_anchors [n, d]: those of the global batch (default: anchors). index [b]: where each own anchor stands in
    all_anchors (default 0..b−1); the two must be equal there. steps: of the fixed-step solvers; dopri5 is adaptive.
    log_weights [n]: of all_anchors, −inf for samples that have no anchor (no data of this type): nobody feels theirs,
    and their own latent is their noise (default: equal); not differentiated.
    store_every: keep one in so many states for the backward (for DPM-Solver++ with the two updates before it) and
    compute the others again: less memory, the same digits, at most one more forward.

    backend: tiled, triton (kernels for GPUs), auto (triton on a GPU where it is installed, else tiled), or plain, the
    definition.
    field: makes the field of all_anchors (default `AnchorField`). Where it spreads the anchors over processes,
    all_anchors are those that this process holds, index counts over all processes (default: the first that are held
    here), and the call and its backward are collective: every process makes both, one without samples too.

    Differentiable in anchors, noise and all_anchors. An own anchor enters twice, as `anchors` and as a row of
    `all_anchors`; the gradient of their common value is the sum over both, and it is only that sum which is defined:
    in the usual case all_anchors is a gather of anchors. Float32 or float64; never allocates b × n × d.
    Raises ValueError, naming the argument, for wrong shapes, dtypes, an index out of range (on a GPU the device says
    so, later), steps or store_every < 1, or a field with solver dopri5 or backend plain.
    """
    check_points("anchors", anchors)
    check_points("noise", noise, anchors.shape[1], anchors.dtype)
    if len(noise) != len(anchors):
        raise ValueError(f"noise must be {tuple(anchors.shape)} like anchors, got {tuple(noise.shape)}")
    keys = anchors if all_anchors is None else all_anchors
    check_points("all_anchors", keys, anchors.shape[1], anchors.dtype)
    check_count("steps", steps)
    check_count("store_every", store_every)
    check_backend(backend, field)
    if solver not in ("euler", "dpm_solver_pp", "dopri5"):
        raise ValueError(f"solver must be euler, dpm_solver_pp or dopri5, got {solver!r}")
    if solver == "dopri5" and field is not None:
        raise ValueError("solver dopri5 works on all anchors at once and takes no field; use euler or dpm_solver_pp")
    if index is None and len(keys) < len(anchors):
        raise ValueError(f"all_anchors has {len(keys)} rows, fewer than anchors ({len(anchors)}); pass index")
    log_weights = check_log_weights(log_weights, len(keys))
    made = (field or AnchorField)(keys.detach(), log_weights, None, backend)
    if index is None:
        index = torch.arange(made.start, made.start + len(anchors), device=anchors.device)
    else:
        # with log-weights an own anchor's must be at hand
        held = range(made.count) if log_weights is None else range(made.start, made.start + made.held)
        check_index("index", index, len(anchors), held)
    if field is None and not len(anchors):
        return noise + anchors
    own, absent = None, None
    if log_weights is not None:
        own = log_weights[index - made.start]
        absent = torch.isneginf(own)[:, None]
        own = own.masked_fill(absent.squeeze(1), 0.0)  # of latents that are replaced below
    if solver == "dopri5":
        latents = _adaptive(anchors, noise, keys, index, log_weights, own)
    elif backend == "plain":
        latents = _plain_latents(anchors, noise, keys, solver, steps, log_weights)
    else:
        schedule = euler_schedule(steps) if solver == "euler" else dpm_solver_schedule(steps)
        e, _, _ = integrate(
            noise, anchors, keys, index, made, schedule, from_anchors=True, store_every=store_every, log_weights=own
        )
        latents = (1.0 - schedule.sigma_end) * anchors + schedule.sigma_end * e
    return latents if absent is None else torch.where(absent, noise, latents)


def latents_beside(
    anchors: Tensor, noise: Tensor, reference: Tensor, *, solver: Solver = "euler", steps: int = 20,
    backend: Backend = "auto",
) -> Tensor:  # fmt: skip
    """Latents [b, d] of samples that do not see each other: each over `reference` [n, d] and its own anchor alone.

    Row i is `compute_latents(anchors[i:i+1], noise[i:i+1], torch.cat((reference, anchors[i:i+1])), index=[n])`, all of
    them in one product with the reference: a sample's own anchor is the origin of its field, which no sum contains.
    Raises ValueError as `compute_latents` does, and for an empty reference.
    """
    check_points("reference", reference, anchors.shape[1], anchors.dtype)
    if not len(reference):
        raise ValueError("reference is empty: alone, every sample has the whole space for its zone")
    last = torch.full((len(anchors),), len(reference), device=anchors.device)
    if solver == "dopri5" or backend == "plain":  # steps of their own for each sample, or the definition
        rows = [
            compute_latents(
                anchors[i : i + 1], noise[i : i + 1], torch.cat((reference, anchors[i : i + 1])), index=last[i : i + 1],
                solver=solver, steps=steps, backend=backend,
            )
            for i in range(len(anchors))
        ]  # fmt: skip
        return torch.cat(rows) if rows else noise + anchors

    def field(keys: Tensor, log_weights: Tensor | None, groups: Tensor | None, backend: str) -> AnchorField:
        return AnchorField(keys, log_weights, groups, backend, count=len(keys) + 1)

    if not len(anchors):
        return noise + anchors
    return compute_latents(
        anchors, noise, reference, index=last, solver=solver, steps=steps, backend=backend, field=field
    )


def _plain_latents(
    anchors: Tensor, noise: Tensor, keys: Tensor, solver: Solver, steps: int, log_weights: Tensor | None
) -> Tensor:
    """Plain twin of the fixed-step solvers, on x and from the definitions; use float64."""
    if solver == "euler":
        sigma, h = SIGMA_MIN, (1.0 - SIGMA_MIN) / steps
        x = sigma * noise + (1.0 - sigma) * anchors
        for _ in range(steps):
            x = x + h * (x - posterior_mean(x, sigma, keys, log_weights)[1]) / sigma
            sigma += h
        return x
    sigmas = [DPM_EPSILON + (1.0 - 2 * DPM_EPSILON) * k / steps for k in range(steps + 1)]
    lam = [math.log((1.0 - s) / s) for s in sigmas]
    x = sigmas[0] * noise + (1.0 - sigmas[0]) * anchors
    m: list[Tensor] = []
    for k in range(1, steps + 1):
        order = min(k, 3, steps + 1 - k) if steps < 10 else min(k, 3)
        m.insert(0, posterior_mean(x, sigmas[k - 1], keys, log_weights)[1])
        h, alpha = lam[k] - lam[k - 1], 1.0 - sigmas[k]
        phi_1 = math.exp(-h) - 1.0
        x = sigmas[k] / sigmas[k - 1] * x - alpha * phi_1 * m[0]
        if order > 1:
            r0 = (lam[k - 1] - lam[k - 2]) / h
            d = (m[0] - m[1]) / r0
        if order == 2:
            x = x - 0.5 * alpha * phi_1 * d
        if order == 3:
            r1 = (lam[k - 2] - lam[k - 3]) / h
            phi_2 = phi_1 / h + 1.0
            d2 = (d - (m[1] - m[2]) / r1) / (r0 + r1)
            x = x + alpha * phi_2 * (d + r0 * d2) - alpha * (phi_2 / h - 0.5) * d2
    return x


class _Field(torch.autograd.Function):
    """Δ [b, d] at one r, differentiable in (e, references, anchors): for solvers that autograd runs through."""

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, references: Tensor, anchors: Tensor, index: Tensor, r: float,
        log_weights: Tensor | None, own_weights: Tensor | None,
    ) -> Tensor:  # fmt: skip
        with full_precision(e.device):
            field = AnchorField(anchors, log_weights)
            part = field.posterior(Rows(e, references - field.centre, index, own_weights), r)
        ctx.save_for_backward(e, references, anchors, index, part.sums.lse)
        ctx.r, ctx.log_weights, ctx.own_weights = r, log_weights, own_weights
        return part.delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        e, references, anchors, index, lse = ctx.saved_tensors
        with full_precision(e.device):
            field = AnchorField(anchors, ctx.log_weights)
            into, rows = field.gradient(), Rows(e, references - field.centre, index, ctx.own_weights)
            grad_e, grad_references = field.vjp(rows, ctx.r, Sums(lse, lse), grads[0], None, into)
            field.finish(into)
        return grad_e, grad_references, into.anchors, None, None, None, None


def _adaptive(
    anchors: Tensor, noise: Tensor, keys: Tensor, index: Tensor, log_weights: Tensor | None, own: Tensor | None
) -> Tensor:
    """Dormand-Prince through torchdiffeq in s = log σ from SIGMA_MIN to 1: de/ds = −Δ/σ, at rtol = atol = 1e-5.

    In log σ the anchors' neighbourhood is no boundary layer. Steps are at most 1/4: while Δ vanishes the error
    estimate does too, and an unbounded step would jump over everything that follows.
    """

    def velocity(log_sigma: Tensor, e: Tensor) -> Tensor:
        sigma = math.exp(float(log_sigma))
        delta: Tensor = _Field.apply(e, anchors, keys, index, ratio(sigma), log_weights, own)
        return delta / -sigma

    span = torch.tensor([math.log(SIGMA_MIN), 0.0], dtype=torch.float64, device=noise.device).to(noise.dtype)
    import torchdiffeq  # here: with scipy it takes a second to import, and the fixed steps do without

    states = torchdiffeq.odeint(
        velocity, noise, span, rtol=1e-5, atol=1e-5, method="dopri5", options={"max_step": 0.25}
    )
    result: Tensor = states[-1]
    return result
