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

from lzn_dist.zones.field import Field
from lzn_dist.zones.pairs import partner_posterior, partner_vjp
from lzn_dist.zones.partial import Posterior
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


@dataclass
class _Walk:
    """How the rows of one trajectory meet the field, step by step: the same forward, recomputed and backward.

    Row i meets all anchors at steps first[i] ≤ k < last[i]. Before that it feels none, or at step 0 the few that are
    as near as rounding; after it, its partner alone.
    """

    field: Field
    schedule: Schedule
    references: Tensor  # [b, d]
    index: Tensor  # int64 [b]
    own: Tensor  # [b, d]: references, centred
    first: Tensor  # int64 [b], cpu
    last: Tensor  # int64 [b], cpu
    near: Tensor  # int64: the rows with near anchors
    partner: Tensor  # int64 [b]: number of the partner, −1 while there is none
    partners: Tensor | None = None  # [b, d]: their values, from when a row has one
    dense: list[bool] = dataclass_field(default_factory=list)  # [steps]: some process' rows meet all anchors
    any_near: bool = False

    @staticmethod
    def start(
        field: Field, schedule: Schedule, e: Tensor, references: Tensor, index: Tensor, from_anchors: bool
    ) -> _Walk:
        count, steps = len(e), len(schedule.r)
        own = references - field.centre
        first, last = torch.zeros(count, dtype=torch.int64), torch.full((count,), steps)
        walk = _Walk(field, schedule, references, index, own, first, last, index[:0], torch.full_like(index, -1))
        if from_anchors:
            active = field.reach(e, own, index)
            r = torch.tensor(schedule.r, dtype=torch.float64)
            # The first step is always taken in pairs: at r = 10⁴ products would have no accurate digits.
            walk.first = torch.searchsorted(-r, -active.cpu()).clamp_(min=1)
            walk.near = _rows(active > 0.5 * schedule.r[0])
        *walk.dense, walk.any_near = field.wanted([*walk.meetings(last), bool(len(walk.near))])
        return walk

    def meetings(self, until: Tensor) -> list[bool]:
        """[steps]: whether rows of this process meet all anchors, of those with k < until [b]."""
        k = torch.arange(len(self.schedule.r))[:, None]
        return ((self.first <= k) & (k < torch.minimum(self.last, until))).any(1).tolist()

    def meeting(self, k: int, until: Tensor | None = None) -> Tensor:
        """int64: the rows that meet all anchors at step k, of those with k < until."""
        mask = (self.first <= k) & (k < self.last)
        return _rows(mask if until is None else mask & (k < until)).to(self.own.device)

    def settled(self, k: int, until: Tensor | None = None) -> Tensor:
        """int64: the rows that follow their partner alone at step k."""
        mask = self.last <= k
        return _rows(mask if until is None else mask & (k < until)).to(self.own.device)

    def evaluate(self, k: int, e: Tensor, *, settle: bool = False) -> tuple[Tensor, Tensor]:
        """Δ [b, d] and lse [b] of step k. settle: also look for rows on which one anchor holds all weight."""
        r = self.schedule.r[k]
        delta, lse = torch.zeros_like(e), e.new_zeros(len(e), dtype=torch.float64)

        def put(rows: Tensor, part: Posterior) -> None:
            delta.index_copy_(0, rows, part.delta)
            lse.index_copy_(0, rows, part.lse)

        left = self.settled(k)
        if k == 0 and self.any_near:
            rows = self.near
            put(rows, self.field.near_posterior(e[rows], self.references[rows], self.index[rows], r))
        if self.dense[k]:
            rows = self.meeting(k)
            part = self.field.posterior(e[rows], self.own[rows], self.index[rows], r, settle=settle)
            put(rows, part)
            if settle:
                self._settle(k, rows, part)
        if len(left) and self.partners is not None:
            put(left, partner_posterior(e[left], self.references[left], self.partners[left], r))
        return delta, lse

    def _settle(self, k: int, rows: Tensor, part: Posterior) -> None:
        """Let settled rows follow their partner from step k + 1 on, and agree anew on who meets all anchors."""
        assert part.settled is not None and part.partner is not None and part.heaviest is not None
        done = _rows(part.settled)
        if len(done):
            if self.partners is None:
                self.partners = torch.zeros_like(self.references)
            at = rows[done]
            self.last[at.cpu()] = k + 1
            self.partner[at] = part.partner[done]
            self.partners[at] = part.heaviest[done]
        self.dense[k + 1 :] = self.field.wanted(self.meetings(self.last)[k + 1 :])

    def advance(self, k: int, e: Tensor, deltas: list[Tensor]) -> Tensor:
        """The state after step k; deltas: …, Δ_{k−1}, Δ_k."""
        e = e.clone()
        for j, c in enumerate(self.schedule.coefficients[k]):
            e.add_(deltas[-1 - j], alpha=c)
        return e


