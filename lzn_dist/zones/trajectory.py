"""Trajectories of the flow: from anchors to latents, and from latents along another set of anchors.

A solver is a `Schedule`: the values of r = (1−σ)/σ at which the field is evaluated, and how the updates combine the
last few posterior means. Every solver used by the paper has the form e ← e + Σ_j c_j Δ_{k−j} in the coordinates of
`field`, so that one loop integrates them all and one hand-written loop is its backward. Kept between steps:
the states [steps, b, d], or every few of them, and the log-sum-exps [steps, b], nothing of size b × n.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from dataclasses import field as dataclass_field
from typing import Any

import torch
from torch import Tensor

from lzn_dist.zones.block import Rows
from lzn_dist.zones.field import Field
from lzn_dist.zones.pairs import partner_posterior, partner_vjp
from lzn_dist.zones.partial import Posterior, Sums
from lzn_dist.zones.schedules import Schedule

# With fewer anchors than this, looking for settled rows costs more than it saves.
SETTLE_ANCHORS = 192
# Times the rounding unit: rows whose own weight is this near to 1 at a step pass no gradient back through it.
DEAD = 1e-5


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Neither autocast nor TF32: both would round the products to 3 digits, whatever the networks around use."""
    allowed = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    try:
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = allowed


def to_host(values: Tensor) -> Tensor:
    """The values on the CPU: the one place where a trajectory waits for its device, once forward and once backward."""
    return values.cpu()


def _lists(masks: Tensor, device: torch.device) -> list[Tensor]:
    """masks: bool [lists, b], on the CPU. The true places of each, int64 on the device, in one transfer."""
    places = masks.flatten().nonzero().squeeze(1) % max(1, masks.shape[1])
    if device.type == "cuda":
        places = places.pin_memory().to(device, non_blocking=True)
    return list(places.split(masks.sum(1).tolist()))


@dataclass
class _Walk:
    """How the rows of one trajectory meet the field, step by step: the same forward, recomputed and backward.

    Row i meets all anchors at steps first[i] ≤ k < last[i]. Before that it feels none, or at step 0 the few that are
    as near as rounding; after it, its partner alone. Who does what is decided on the CPU and sent as lists of rows.
    """

    field: Field
    schedule: Schedule
    references: Tensor  # [b, d]
    rows: Rows  # as they start
    first: Tensor  # int64 [b], cpu
    last: Tensor  # int64 [b], cpu
    near: Tensor  # int64: the rows with near anchors
    partner: Tensor  # int64 [b]: number of the partner, −1 while there is none
    partners: Tensor | None = None  # [b, d]: their values, from when a row has one
    met: list[Tensor] = dataclass_field(default_factory=list)  # [steps]: the rows that meet all anchors
    left: list[Tensor] = dataclass_field(default_factory=list)  # [steps]: those that follow their partner
    dense: list[bool] = dataclass_field(default_factory=list)  # [steps]: some process' rows meet all anchors
    any_near: bool = False

    @staticmethod
    def start(field: Field, schedule: Schedule, rows: Rows, references: Tensor, from_anchors: bool) -> _Walk:
        count, steps, device = len(rows), len(schedule.r), rows.e.device
        first, last = torch.zeros(count, dtype=torch.int64), torch.full((count,), steps)
        near = torch.zeros(1, count, dtype=torch.bool)
        if from_anchors:
            active = to_host(field.reach(rows))
            r = torch.tensor(schedule.r, dtype=torch.float64)
            # The first step is always taken in pairs: at r = 10⁴ products would have no accurate digits.
            first = torch.searchsorted(-r, -active).clamp_(min=1)
            near = (active > 0.5 * schedule.r[0])[None]
        walk = _Walk(field, schedule, references, rows, first, last, rows.index[:0], torch.full_like(rows.index, -1))
        masks = walk.meetings(last)
        walk.met, (walk.near,) = _lists(masks, device), _lists(near, device)
        walk.left = [walk.near[:0]] * steps
        *walk.dense, walk.any_near = field.wanted([*masks.any(1).tolist(), bool(len(walk.near))])
        return walk

    def meetings(self, until: Tensor) -> Tensor:
        """bool [steps, b]: the rows that meet all anchors, of those with k < until [b]."""
        k = torch.arange(len(self.schedule.r))[:, None]
        return (self.first <= k) & (k < torch.minimum(self.last, until))

    def followings(self, until: Tensor) -> Tensor:
        """bool [steps, b]: the rows that follow their partner alone, of those with k < until [b]."""
        k = torch.arange(len(self.schedule.r))[:, None]
        return (self.last <= k) & (k < until)

    def evaluate(self, k: int, e: Tensor, *, settle: bool = False) -> tuple[Tensor, Sums]:
        """Δ [b, d] and sums [b] of step k. settle: also look for rows on which one anchor holds all weight."""
        r, rows, at, left = self.schedule.r[k], self.rows.at(e), self.met[k], self.left[k]
        part = None
        if self.dense[k]:
            everyone = len(at) == len(rows)  # in their order: nothing to pick or to put
            part = self.field.posterior(rows if everyone else rows[at], r, settle=settle)
            if settle:
                self._settle(k, at, part)
            if everyone:
                return part.delta, part.sums
        delta, lse = torch.zeros_like(e), e.new_zeros(len(e), dtype=torch.float64)
        target = torch.zeros_like(lse) if self.field.grouped else lse

        def put(at: Tensor, part: Posterior) -> None:
            delta.index_copy_(0, at, part.delta)
            lse.index_copy_(0, at, part.sums.lse)
            if target is not lse and part.sums.target is not part.sums.lse:
                target.index_copy_(0, at, part.sums.target)

        if part is not None:
            put(at, part)
        if k == 0 and self.any_near:
            put(self.near, self.field.near_posterior(rows[self.near], self.references[self.near], r))
        if len(left) and self.partners is not None:
            # where there are groups, a partner is one of the row's: its weight is all, and `target` stays 0
            put(left, partner_posterior(e[left], self.references[left], self.partners[left], r))
        return delta, Sums(lse, target)

    def _settle(self, k: int, rows: Tensor, part: Posterior) -> None:
        """Let settled rows follow their partner from step k + 1 on, and agree anew on who meets all anchors."""
        assert part.settled is not None and part.partner is not None and part.heaviest is not None
        done = _rows(part.settled)
        here = [bool(len(met)) for met in self.met[k + 1 :]]
        if len(done):
            if self.partners is None:
                self.partners = torch.zeros_like(self.references)
            at = rows[done]
            self.last[at.cpu()] = k + 1
            self.partner[at] = part.partner[done]
            self.partners[at] = part.heaviest[done]
            masks = self.meetings(self.last)
            self.met[k + 1 :] = _lists(masks, rows.device)[k + 1 :]
            self.left[k + 1 :] = _lists(self.followings(torch.full_like(self.last, len(masks))), rows.device)[k + 1 :]
            here = masks.any(1).tolist()[k + 1 :]
        self.dense[k + 1 :] = self.field.wanted(here)

    def advance(self, k: int, e: Tensor, deltas: list[Tensor]) -> Tensor:
        """The state after step k; deltas: …, Δ_{k−1}, Δ_k."""
        e = e.clone()
        for j, c in enumerate(self.schedule.coefficients[k]):
            e.add_(deltas[-1 - j], alpha=c)
        return e


