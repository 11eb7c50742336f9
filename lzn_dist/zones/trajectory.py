"""Trajectories of the flow: from anchors to latents, and from latents along another set of anchors.

A solver is a `Schedule`: the values of r = (1−σ)/σ at which the field is evaluated, and how the updates combine the
last few posterior means. Every solver used by the paper has the form e ← e + Σ_j c_j Δ_{k−j} in the coordinates of
`velocity`, so that one loop integrates them all and one hand-written loop is its backward. Kept between steps:
the states [steps, b, d] and the log-sum-exps [steps, b], nothing of size b × n.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torchdiffeq
from torch import Tensor

from lzn_dist.zones.velocity import AnchorField, AnchorGradient, Pairs, posterior_mean

Solver = Literal["euler", "dpm_solver_pp", "dopri5"]
Backend = Literal["auto", "tiled", "plain"]

SIGMA_MIN = 1e-4  # where Euler's latent computation starts
DPM_EPSILON = 1e-3  # DPM-Solver++ runs from this noise level to one minus it
# With fewer anchors than this, looking for settled rows costs more than it saves.
SETTLE_ANCHORS = 192


@dataclass(frozen=True)
class Schedule:
    """r [k]: where the field is evaluated. coefficients [k][j]: weight of Δ_{k−j} in step k's update of e.

    sigma_end: noise level of the last state, x = (1−σ) a_o + σ e.
    """

    r: tuple[float, ...]
    coefficients: tuple[tuple[float, ...], ...]
    sigma_end: float


def _ratio(sigma: float) -> float:
    return (1.0 - sigma) / sigma


def euler_schedule(steps: int) -> Schedule:
    """Euler in σ from SIGMA_MIN to 1 (method section of the paper): e ← e − (r_k − r_{k+1}) Δ_k."""
    h = (1.0 - SIGMA_MIN) / steps
    sigmas = [SIGMA_MIN + k * h for k in range(steps)] + [1.0]
    r = [_ratio(s) for s in sigmas]
    return Schedule(tuple(r[:-1]), tuple((r[k + 1] - r[k],) for k in range(steps)), 1.0)


def alignment_schedule(steps: int) -> Schedule:
    """Euler in σ from 1 to 0. The last update would reach r = ∞; its end point is the posterior mean itself."""
    r = [_ratio(1.0 - k / steps) for k in range(steps)]
    updates = [(r[k + 1] - r[k],) for k in range(steps - 1)] + [(0.0,)]
    return Schedule(tuple(r), tuple(updates), 0.0)


def dpm_solver_schedule(steps: int) -> Schedule:
    """DPM-Solver++, multistep, data prediction (arXiv 2211.01095), order 3, from small σ to large.

    With λ = log((1−σ)/σ) = log r. Orders 1, 2, then 3; with fewer than 10 steps the order falls again at the end.
    The terms that a constant posterior mean contributes drop out against x = (1−σ) a_o + σ e.
    """
    sigmas = [DPM_EPSILON + (1.0 - 2 * DPM_EPSILON) * k / steps for k in range(steps + 1)]
    lam = [math.log(_ratio(s)) for s in sigmas]
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
        updates.append(tuple(_ratio(sigmas[k]) * value for value in c[:order]))
    return Schedule(tuple(_ratio(s) for s in sigmas[:-1]), tuple(updates), sigmas[-1])


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: both would round the products to 3 digits, whatever the networks around use."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


class _Trajectory(torch.autograd.Function):
    """(e₀ [b, d], references [b, d], anchors [n, d]) → (last e [b, d], last Δ [b, d], lse [steps, b] float64)."""

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, references: Tensor, anchors: Tensor,
        index: Tensor, log_weights: Tensor | None, schedule: Schedule, from_anchors: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with _full_precision(e.device):
            return _Trajectory._forward(ctx, e, references, anchors, index, log_weights, schedule, from_anchors)

    @staticmethod
    def _forward(
        ctx: Any, e: Tensor, references: Tensor, anchors: Tensor,
        index: Tensor, log_weights: Tensor | None, schedule: Schedule, from_anchors: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        field = AnchorField(anchors, log_weights)
        own = references - field.centre
        count, steps = len(e), len(schedule.r)
        # Row i meets the field densely at steps first[i] ≤ k < last[i], in its pairs at the others.
        first, last = torch.zeros(count, dtype=torch.int64), torch.full((count,), steps)
        partner = torch.full((count,), -1)
        pairs = Pairs(index[:0], index[:0])
        if from_anchors:
            active, pairs = field.first_active(e, own, index, schedule.r[0])
            r = torch.tensor(schedule.r, dtype=torch.float64)
            # The first step is always taken in pairs: at r = 10⁴ products would have no accurate digits.
            first = torch.searchsorted(-r, -active.cpu()).clamp_(min=1)
        settle = not from_anchors and log_weights is None and len(anchors) >= SETTLE_ANCHORS
        states, sums, deltas = [], [], []
        for k, r_k in enumerate(schedule.r):
            states.append(e)
            rows = _rows((first <= k) & (k < last), e.device)
            delta, lse = torch.zeros_like(e), e.new_zeros(count, dtype=torch.float64)
            if len(rows):
                check = settle and k % 2 == 1
                part = field.posterior(e[rows], own[rows], index[rows], r_k, settle=check)
                delta.index_copy_(0, rows, part.delta)
                lse.index_copy_(0, rows, part.lse)
                if part.settled is not None and part.partner is not None:
                    done = part.settled.cpu()
                    at = rows.cpu()[done]
                    last[at] = k + 1
                    partner[at] = part.partner.cpu()[done]
            if k == 0 and len(pairs.rows):
                sparse = field.pair_posterior(e, references, pairs, r_k)
                delta, lse = sparse.delta, sparse.lse
            left = (last <= k).nonzero().squeeze(1).to(e.device)
            if len(left):
                chosen = Pairs(torch.arange(len(left), device=e.device), partner.to(e.device)[left])
                sparse = field.pair_posterior(e[left], references[left], chosen, r_k)
                delta.index_copy_(0, left, sparse.delta)
                lse.index_copy_(0, left, sparse.lse)
            sums.append(lse)
            deltas.append(delta)
            e = e.clone()
            for j, c in enumerate(schedule.coefficients[k]):
                e.add_(deltas[k - j], alpha=c)
        ctx.save_for_backward(references, anchors, index, *states, *sums)
        ctx.plan = (field, own, first, last, partner, pairs, schedule, from_anchors)
        return e, delta, torch.stack(sums)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _full_precision(grads[0].device):
            return _Trajectory._backward(ctx, *grads)

    @staticmethod
    def _backward(ctx: Any, grad_e: Tensor, grad_last: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
        field, own, first, last, partner, pairs, schedule, from_anchors = ctx.plan
        references, anchors, index, *saved = ctx.saved_tensors
        steps = len(schedule.r)
        states, sums = saved[:steps], saved[steps:]
        into = AnchorGradient(anchors, references)
        # The loss keeps one step a row: before the last step with a cotangent there is nothing to carry back.
        live = (grad_e != 0).any(1) | (grad_last != 0).any(1)
        counted = torch.arange(1, steps + 1, device=live.device)[:, None] * (grad_lse != 0)
        until = torch.where(live, steps, counted.amax(0)).cpu()
        after: list[Tensor] = [grad_e]  # cotangents of e_{k+1}, e_{k+2}, e_{k+3}
        for k in reversed(range(steps)):
            r_k = schedule.r[k]
            grad_delta = torch.zeros_like(grad_e) if k < steps - 1 else grad_last.clone()
            for j, later in enumerate(after):
                if k + j < steps and j < len(schedule.coefficients[k + j]):
                    grad_delta.add_(later, alpha=schedule.coefficients[k + j][j])
            state, lse = states[k], sums[k]
            current = after[0].clone()
            g_lse = None if from_anchors else grad_lse[k]
            rows = _rows((first <= k) & (k < last) & (k < until), state.device)
            if len(rows):
                gl = None if g_lse is None else g_lse[rows]
                part = field.vjp(
                    state[rows], own[rows], index[rows], r_k, lse[rows], grad_delta[rows], gl, into, rows
                )  # fmt: skip
                current.index_add_(0, rows, part)
            if k == 0 and len(pairs.rows):
                current += field.pair_vjp(state, references, pairs, r_k, lse, grad_delta, None, into, slice(None))
            left = _rows((last <= k) & (k < until), state.device)
            if len(left):
                chosen = Pairs(torch.arange(len(left), device=state.device), partner.to(state.device)[left])
                gl = None if g_lse is None else g_lse[left]
                part = field.pair_vjp(
                    state[left], references[left], chosen, r_k, lse[left], grad_delta[left], gl, into, left
                )  # fmt: skip
                current.index_add_(0, left, part)
            after = [current, *after[:2]]
        field.finish(into)
        return after[0], into.references, into.anchors, None, None, None, None


def _rows(mask: Tensor, device: torch.device) -> Tensor:
    return mask.nonzero().squeeze(1).to(device)


def integrate(
    e: Tensor, references: Tensor, anchors: Tensor, index: Tensor,
    log_weights: Tensor | None, schedule: Schedule, *, from_anchors: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry e [b, d] through a schedule; differentiable in e, references [b, d] and anchors [n, d].

    Row i's reference is anchor index[i]. Returns the last e [b, d], the last Δ [b, d] and lse [steps, b] (float64),
    where −lse is the log-weight of the reference at each step.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Trajectory.apply(
        e, references, anchors, index, log_weights, schedule, from_anchors
    )
    return result


def check_points(name: str, value: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> None:
    """A ValueError that names the argument, unless value is a float32 or float64 matrix [., dim]."""
    if value.ndim != 2 or (dim is not None and value.shape[1] != dim) or not value.shape[1]:
        raise ValueError(f"{name} must be a matrix [rows, {dim or 'd'}], got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64) or (dtype is not None and value.dtype != dtype):
        raise ValueError(f"{name} must be {dtype or 'float32 or float64'}, got {value.dtype}; zones are not for bf16")


def check_index(name: str, value: Tensor, rows: int, count: int) -> None:
    """A ValueError that names the argument, unless value is int64 [rows] with entries in 0..count-1."""
    if value.shape != (rows,) or value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [{rows}], got {value.dtype} {tuple(value.shape)}")
    if rows and (int(value.min()) < 0 or int(value.max()) >= count):
        raise ValueError(f"{name} must lie in 0..{count - 1}, got {int(value.min())}..{int(value.max())}")


def check_steps(steps: int) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise ValueError(f"steps must be a whole number of at least 1, got {steps!r}")


def check_backend(backend: str) -> None:
    if backend not in ("auto", "tiled", "plain"):
        raise ValueError(f"backend must be auto, tiled or plain, got {backend!r}")


def compute_latents(
    anchors: Tensor,
    noise: Tensor,
    all_anchors: Tensor | None = None,
    *,
    index: Tensor | None = None,
    solver: Solver = "euler",
    steps: int = 20,
    backend: Backend = "auto",
) -> Tensor:
    """A latent [b, d] in each sample's zone: the flow from its anchor back to the prior (paper, section 2).

    anchors [b, d]: the samples' own. noise [b, d]: ε, already scaled; it chooses the point of the zone.
    all_anchors [n, d]: those of the global batch (default: anchors). index [b]: where each own anchor stands in
    all_anchors (default 0..b−1); the two must be equal there. steps: of the fixed-step solvers; dopri5 is adaptive.

    Differentiable in anchors, noise and all_anchors. An own anchor enters twice, as `anchors` and as a row of
    `all_anchors`; the gradient of their common value is the sum over both, and it is only that sum which is defined:
    in the usual case all_anchors is a gather of anchors. Float32 or float64; never allocates b × n × d.
    Raises ValueError, naming the argument, for wrong shapes, dtypes, an index out of range or steps < 1.
    """
    check_points("anchors", anchors)
    check_points("noise", noise, anchors.shape[1], anchors.dtype)
    if len(noise) != len(anchors):
        raise ValueError(f"noise must be {tuple(anchors.shape)} like anchors, got {tuple(noise.shape)}")
    keys = anchors if all_anchors is None else all_anchors
    check_points("all_anchors", keys, anchors.shape[1], anchors.dtype)
    check_steps(steps)
    check_backend(backend)
    if index is None:
        index = torch.arange(len(anchors), device=anchors.device)
        if len(keys) < len(anchors):
            raise ValueError(f"all_anchors has {len(keys)} rows, fewer than anchors ({len(anchors)}); pass index")
    else:
        check_index("index", index, len(anchors), len(keys))
    if solver not in ("euler", "dpm_solver_pp", "dopri5"):
        raise ValueError(f"solver must be euler, dpm_solver_pp or dopri5, got {solver!r}")
    if not len(anchors):
        return noise + anchors
    if solver == "dopri5":
        return _adaptive(anchors, noise, keys, index)
    if backend == "plain":
        return _plain_latents(anchors, noise, keys, solver, steps)
    schedule = euler_schedule(steps) if solver == "euler" else dpm_solver_schedule(steps)
    e, _, _ = integrate(noise, anchors, keys, index, None, schedule, from_anchors=True)
    return (1.0 - schedule.sigma_end) * anchors + schedule.sigma_end * e


def _plain_latents(anchors: Tensor, noise: Tensor, keys: Tensor, solver: Solver, steps: int) -> Tensor:
    """Plain twin of the fixed-step solvers, on x and from the definitions; use float64."""
    if solver == "euler":
        sigma, h = SIGMA_MIN, (1.0 - SIGMA_MIN) / steps
        x = sigma * noise + (1.0 - sigma) * anchors
        for _ in range(steps):
            x = x + h * (x - posterior_mean(x, sigma, keys)[1]) / sigma
            sigma += h
        return x
    sigmas = [DPM_EPSILON + (1.0 - 2 * DPM_EPSILON) * k / steps for k in range(steps + 1)]
    lam = [math.log((1.0 - s) / s) for s in sigmas]
    x = sigmas[0] * noise + (1.0 - sigmas[0]) * anchors
    m: list[Tensor] = []
    for k in range(1, steps + 1):
        order = min(k, 3, steps + 1 - k) if steps < 10 else min(k, 3)
        m.insert(0, posterior_mean(x, sigmas[k - 1], keys)[1])
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
    def forward(ctx: Any, e: Tensor, references: Tensor, anchors: Tensor, index: Tensor, r: float) -> Tensor:
        with _full_precision(e.device):
            field = AnchorField(anchors)
            part = field.posterior(e, references - field.centre, index, r)
        ctx.save_for_backward(e, references, anchors, index, part.lse)
        ctx.r = r
        return part.delta

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        e, references, anchors, index, lse = ctx.saved_tensors
        with _full_precision(e.device):
            field = AnchorField(anchors)
            into = AnchorGradient(anchors, references)
            own = references - field.centre
            grad_e = field.vjp(e, own, index, ctx.r, lse, grads[0], None, into, slice(None))
            field.finish(into)
        return grad_e, into.references, into.anchors, None, None


def _adaptive(anchors: Tensor, noise: Tensor, keys: Tensor, index: Tensor) -> Tensor:
    """Dormand-Prince through torchdiffeq in s = log σ from SIGMA_MIN to 1: de/ds = −Δ/σ, at rtol = atol = 1e-5.

    In log σ the anchors' neighbourhood is no boundary layer. Steps are at most 1/4: while Δ vanishes the error
    estimate does too, and an unbounded step would jump over everything that follows.
    """

    def velocity(log_sigma: Tensor, e: Tensor) -> Tensor:
        sigma = math.exp(float(log_sigma))
        delta: Tensor = _Field.apply(e, anchors, keys, index, _ratio(sigma))
        return delta / -sigma

    span = torch.tensor([math.log(SIGMA_MIN), 0.0], dtype=torch.float64, device=noise.device).to(noise.dtype)
    states = torchdiffeq.odeint(
        velocity, noise, span, rtol=1e-5, atol=1e-5, method="dopri5", options={"max_step": 0.25}
    )
    result: Tensor = states[-1]
    return result