class _Pullback:
    """The backward of a walk, from the last step to the first; gradients of what all steps share are added up here."""

    def __init__(
        self, walk: _Walk, grad_e: Tensor, grad_last: Tensor, grad_lse: Tensor, lse: Tensor, from_anchors: bool
    ) -> None:
        self.walk, self.grad_last, self.grad_lse = walk, grad_last, None if from_anchors else grad_lse
        steps = len(walk.schedule.r)
        # The loss keeps one step a row: before the last step with a cotangent there is nothing to carry back.
        live = (grad_e != 0).any(1) | (grad_last != 0).any(1)
        # Its cotangent goes through weights that sum to 1 − w_o ≤ lse: where these are nothing, so is what it carries.
        felt = (grad_lse != 0) & (lse > DEAD * torch.finfo(grad_e.dtype).eps)
        counted = torch.arange(1, steps + 1, device=live.device)[:, None] * felt
        self.until = torch.where(live, steps, counted.amax(0)).cpu()
        reached = (torch.arange(steps)[:, None] < self.until).any(1).tolist()
        self.followers = _rows(walk.last < steps).to(grad_e.device)
        agreed = walk.field.wanted([*walk.meetings(self.until), *reached, bool(len(self.followers))])
        self.dense, self.horizon, self.any_followers = agreed[:steps], sum(agreed[steps:-1]), agreed[-1]
        self.into = walk.field.gradient()
        self.references = torch.zeros_like(grad_e)
        self.partners = torch.zeros_like(grad_e if len(self.followers) else grad_e[:0])
        self.after = [grad_e]  # cotangents of e_{k+1}, e_{k+2}, e_{k+3}

    def step(self, k: int, e: Tensor, lse: Tensor) -> None:
        """Take step k back, from state e [b, d] with the log-sum-exps lse [b] of its field."""
        walk, coefficients = self.walk, self.walk.schedule.coefficients
        r = walk.schedule.r[k]
        grad_delta = torch.zeros_like(e) if k < len(coefficients) - 1 else self.grad_last.clone()
        for j, later in enumerate(self.after):
            if k + j < len(coefficients) and j < len(coefficients[k + j]):
                grad_delta.add_(later, alpha=coefficients[k + j][j])
        current = self.after[0].clone()
        self.after = [current, *self.after[:2]]
        grad_lse = None if self.grad_lse is None else self.grad_lse[k]

        def put(rows: Tensor, grad_e: Tensor, grad_references: Tensor) -> None:
            current.index_add_(0, rows, grad_e)
            self.references.index_add_(0, rows, grad_references)

        if self.dense[k]:
            rows = walk.meeting(k, self.until)
            of_lse = None if grad_lse is None else grad_lse[rows]
            put(rows, *walk.field.vjp(
                e[rows], walk.own[rows], walk.index[rows], r, lse[rows], grad_delta[rows], of_lse, self.into
            ))  # fmt: skip
        if k == 0 and walk.any_near:
            rows = walk.near
            put(rows, *walk.field.near_vjp(
                e[rows], walk.references[rows], walk.index[rows], r, lse[rows], grad_delta[rows], self.into
            ))  # fmt: skip
        rows = walk.settled(k, self.until)
        if len(rows) and walk.partners is not None:
            of_lse = None if grad_lse is None else grad_lse[rows]
            found = partner_vjp(e[rows], walk.references[rows], walk.partners[rows], r, grad_delta[rows], of_lse)
            put(rows, *found[:2])
            self.partners.index_add_(0, rows, found[2])

    def finish(self) -> None:
        if self.horizon and self.any_followers:
            rows = self.followers
            self.walk.field.deliver(self.walk.partner[rows], self.partners[rows], self.into)
        self.walk.field.finish(self.into)


class _Trajectory(torch.autograd.Function):
    """(e₀ [b, d], references [b, d], anchors [m, d]) → (last e [b, d], last Δ [b, d], lse [steps, b] float64).

    anchors: those that this process holds, of which the field was made. Kept: every store_every-th state, with the
    earlier Δ that the solver's next updates take up; the others are computed again in the backward.
    """

    @staticmethod
    def forward(
        ctx: Any, e: Tensor, references: Tensor, anchors: Tensor,
        index: Tensor, field: Field, schedule: Schedule, from_anchors: bool, store_every: int,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        with full_precision(e.device):
            walk = _Walk.start(field, schedule, e, references.detach(), index, from_anchors)
            settle = not from_anchors and not field.weighted and field.count >= SETTLE_ANCHORS
            kept: list[Tensor] = []
            sums: list[Tensor] = []
            deltas: deque[Tensor] = deque(maxlen=schedule.memory)
            for k in range(len(schedule.r)):
                if k % store_every == 0 and any(ctx.needs_input_grad):
                    kept += [e, *deltas] if store_every > 1 else [e]
                delta, lse = walk.evaluate(k, e, settle=settle and k % 2 == 1)
                sums.append(lse)
                e = walk.advance(k, e, [*deltas, delta])
                deltas.append(delta)
            lse = torch.stack(sums)
        ctx.save_for_backward(references, anchors, lse, *kept)
        ctx.walk, ctx.from_anchors, ctx.store_every = walk, from_anchors, store_every
        return e, delta, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        walk: _Walk = ctx.walk
        _, _, lse, *kept = ctx.saved_tensors
        with full_precision(grads[0].device):
            back = _Pullback(walk, grads[0], grads[1], grads[2], lse, ctx.from_anchors)
            for start in reversed(range(0, back.horizon, ctx.store_every)):
                states = _states(walk, start, min(start + ctx.store_every, back.horizon), kept, ctx.store_every)
                while states:
                    k = start + len(states) - 1
                    back.step(k, states.pop(), lse[k])
            back.finish()
        return back.after[0], back.references, back.into.anchors, None, None, None, None, None


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
    *, from_anchors: bool, store_every: int = 1,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Carry e [b, d] through a schedule; differentiable in e, references [b, d] and anchors [m, d].

    anchors: those that this process holds, of which field was made. Row i's reference is the anchor numbered index[i].
    Returns the last e [b, d], the last Δ [b, d] and lse [steps, b] (float64), where −lse is the log-weight of the
    reference at each step. Collective where the field is.
    """
    result: tuple[Tensor, Tensor, Tensor] = _Trajectory.apply(
        e, references, anchors, index, field, schedule, from_anchors, store_every
    )
    return result
