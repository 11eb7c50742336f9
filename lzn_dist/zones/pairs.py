"""The field where only a few (row, anchor) pairs carry weight: direct differences, float64, no product over anchors.

Used at the first step from the anchors, where products would have no accurate digits, and for rows on which one anchor
holds all weight for good. References are not centred here: differences of the anchors as given are exact.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from lzn_dist.zones.partial import Cotangent, Moments, Partial, Posterior, Sums


@dataclass
class Pairs:
    """rows, columns: int64 [p]; a row's pairs stand together, in the order of the rows."""

    rows: Tensor
    columns: Tensor


class PairScores:
    """Scores of pairs of rows (e [b, d], references [b, d]) and anchors [m, d] at r, a chunk of whole rows at a time.

    limit: elements of a chunk's differences, about. log_ratios [p] float64: log-weights of the pairs' anchors less
    their references'.
    """

    def __init__(
        self, anchors: Tensor, e: Tensor, references: Tensor, pairs: Pairs, r: float, limit: int,
        log_ratios: Tensor | None = None,
    ) -> None:  # fmt: skip
        self.anchors, self.e, self.references, self.pairs, self.r = anchors, e, references, pairs, r
        self.log_ratios = log_ratios
        self.limit = max(1, limit // e.shape[1])

    def chunks(self) -> Iterator[tuple[slice, Pairs, Tensor | None]]:
        """Rows, their pairs with rows renumbered from the slice's start, and the pairs' log_ratios."""
        pairs = self.pairs
        if not len(pairs.rows):
            return
        count = int(pairs.rows[-1]) + 1
        ends = torch.bincount(pairs.rows, minlength=count).cumsum(0).tolist()
        start = first = 0
        for row in range(count):
            if row + 1 == count or ends[row + 1] - first > self.limit:
                chunk = slice(first, ends[row])
                taken = Pairs(pairs.rows[chunk] - start, pairs.columns[chunk])
                yield slice(start, row + 1), taken, None if self.log_ratios is None else self.log_ratios[chunk]
                start, first = row + 1, ends[row]

    def differences(self, rows: slice, chunk: Pairs, ratios: Tensor | None) -> tuple[Tensor, Tensor]:
        """a_j − a_o [p, d] and s_j [p], float64."""
        difference = self.anchors[chunk.columns].double() - self.references[rows].double()[chunk.rows]
        along = (self.e[rows].double()[chunk.rows] * difference).sum(1)
        scores = self.r * along - 0.5 * self.r * self.r * difference.square().sum(1)
        return difference, scores if ratios is None else scores + ratios

    def part(self) -> Partial:
        count, dim = self.e.shape
        zeros = self.e.new_zeros(count, dtype=torch.float64)
        result = Partial(zeros, zeros.clone(), zeros.clone(), zeros.new_zeros(count, dim))
        for rows, chunk, ratios in self.chunks():
            difference, scores = self.differences(rows, chunk, ratios)
            peak = result.peak[rows].scatter_reduce_(0, chunk.rows, scores, "amax")
            weights = (scores - peak[chunk.rows]).exp()
            result.others[rows].index_add_(0, chunk.rows, weights)
            result.moment[rows].index_add_(0, chunk.rows, weights[:, None] * difference)
        return result

    def _weigh(
        self, rows: slice, chunk: Pairs, ratios: Tensor | None, lse: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """a_j − a_o, w_j and w_j g·(a_j − a_o)."""
        difference, scores = self.differences(rows, chunk, ratios)
        weights = (scores - lse[rows][chunk.rows]).exp()
        return difference, weights, (g[rows].double()[chunk.rows] * difference).sum(1) * weights

    def moments(self, lse: Tensor, g: Tensor) -> Moments:
        weight, pull = torch.zeros_like(lse), torch.zeros_like(lse)
        for rows, chunk, ratios in self.chunks():
            _, weights, products = self._weigh(rows, chunk, ratios, lse, g)
            weight[rows].index_add_(0, chunk.rows, weights)
            pull[rows].index_add_(0, chunk.rows, products)
        return Moments(weight, pull)

    def pull_back(self, lse: Tensor, g: Tensor, shift: Tensor, into: Tensor) -> Cotangent:
        """Adds the cotangents of the anchors to `into` [m, d]."""
        total, weight = torch.zeros_like(lse), torch.zeros_like(lse)
        spread = lse.new_zeros(self.e.shape)
        r = self.r
        for rows, chunk, ratios in self.chunks():
            difference, weights, products = self._weigh(rows, chunk, ratios, lse, g)
            d_scores = products - weights * shift[rows][chunk.rows]
            spread[rows].index_add_(0, chunk.rows, d_scores[:, None] * difference)
            total[rows].index_add_(0, chunk.rows, d_scores)
            weight[rows].index_add_(0, chunk.rows, weights)
            e64, g64 = self.e[rows].double()[chunk.rows], g[rows].double()[chunk.rows]
            grad = weights[:, None] * g64 + d_scores[:, None] * (r * e64 - r * r * difference)
            into.index_add_(0, chunk.columns, grad.to(into.dtype))
        return Cotangent(spread, total, weight)


# --- one partner a row ---


def _partner_score(e: Tensor, references: Tensor, partners: Tensor, r: float) -> tuple[Tensor, Tensor]:
    difference = partners.double() - references.double()
    return difference, r * (e.double() * difference).sum(1) - 0.5 * r * r * difference.square().sum(1)


def partner_posterior(e: Tensor, references: Tensor, partners: Tensor, r: float) -> Posterior:
    """The field of two anchors a row: references [b, d] and partners [b, d]."""
    difference, score = _partner_score(e, references, partners, r)
    delta = score.sigmoid()[:, None] * difference
    lse = torch.logaddexp(score, torch.zeros_like(score))
    return Posterior(delta.to(e.dtype), Sums(lse, lse))


def partner_vjp(
    e: Tensor, references: Tensor, partners: Tensor, r: float, grad_delta: Tensor, grad_lse: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Cotangents of e, references and partners, [b, d] each, for those of delta [b, d] and lse [b]."""
    difference, score = _partner_score(e, references, partners, r)
    g, weight = grad_delta.double(), score.sigmoid()
    d_score = (g * difference).sum(1) * (-score).sigmoid()
    if grad_lse is not None:
        d_score = d_score + grad_lse
    d_score = weight * d_score
    grad_e = r * d_score[:, None] * difference
    grad_partners = weight[:, None] * g + d_score[:, None] * (r * e.double() - r * r * difference)
    grad_partners = grad_partners.to(e.dtype)
    return grad_e.to(e.dtype), -grad_partners, grad_partners
