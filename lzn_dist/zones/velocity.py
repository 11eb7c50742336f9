"""The flow's field over anchors: posterior mean and log-sum-exp, and their vector-Jacobian product.

With anchors a_j, log-weights β_j and x at noise level σ (arXiv 2509.15591, equations of section 2):

    w_j = softmax_j( β_j − ½ ‖(x − (1−σ) a_j)/σ‖² ),   A = Σ_j w_j a_j,   dx/dσ = (x − A)/σ

**Everything here is relative to a reference anchor a_o of each row** (the sample's own, or its target). Write
x = (1−σ) a_o + σ e and r = (1−σ)/σ. Then, exactly,

    s_j = β_j − β_o + r e·(a_j − a_o) − ½ r² ‖a_j − a_o‖²      (logit relative to the reference, s_o = 0)
    Δ   = A − a_o = Σ_{j≠o} w_j (a_j − a_o)
    de/dr = Δ

so that a point of its own anchor's zone does not move at all (Δ = 0: no rounding is amplified by 1/σ, nothing has
to cancel), and Euler's method in σ on x is Euler's method in r on e. The scores are one matrix product,
s_j = q·a_j − ½ r² ‖a_j‖² + const with q = r e + r² a_o: softmax attention whose keys and values are the anchors.

Scores and log-sum-exps are float64 whatever the dtype (they are differences of numbers of size ‖q‖‖a‖); weights
and all other products are in the anchors' dtype. Measured against float32 scores: 10⁻⁶ instead of 10⁻² in the loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

# Elements of one tile of scores: the only memory that grows with rows times anchors.
TILE_ELEMENTS = 1 << 18


def posterior_mean(
    x: Tensor, sigma: float, anchors: Tensor, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain twin: log-weights log w [b, n] and posterior mean A [b, d] at x [b, d], from the definition."""
    logits = -0.5 * ((x[:, None, :] - (1 - sigma) * anchors[None]) / sigma).square().sum(-1)
    if log_weights is not None:
        logits = logits + log_weights
    log_w = torch.log_softmax(logits, dim=1)
    return log_w, log_w.exp() @ anchors


@dataclass
class Posterior:
    """The field at one r. delta [b, d]: A − a_o. lse [b], float64: log Σ_j exp(s_j), that is −log w_o."""

    delta: Tensor
    lse: Tensor
    settled: Tensor | None = None  # bool [b]: one anchor holds all weight, now and at every larger r
    partner: Tensor | None = None  # int64 [b]: the heaviest anchor besides the reference


@dataclass
class Pairs:
    """The (row, anchor) pairs that carry weight where almost none do. rows is sorted."""

    rows: Tensor  # int64 [p]
    columns: Tensor  # int64 [p]


class AnchorGradient:
    """Accumulates the cotangents of anchors [n, d] and of the rows' reference anchors [b, d]."""

    def __init__(self, anchors: Tensor, references: Tensor) -> None:
        self.anchors = torch.zeros_like(anchors)
        self.references = torch.zeros_like(references)
        # Σ r² dS over rows: multiplies −a_j once, at the end, instead of at every step
        self.radial = anchors.new_zeros(len(anchors))