class _Pullback:
    """The backward of a walk, from the last step to the first; gradients of what all steps share are added up here."""

    def __init__(
        self, walk: _Walk, grad_e: Tensor, grad_last: Tensor, grad_target: Tensor, target: Tensor, from_anchors: bool
    ) -> None:
        self.walk, self.grad_last, self.grad_target = walk, grad_last, None if from_anchors else grad_target
        steps, device = len(walk.schedule.r), grad_e.device
        # The loss keeps one step a row: before the last step with a cotangent there is nothing to carry back.
        live = (grad_e != 0).any(1) | (grad_last != 0).any(1)
        # Its cotangent goes through weights that sum to no more than `target`: where these are nothing, so is what it
        # carries.
        felt = (grad_target != 0) & (target > DEAD * torch.finfo(grad_e.dtype).eps)
        counted = torch.arange(1, steps + 1, device=device)[:, None] * felt
        until = to_host(torch.where(live, steps, counted.amax(0)))
        reached = (torch.arange(steps)[:, None] < until).any(1).tolist()
        masks = walk.meetings(until)
        self.met, self.left = _lists(masks, device), _lists(walk.followings(until), device)
        (self.followers,) = _lists((walk.last < steps)[None], device)
        agreed = walk.field.wanted([*masks.any(1).tolist(), *reached, bool(len(self.followers))])
        self.dense, self.horizon, self.any_followers = agreed[:steps], sum(agreed[steps:-1]), agreed[-1]
        self.into = walk.field.gradient()
        self.references = torch.zeros_like(grad_e)
        self.partners = torch.zeros_like(grad_e if len(self.followers) else grad_e[:0])
        self.after = [grad_e]  # cotangents of e_{k+1}, e_{k+2}, e_{k+3}

    def step(self, k: int, e: Tensor, sums: Sums) -> None:
        """Take step k back, from state e [b, d] with the sums [b] of its field."""
        walk, coefficients = self.walk, self.walk.schedule.coefficients
        r, rows = walk.schedule.r[k], walk.rows.at(e)
        grad_delta = torch.zeros_like(e) if k < len(coefficients) - 1 else self.grad_last.clone()
        for j, later in enumerate(self.after):
            if k + j < len(coefficients) and j < len(coefficients[k + j]):
                grad_delta.add_(later, alpha=coefficients[k + j][j])
        current = self.after[0].clone()
        self.after = [current, *self.after[:2]]
        grad_target = None if self.grad_target is None else self.grad_target[k]

        def put(at: Tensor, grad_e: Tensor, grad_references: Tensor) -> None:
            current.index_add_(0, at, grad_e)
            self.references.index_add_(0, at, grad_references)

        if self.dense[k]:
            at = self.met[k]
            if len(at) == len(rows):
                of_e, of_references = walk.field.vjp(rows, r, sums, grad_delta, grad_target, self.into)
                current.add_(of_e)
                self.references.add_(of_references)
            else:
                of_target = None if grad_target is None else grad_target[at]
                put(at, *walk.field.vjp(rows[at], r, sums[at], grad_delta[at], of_target, self.into))
        if k == 0 and walk.any_near:
            at = walk.near
            put(at, *walk.field.near_vjp(rows[at], walk.references[at], r, sums[at], grad_delta[at], self.into))
        at = self.left[k]
        if len(at) and walk.partners is not None:
            of_target = None if grad_target is None or walk.field.grouped else grad_target[at]
            found = partner_vjp(e[at], walk.references[at], walk.partners[at], r, grad_delta[at], of_target)
            put(at, *found[:2])
            self.partners.index_add_(0, at, found[2])

    def finish(self) -> None:
        if self.horizon and self.any_followers:
            rows = self.followers
            self.walk.field.deliver(self.walk.partner[rows], self.partners[rows], self.into)
        self.walk.field.finish(self.into)


