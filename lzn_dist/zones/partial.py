"""Parts of a softmax over anchors, and how they are put together when the anchors come block by block.

Everything is relative to a row's reference anchor a_o, which is in none of the sums (see `field`). Each kind of part
has an associative `merge`; one block is the case in which there is nothing to merge.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, TypeVar

import torch
from torch import Tensor


@dataclass
class Sums:
    """Of each row, float64 [b]. lse: log Σ_j exp(s_j), that is −log w_o. target: −log of the weight of the row's group
    of anchors; lse itself where that is the reference alone."""

    lse: Tensor
    target: Tensor

    def __getitem__(self, at: slice | Tensor | int) -> Sums:
        lse = self.lse[at]
        return Sums(lse, lse if self.target is self.lse else self.target[at])


@dataclass
class Posterior:
    """The field at one r. delta [b, d]: A − a_o."""

    delta: Tensor
    sums: Sums
    settled: Tensor | None = None  # bool [b]: one anchor holds all weight, now and at every larger r
    partner: Tensor | None = None  # int64 [b]: the heaviest anchor besides the reference
    heaviest: Tensor | None = None  # [b, d]: that anchor


@dataclass
class GroupSums:
    """Of a row's group, float64 [b]. inside: bool [b], whether the reference is of it. peak: the largest score of it
    and the reference. members: Σ_j exp(s_j − peak) over it without the reference. outside: Σ_j exp(s_j − the
    `Partial`'s peak) over all others without it."""

    inside: Tensor
    peak: Tensor
    members: Tensor
    outside: Tensor

    def target(self, excess: Tensor, offset: Tensor) -> Tensor:
        """−log of the group's weight: log(1 + outside / inside), which keeps its digits at both ends."""
        one = torch.zeros_like(excess)  # the reference's weight relative to itself, as a logarithm
        none = torch.full_like(excess, -math.inf)
        group = torch.logaddexp(self.peak - offset + self.members.log(), torch.where(self.inside, one, none))
        others = torch.logaddexp(excess + self.outside.log(), torch.where(self.inside, none, one))
        return torch.logaddexp(others - group, one)


@dataclass
class Partial:
    """What some of the anchors add to the posterior mean.

    offset [b] float64: the reference's score. peak [b] float64: the largest score, the reference's included.
    others [b]: Σ_j exp(s_j − peak). moment [b, d]: Σ_j exp(s_j − peak) (a_j − a_o).
    top [b], partner [b], heaviest [b, d]: the largest score besides the reference's, its anchor's number and value;
    partner_inside, bool [b]: whether that one is of the row's group.
    """

    offset: Tensor
    peak: Tensor
    others: Tensor
    moment: Tensor
    top: Tensor | None = None
    partner: Tensor | None = None
    heaviest: Tensor | None = None
    group: GroupSums | None = None
    partner_inside: Tensor | None = None

    def merge(self, more: Partial) -> Partial:
        peak = torch.maximum(self.peak, more.peak)
        ours, theirs = ((part.peak - peak).exp().to(self.others.dtype) for part in (self, more))
        merged = Partial(
            self.offset,
            peak,
            self.others * ours + more.others * theirs,
            self.moment * ours[:, None] + more.moment * theirs[:, None],
        )
        if self.top is not None and more.top is not None:
            heavier = more.top > self.top
            merged.top = torch.maximum(self.top, more.top)
            if self.partner is not None and more.partner is not None:
                merged.partner = torch.where(heavier, more.partner, self.partner)
            if self.heaviest is not None and more.heaviest is not None:
                merged.heaviest = torch.where(heavier[:, None], more.heaviest, self.heaviest)
            if self.partner_inside is not None and more.partner_inside is not None:
                merged.partner_inside = torch.where(heavier, more.partner_inside, self.partner_inside)
        if self.group is not None and more.group is not None:
            highest = torch.maximum(self.group.peak, more.group.peak)
            merged.group = GroupSums(
                self.group.inside,
                highest,
                self.group.members * (self.group.peak - highest).exp()
                + more.group.members * (more.group.peak - highest).exp(),
                self.group.outside * ours + more.group.outside * theirs,
            )
        return merged

    def conclude(self, threshold: float) -> Posterior:
        """The field, once all anchors are in. threshold: weights under exp(−threshold) count as none."""
        excess = self.peak - self.offset
        # log1p keeps −log w_o accurate far below the rounding unit, where everything sits on the reference
        log_total = torch.log1p(torch.expm1(-excess) + self.others.double())
        delta = self.moment * (-log_total).exp().to(self.moment.dtype)[:, None]
        settled = None
        if self.top is not None:
            on_reference = (excess == 0) & (self.others <= math.exp(-threshold))
            unit = torch.finfo(self.moment.dtype).eps
            on_partner = (self.others <= 1 + unit) & ((-excess).exp() <= unit)
            if self.partner_inside is not None and self.group is not None:
                # else the group's weight is still to be told
                on_partner, on_reference = on_partner & self.partner_inside, on_reference & self.group.inside
            settled = on_reference | on_partner
        lse = excess + log_total
        target = lse if self.group is None else self.group.target(excess, self.offset)
        return Posterior(delta, Sums(lse, target), settled, self.partner, self.heaviest)


@dataclass
class Moments:
    """weight [b]: Σ_j w_j. pull [b]: Σ_j w_j g·(a_j − a_o), for the cotangent g of the posterior mean."""

    weight: Tensor
    pull: Tensor

    def merge(self, more: Moments) -> Moments:
        return Moments(self.weight + more.weight, self.pull + more.pull)

    def shift(self, lse: Tensor, grad_lse: Tensor | None) -> Tensor:
        """[b]: what dS_j = w_j (g·(a_j − a_o) − shift) takes off, once all anchors are in.

        The pull comes from the same products as dS and is divided by the weights' own total (1 but for the stored
        log-sum-exp's rounding), so that the two cancel where one anchor holds all weight; what did not would be
        multiplied by r ‖e‖.
        """
        shift = self.pull / (self.weight + (-lse).exp().to(self.weight.dtype))
        return shift if grad_lse is None else shift - grad_lse.to(shift.dtype)


@dataclass
class Cotangent:
    """spread [b, d]: Σ_j dS_j (a_j − a_o). total [b]: Σ_j dS_j. weight [b]: Σ_j w_j."""

    spread: Tensor
    total: Tensor
    weight: Tensor

    def merge(self, more: Cotangent) -> Cotangent:
        return Cotangent(self.spread + more.spread, self.total + more.total, self.weight + more.weight)

    def conclude(self, e: Tensor, grad_delta: Tensor, r: float) -> tuple[Tensor, Tensor]:
        """Cotangents of e and of the references, [b, d] each, once all anchors are in."""
        grad_own = r * r * self.spread - r * self.total[:, None] * e - self.weight[:, None] * grad_delta
        return (r * self.spread).to(e.dtype), grad_own.to(e.dtype)


Part = TypeVar("Part", Partial, Moments, Cotangent)


def joined(parts: Sequence[Part]) -> Part:
    """Of the same anchors: the part of all rows, from those of some rows each, in their order."""
    return parts[0] if len(parts) == 1 else _joined(parts)


def _joined(parts: Sequence[Any]) -> Any:
    if parts[0] is None:
        return None
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts))
    return type(parts[0])(*(_joined([getattr(part, field.name) for part in parts]) for field in fields(parts[0])))
