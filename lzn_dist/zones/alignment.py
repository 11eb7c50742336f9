"""Latent alignment: do latents of one kind flow to the right anchors of another? (paper, section 2)"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

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
from lzn_dist.zones.field import AnchorField, FieldFactory
from lzn_dist.zones.reference import posterior_mean
from lzn_dist.zones.schedules import alignment_schedule
from lzn_dist.zones.trajectory import integrate

ABSENT = -1e8  # far below every score's; float64 tells scores relative to it to 1e-8


@dataclass
class Alignment:
    """log_probs [steps, b]: log w_target at each step, from σ = 1 to σ = 1/steps. endpoint [b, d]: at σ = 0."""

    log_probs: Tensor
    endpoint: Tensor


def align(
    latents: Tensor,
    anchors: Tensor,
    targets: Tensor,
    *,
    log_weights: Tensor | None = None,
    groups: Tensor | None = None,
    steps: int = 20,
    backend: Backend = "auto",
    field: FieldFactory | None = None,
    store_every: int = 1,
) -> Alignment:
    """Carry latents [b, d] from the prior along the flow of anchors [n, d] and record the targets' log-weights.

    targets: int64 [b], the anchor that each latent should reach. log_weights [n]: log π of the anchors, −inf for an
    absent one, for example the classes' log-frequencies in the global batch (default: equal); not differentiated.
    groups: int64 [n]; a latent's target is then the whole group of its target, and its log-weight that of the sum over
    them (captions that are equal, say).
    store_every: keep one in so many states for the backward and compute the others again (see `compute_latents`).

    backend: as for `compute_latents`.
    field: makes the field of anchors (default `AnchorField`). Where it spreads the anchors over processes, anchors are
    those that this process holds, targets are numbers over all processes of anchors held here, and the call and its
    backward are collective: every process makes both, one without latents too.

    Differentiable in latents and anchors. Float32 or float64; never allocates b × n × d.
    Raises ValueError, naming the argument, for wrong shapes, dtypes, a target out of range, steps or store_every < 1,
    or a field with backend plain.
    """
    check_points("latents", latents)
    check_points("anchors", anchors, latents.shape[1], latents.dtype)
    check_count("steps", steps)
    check_count("store_every", store_every)
    check_backend(backend, field)
    log_weights = check_log_weights(log_weights, len(anchors))
    if groups is not None and (groups.shape != (len(anchors),) or groups.dtype != torch.int64):
        raise ValueError(f"groups must be int64 [{len(anchors)}], got {groups.dtype} {tuple(groups.shape)}")
    made = (field or AnchorField)(anchors.detach(), log_weights, groups, backend)
    here = "" if made.held == made.count else ", the anchors that this process holds"
    check_index("targets", targets, len(latents), range(made.start, made.start + made.held), here)
    if field is None and not len(latents):
        return Alignment(latents.new_zeros(steps, 0), latents)
    if backend == "plain":
        return _plain_align(latents, anchors, targets, log_weights, groups, steps)
    reference = columns = targets - made.start
    weights, absent = None, None
    if log_weights is not None:
        # logits are taken relative to the target's: an absent one is no reference, and where there is none here at all
        # it has a weight that nothing else feels
        absent = torch.isneginf(log_weights[columns])
        if made.held:
            reference = torch.where(absent, log_weights.argmax(), columns)
        weights = log_weights[reference]
        weights = weights.masked_fill(torch.isneginf(weights), ABSENT)
    own = anchors[reference]
    _, delta, target = integrate(
        latents, own, anchors, reference + made.start, made, alignment_schedule(steps), from_anchors=False,
        store_every=store_every, log_weights=weights, groups=None if groups is None else groups[columns],
        inside=None if groups is None else groups[reference] == groups[columns],
    )  # fmt: skip
    log_probs = -target.to(latents.dtype)
    if absent is not None and groups is None:
        log_probs = log_probs.masked_fill(absent, -math.inf)
    return Alignment(log_probs, own + delta)


def _plain_align(
    latents: Tensor, anchors: Tensor, targets: Tensor, log_weights: Tensor | None, groups: Tensor | None, steps: int
) -> Alignment:
    """Plain twin, on x and from the definitions; use float64."""
    x, recorded = latents, []
    names = torch.arange(len(anchors), device=anchors.device) if groups is None else groups
    target = names == names[targets][:, None]
    for k in range(steps):
        sigma = 1.0 - k / steps
        log_w, mean = posterior_mean(x, sigma, anchors, log_weights)
        there = log_w.masked_fill(~target, -math.inf)
        none = torch.isneginf(there.amax(1))  # logsumexp would have no gradient but NaN
        recorded.append(there.masked_fill(none[:, None], 0.0).logsumexp(1).masked_fill(none, -math.inf))
        x = x - (x - mean) / sigma / steps
    return Alignment(torch.stack(recorded), x)


def alignment_loss(
    log_probs: Tensor, *, cutoff: float = 0.2, kind: Literal["cross_entropy", "probability"] = "cross_entropy",
    over: Literal["max", "mean", "last", "softmax"] = "max", temperature: float = 1.0,
    weights: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Scalar loss of log_probs [steps, b]: −mean_i over_k v_ik, of the K steps after the first int(steps · cutoff).

    kind: v = log w (cross_entropy), or w (probability). The early steps are left out because they saturate (paper,
    section 2). over: max_k v, each sample's best step (the paper's); mean: Σ_k v / K; last: v_K; softmax: the smooth
    maximum τ log(Σ_k exp(v/τ) / K) at temperature τ, which is the maximum for τ → 0 and the mean for τ → ∞.
    weights [b]: of the samples in the mean over them (default: 1 each).
    Raises ValueError for another kind or over, a cutoff that leaves no step, temperature ≤ 0, or weights of another
    shape.
    """
    if log_probs.ndim != 2 or not len(log_probs):
        raise ValueError(f"log_probs must be [steps, b], got {tuple(log_probs.shape)}")
    first = int(len(log_probs) * cutoff) if 0.0 <= cutoff < 1.0 else -1
    if not 0 <= first < len(log_probs):
        raise ValueError(f"cutoff must leave at least one of {len(log_probs)} steps, got {cutoff}")
    if kind not in ("cross_entropy", "probability"):
        raise ValueError(f"kind must be cross_entropy or probability, got {kind!r}")
    if not temperature > 0.0:
        raise ValueError(f"temperature must be above 0, got {temperature}")
    values = log_probs[first:] if kind == "cross_entropy" else log_probs[first:].exp()
    if weights is not None and weights.shape != values.shape[1:]:
        raise ValueError(f"weights must be [{values.shape[1]}], got {tuple(weights.shape)}")
    if over == "max":
        found = values.max(0).values
    elif over == "mean":
        found = values if weights is None else values.mean(0)
    elif over == "last":
        found = values[-1]
    elif over == "softmax":
        found = temperature * ((values / temperature).logsumexp(0) - math.log(len(values)))
    else:
        raise ValueError(f"over must be max, mean, last or softmax, got {over!r}")
    return -(found if weights is None else found * weights).mean()


def nearest_anchor(endpoint: Tensor, anchors: Tensor) -> Tensor:
    """int64 [b]: the anchor of anchors [k, d] that is nearest to each endpoint [b, d].

    Raises ValueError, naming the argument, for wrong shapes or dtypes, or no anchors.
    """
    check_points("endpoint", endpoint)
    check_points("anchors", anchors, endpoint.shape[1], endpoint.dtype)
    if not len(anchors):
        raise ValueError(f"anchors must have at least one row, got shape {tuple(anchors.shape)}")
    return torch.cdist(endpoint, anchors, compute_mode="donot_use_mm_for_euclid_dist").argmin(1)