class _Trajectory(torch.autograd.Function):
    """(e₀ [b, d], references [b, d], anchors [m, d]) → (last e [b, d], last Δ [b, d], target [steps, b] float64).

    anchors: those that this process holds, of which the field was made. Kept: every store_every-th state, with the
    earlier Δ that the solver's next updates take up; the others are computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, references: Tensor, anchors: Tensor, index: Tensor, log_weights: Tensor | None,
        groups: Tensor | None, inside: Tensor | None, field: Field, schedule: Schedule, from_anchors: bool,
        store_every: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with full_precision(e.device):
            rows = Rows(e, references.detach() - field.centre, index, log_weights, groups, inside)
            walk = _Walk.start(field, schedule, rows, references.detach(), from_anchors)
            # looking for settled rows waits for the device, and lists of them are for a CPU
            settle = not (from_anchors or field.weighted) and field.count >= SETTLE_ANCHORS and e.device.type == "cpu"
            kept: list[Tensor] = []
            sums: list[Sums] = []
            deltas: deque[Tensor] = deque(maxlen=schedule.memory)
            for k in range(len(schedule.r)):
                if k % store_every == 0 and any(ctx.needs_input_grad):
                    kept += [e, *deltas] if store_every > 1 else [e]
                delta, found = walk.evaluate(k, e, settle=settle and k % 2 == 1)
                sums.append(found)
                e = walk.advance(k, e, [*deltas, delta])
                deltas.append(delta)
            target = torch.stack([found.target for found in sums])
            lse = torch.stack([found.lse for found in sums]) if field.grouped else target
        ctx.save_for_backward(references, anchors, target, *([lse] if field.grouped else []), *kept)
        ctx.walk, ctx.from_anchors, ctx.store_every = walk, from_anchors, store_every
        return e, delta, target

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        walk: _Walk = ctx.walk
        _, _, target, *kept = ctx.saved_tensors
        sums = Sums(kept.pop(0) if walk.field.grouped else target, target)
        with full_precision(grads[0].device):
            back = _Pullback(walk, grads[0], grads[1], grads[2], target, ctx.from_anchors)
            for start in reversed(range(0, back.horizon, ctx.store_every)):
                states = _states(walk, start, min(start + ctx.store_every, back.horizon), kept, ctx.store_every)
                while states:
                    k = start + len(states) - 1
                    back.step(k, states.pop(), sums[k])
            back.finish()
        return back.after[0], back.references, back.into.anchors, *[None] * 8


def _states(
    walk: _Walk, start: int, stop: int, kept: tuple[Tensor, ...] | list[Tensor], store_every: int
) -> list[Tensor]:
    """The states of steps start..stop−1, from the one that was kept at start; the same digits as in the forward."""
    memory = walk.schedule.memory if store_every > 1 else 0
    at = sum(1 + min(memory, k) for k in range(0, start, store_every))
    deltas = deque(kept[at + 1 : at + 1 + min(memory, start)], maxlen=walk.schedule.memory)
    states = [kept[at]]
    for k in range(start, stop - 1):
        delta, _ = walk.evaluate(k, states[-1])
        states.append(walk.advance(k, states[-1], [*deltas, delta]))
        deltas.append(delta)
    return states


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def integrate(
    e: Tensor, references: Tensor, anchors: Tensor, index: Tensor, field: Field, schedule: Schedule,
    *, from_anchors: bool, store_every: int = 1, log_weights: Tensor | None = None, groups: Tensor | None = None,
    inside: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry e [b, d] through a schedule; differentiable in e, references [b, d] and anchors [m, d].

    anchors: those that this process holds, of which field was made. Row i's reference is the anchor numbered index[i],
    with log-weight log_weights[i] (finite) where the field's anchors have such; groups int64 [b]: whose weight is
    asked for (default: the reference's own), where they have groups; inside: bool [b], whether the reference is of it.
    Returns the last e [b, d], the last Δ [b, d] and target [steps, b] (float64), minus the log-weight of the reference,
    or of its group, at each step. Collective where the field is.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Trajectory.apply(
        e, references, anchors, index, log_weights, groups, inside, field, schedule, from_anchors, store_every
    )
    return result