class AnchorField:
    """The field of one set of anchors [n, d] (float32 or float64), log_weights [n] or None for equal weights."""

    def __init__(self, anchors: Tensor, log_weights: Tensor | None = None) -> None:
        self.raw = anchors
        # the field is invariant to a common shift; without it, clustered anchors would lose digits to their mean
        self.centre = anchors.mean(0)
        self.anchors = anchors - self.centre
        self.anchors64 = self.anchors.double()
        self.half_norms = 0.5 * self.anchors64.square().sum(1)
        self.log_weights = None if log_weights is None else log_weights.double()
        # Weights below exp(-threshold) are dropped; the slack over the rounding unit covers their amplification.
        self.threshold = (46.0 if anchors.dtype == torch.float64 else 25.0) + math.log(len(anchors))

    def tiles(self, rows: int) -> Iterator[slice]:
        height = max(1, TILE_ELEMENTS // len(self.anchors))
        return (slice(start, min(start + height, rows)) for start in range(0, rows, height))

    def _scores(self, e: Tensor, own: Tensor, index: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries q [b, d], scores [b, n] with −inf at the reference, and the reference's score [b] (float64)."""
        own64 = own.double()
        query = torch.add(e.double() * r, own64, alpha=r * r)
        bias = self.half_norms * (-r * r)
        offset = (query * own64).sum(1) - (0.5 * r * r) * own64.square().sum(1)
        if self.log_weights is not None:
            bias = bias + self.log_weights
            offset = offset + self.log_weights[index]
        scores = torch.addmm(bias, query, self.anchors64.T)
        scores.scatter_(1, index[:, None], -math.inf)
        return query, scores, offset

    def posterior(self, e: Tensor, own: Tensor, index: Tensor, r: float, *, settle: bool = False) -> Posterior:
        """The field at e [b, d] relative to own [b, d] (centred), which is anchor index [b]. Two products a row."""
        delta = torch.empty_like(e)
        lse = e.new_empty(len(e), dtype=torch.float64)
        settled = torch.empty(len(e), dtype=torch.bool, device=e.device) if settle else None
        partner = torch.empty_like(index) if settle else None
        for rows in self.tiles(len(e)):
            _, scores, offset = self._scores(e[rows], own[rows], index[rows], r)
            if settled is not None and partner is not None:
                top, partner[rows] = scores.max(1)
            else:
                top = scores.amax(1)
            # relative to the larger of the reference's score (0 after the offset) and the others' largest
            peak = torch.maximum(top, offset)
            weights = torch.sub(scores, peak[:, None]).to(e.dtype).exp_()
            others = weights.sum(1)
            excess = peak - offset
            # log1p keeps −log w_o accurate far below the rounding unit, where everything sits on the reference
            log_total = torch.log1p(torch.expm1(-excess) + others.double())
            lse[rows] = excess + log_total
            mean = torch.addmm(own[rows] * others[:, None], weights, self.anchors, beta=-1)
            delta[rows] = mean * (-log_total).exp().to(e.dtype)[:, None]
            if settled is not None:
                on_reference = (excess == 0) & (others <= math.exp(-self.threshold))
                unit = torch.finfo(e.dtype).eps
                on_partner = (others <= 1 + unit) & ((-excess).exp() <= unit)
                settled[rows] = on_reference | on_partner
        return Posterior(delta, lse, settled, partner)

    def vjp(
        self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor,
        grad_delta: Tensor, grad_lse: Tensor | None, into: AnchorGradient, rows_of: Tensor | slice,
    ) -> Tensor:  # fmt: skip
        """Cotangent of e [b, d] for those of delta [b, d] and lse [b]; the anchors' are added to `into`.

        Five products a row: the scores are computed again and the weights taken from the stored log-sum-exps.
        """
        grad_e = torch.empty_like(e)
        grad_own = torch.empty_like(e)
        for rows in self.tiles(len(e)):
            query, scores, offset = self._scores(e[rows], own[rows], index[rows], r)
            weights = scores.sub_((lse[rows] + offset)[:, None]).to(e.dtype).exp_()
            g = grad_delta[rows]
            # dS = w (g·(a_j − a_o) − Σ_k w_k g·(a_k − a_o) + g_lse): the sum is taken from the same products and
            # divided by the weights' own total (1 but for the stored log-sum-exp's rounding), so that it cancels
            # where one anchor holds all weight; what did not would be multiplied by r ‖e‖
            row_weight = weights.sum(1)
            total = row_weight + (-lse[rows]).exp().to(e.dtype)
            products = torch.addmm((g * own[rows]).sum(1, keepdim=True), g, self.anchors.T, beta=-1)
            d_scores = products.mul_(weights)
            shift = d_scores.sum(1) / total
            if grad_lse is not None:
                shift = shift - grad_lse[rows].to(e.dtype)
            d_scores.addcmul_(weights, shift[:, None], value=-1)
            row_sum = d_scores.sum(1, keepdim=True)
            spread = torch.addmm(own[rows] * row_sum, d_scores, self.anchors, beta=-1)  # Σ dS (a_j − a_o)
            grad_e[rows] = r * spread
            into.anchors.addmm_(weights.T, g).addmm_(d_scores.T, query.to(e.dtype))
            into.radial.add_(d_scores.sum(0), alpha=r * r)
            grad_own[rows] = r * r * spread - r * row_sum * e[rows] - row_weight[:, None] * g
        into.references[rows_of] += grad_own
        return grad_e

    def finish(self, into: AnchorGradient) -> None:
        """Apply what `vjp` deferred; call once after the last step."""
        into.anchors.addcmul_(into.radial[:, None], self.anchors, value=-1)

    def first_active(self, e: Tensor, own: Tensor, index: Tensor, r_first: float) -> tuple[Tensor, Pairs]:
        """From which r downwards each row, starting at e, feels another anchor than its own; pairs active at r_first.

        While Δ = 0, e is constant and s_j(r) = r u_j − ½ r² ρ_j² with u_j = e·(a_j − a_o), ρ_j = ‖a_j − a_o‖: it
        stays under −threshold for all r above the larger root. Equal weights only. Returns r [b] (float64).
        """
        active = e.new_empty(len(e), dtype=torch.float64)
        found_rows, found_columns = [], []
        for rows in self.tiles(len(e)):
            e64, own64 = e[rows].double(), own[rows].double()
            u = torch.addmm((e64 * own64).sum(1, keepdim=True), e64, self.anchors64.T, beta=-1)
            square = torch.addmm(self.half_norms, own64, self.anchors64.T, beta=2, alpha=-2)
            square = square.add_(own64.square().sum(1, keepdim=True)).clamp_(min=1e-300)
            # (u + √(u² + 2ρ²T))/ρ², in the form that stays finite and certain where ρ and u round to nothing
            root = torch.addcmul(square * (2 * self.threshold), u, u).sqrt_().sub_(u).reciprocal_()
            root.mul_(2 * self.threshold)
            root.scatter_(1, index[rows][:, None], 0.0)
            active[rows] = root.amax(1)
            if bool((active[rows] > 0.99 * r_first).any()):
                # cancellation blurs tiny distances; a factor two covers it and the pairs are exact anyway
                row, column = (root > 0.5 * r_first).nonzero(as_tuple=True)
                found_rows.append(row + rows.start)
                found_columns.append(column)
        empty = index.new_empty(0)
        return active, Pairs(torch.cat([empty, *found_rows]), torch.cat([empty, *found_columns]))

    # --- the same field where only a few pairs carry weight: direct differences, float64, no product over anchors ---

    def _pair_chunks(self, pairs: Pairs, dim: int) -> Iterator[tuple[slice, Pairs]]:
        """Whole rows at a time, about a tile of differences each; rows renumbered from the slice's start."""
        if not len(pairs.rows):
            return
        count = int(pairs.rows[-1]) + 1
        ends = torch.bincount(pairs.rows, minlength=count).cumsum(0).tolist()
        limit = max(1, TILE_ELEMENTS // dim)
        start = first = 0
        for row in range(count):
            if row + 1 == count or ends[row + 1] - first > limit:
                chunk = slice(first, ends[row])
                yield slice(start, row + 1), Pairs(pairs.rows[chunk] - start, pairs.columns[chunk])
                start, first = row + 1, ends[row]

    def _pair_scores(self, e: Tensor, own: Tensor, pairs: Pairs, r: float) -> tuple[Tensor, Tensor, Tensor]:
        difference = self.raw[pairs.columns].double() - own[pairs.rows].double()
        e64 = e.double()
        scores = r * (e64[pairs.rows] * difference).sum(1) - 0.5 * r * r * difference.square().sum(1)
        return e64, difference, scores

    def pair_posterior(self, e: Tensor, own: Tensor, pairs: Pairs, r: float) -> Posterior:
        """As `posterior`, when every other weight is known to vanish; own [b, d] is not centred here."""
        delta, lse = torch.zeros_like(e), e.new_zeros(len(e), dtype=torch.float64)
        for rows, chunk in self._pair_chunks(pairs, e.shape[1]):
            e64, difference, scores = self._pair_scores(e[rows], own[rows], chunk, r)
            peak = scores.new_zeros(len(e64)).scatter_reduce_(0, chunk.rows, scores, "amax")
            weights = (scores - peak[chunk.rows]).exp()
            others = torch.zeros_like(peak).index_add_(0, chunk.rows, weights)
            log_total = torch.log1p(torch.expm1(-peak) + others)
            lse[rows] = peak + log_total
            weights = weights * (-log_total[chunk.rows]).exp()
            delta[rows] = torch.zeros_like(e64).index_add_(0, chunk.rows, weights[:, None] * difference).to(e.dtype)
        return Posterior(delta, lse)

    def pair_vjp(
        self, e: Tensor, own: Tensor, pairs: Pairs, r: float, lse: Tensor,
        grad_delta: Tensor, grad_lse: Tensor | None, into: AnchorGradient, rows_of: Tensor | slice,
    ) -> Tensor:  # fmt: skip
        """As `vjp`, for `pair_posterior`."""
        grad_e, grad_own = torch.zeros_like(e), torch.zeros_like(e)
        for rows, chunk in self._pair_chunks(pairs, e.shape[1]):
            e64, difference, scores = self._pair_scores(e[rows], own[rows], chunk, r)
            weights = (scores - lse[rows][chunk.rows]).exp()
            g = grad_delta[rows].double()[chunk.rows]
            products = (g * difference).sum(1) * weights
            total = (-lse[rows]).exp().index_add_(0, chunk.rows, weights)
            shift = scores.new_zeros(len(e64)).index_add_(0, chunk.rows, products) / total
            if grad_lse is not None:
                shift = shift - grad_lse[rows]
            d_scores = products - weights * shift[chunk.rows]
            along = torch.zeros_like(e64).index_add_(0, chunk.rows, r * d_scores[:, None] * difference)
            grad_e[rows] = along.to(e.dtype)
            grad_difference = weights[:, None] * g + d_scores[:, None] * (r * e64[chunk.rows] - r * r * difference)
            into.anchors.index_add_(0, chunk.columns, grad_difference.to(e.dtype))
            grad_own[rows] = torch.zeros_like(e64).index_add_(0, chunk.rows, grad_difference).neg_().to(e.dtype)
        into.references[rows_of] += grad_own
        return grad_e
