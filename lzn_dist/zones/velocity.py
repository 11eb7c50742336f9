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
from collections.abc import Callable, Iterator
from functools import cached_property
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lzn_dist.zones.pairs import Pairs, PairScores
from lzn_dist.zones.partial import Cotangent, Moments, Partial, Posterior

# Elements of one tile of scores, on a CPU and on a GPU: the only memory that grows with rows times anchors. A GPU waits
# for launches where tiles are small (tests/benchmarks/gpu.py); 2²⁴ are 128 MB of float64 scores.
TILE_ELEMENTS = 1 << 18
GPU_TILE_ELEMENTS = 1 << 24


def tile_elements(device: torch.device) -> int:
    """Elements of a tile on this device."""
    return GPU_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


def posterior_mean(
    x: Tensor, sigma: float, anchors: Tensor, log_weights: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Plain twin: log-weights log w [b, n] and posterior mean A [b, d] at x [b, d], from the definition."""
    logits = -0.5 * ((x[:, None, :] - (1 - sigma) * anchors[None]) / sigma).square().sum(-1)
    if log_weights is not None:
        logits = logits + log_weights.to(logits.dtype)
    log_w = torch.log_softmax(logits, dim=1)
    return log_w, log_w.exp() @ anchors


class AnchorGradient:
    """Accumulates the cotangents of anchors [m, d]."""

    def __init__(self, anchors: Tensor) -> None:
        self.anchors = torch.zeros_like(anchors)
        # Σ r² dS over rows: multiplies −a_j once, at the end, instead of at every step
        self.radial = anchors.new_zeros(len(anchors))


class Block:
    """Some of the anchors, raw [m, d]: those numbered start..start+m−1. whole: there are no others.

    Its methods are what these anchors add to the field of rows e [b, d] with references own [b, d] (centred), which
    are the anchors numbered index [b], in this block or not. Nothing larger than a tile of rows × m is made.
    """

    def __init__(
        self, raw: Tensor, centre: Tensor, start: int = 0, log_weights: Tensor | None = None, *, whole: bool = True
    ) -> None:
        self.raw, self.centre, self.start, self.whole = raw, centre, start, whole
        self.log_weights = None if log_weights is None else log_weights.double()

    def __len__(self) -> int:
        return len(self.raw)

    @cached_property
    def anchors(self) -> Tensor:
        return self.raw - self.centre

    @cached_property
    def anchors64(self) -> Tensor:
        return self.anchors.double()

    @cached_property
    def half_norms(self) -> Tensor:
        return 0.5 * self.anchors64.square().sum(1)

    def tiles(self, rows: int) -> Iterator[slice]:
        height = max(1, tile_elements(self.raw.device) // len(self))
        return (slice(start, min(start + height, rows)) for start in range(0, rows, height))

    def _at_references(self, matrix: Tensor, index: Tensor, value: float) -> None:
        """Write value into the columns of the references that stand in this block. matrix: [b, m]."""
        if self.whole:
            matrix.scatter_(1, index[:, None], value)
            return
        column = index - self.start
        inside = (column >= 0) & (column < len(self))
        column = column.clamp(0, len(self) - 1)[:, None]
        matrix.scatter_(1, column, matrix.gather(1, column).masked_fill_(inside[:, None], value))

    def _scores(self, e: Tensor, own: Tensor, index: Tensor, r: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries q [b, d], scores [b, m] with −inf at the reference, and the reference's score [b] (float64)."""
        own64 = own.double()
        query = torch.add(e.double() * r, own64, alpha=r * r)
        bias = self.half_norms * (-r * r)
        offset = (query * own64).sum(1) - (0.5 * r * r) * own64.square().sum(1)
        if self.log_weights is not None:
            bias = bias + self.log_weights
            offset = offset + self.log_weights[index - self.start]
        scores = torch.addmm(bias, query, self.anchors64.T)
        self._at_references(scores, index, -math.inf)
        return query, scores, offset

    def part(self, e: Tensor, own: Tensor, index: Tensor, r: float, *, settle: bool) -> Partial:
        """Two products a row. settle: also the heaviest anchor of each row."""
        count = len(e)
        offset, peak, top = (e.new_empty(count, dtype=torch.float64) for _ in range(3))
        others, moment = e.new_empty(count), torch.empty_like(e)
        column = torch.empty_like(index)
        for rows in self.tiles(count):
            _, scores, offset[rows] = self._scores(e[rows], own[rows], index[rows], r)
            if settle:
                top[rows], column[rows] = scores.max(1)
            else:
                top[rows] = scores.amax(1)
            # relative to the larger of the reference's score (0 after the offset) and the others' largest
            highest = torch.maximum(top[rows], offset[rows])
            weights = torch.sub(scores, highest[:, None]).to(e.dtype).exp_()
            peak[rows], others[rows] = highest, weights.sum(1)
            moment[rows] = torch.addmm(own[rows] * others[rows, None], weights, self.anchors, beta=-1)
        if not settle:
            return Partial(offset, peak, others, moment)
        return Partial(offset, peak, others, moment, top, column + self.start, self.raw[column])

    def _weigh(
        self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor, g: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries [b, d], w_j and w_j g·(a_j − a_o) [b, m]; the same digits whenever it is asked."""
        query, scores, offset = self._scores(e, own, index, r)
        weights = scores.sub_((lse + offset)[:, None]).to(e.dtype).exp_()
        products = torch.addmm((g * own).sum(1, keepdim=True), g, self.anchors.T, beta=-1)
        return query, weights, products.mul_(weights)

    def moments(self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor, g: Tensor) -> Moments:
        """For `pull_back`, where anchors come in several blocks: two products a row."""
        weight, pull = e.new_empty(len(e)), e.new_empty(len(e))
        for rows in self.tiles(len(e)):
            _, weights, products = self._weigh(e[rows], own[rows], index[rows], r, lse[rows], g[rows])
            weight[rows], pull[rows] = weights.sum(1), products.sum(1)
        return Moments(weight, pull)

    def pull_back(
        self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor, g: Tensor, grad_lse: Tensor | None,
        shift: Tensor | None, into: AnchorGradient,
    ) -> Cotangent:  # fmt: skip
        """Five products a row: scores again, weights from the log-sum-exps lse [b]; the anchors' part goes to `into`.

        g [b, d], grad_lse [b]: cotangents of Δ and lse. shift [b]: `Moments.shift` over all blocks; None: this is all.
        """
        total, weight, spread = e.new_empty(len(e)), e.new_empty(len(e)), torch.empty_like(e)
        for rows in self.tiles(len(e)):
            query, weights, d_scores = self._weigh(e[rows], own[rows], index[rows], r, lse[rows], g[rows])
            weight[rows] = weights.sum(1)
            if shift is None:
                moments = Moments(weight[rows], d_scores.sum(1))
                taken = moments.shift(lse[rows], None if grad_lse is None else grad_lse[rows])
            else:
                taken = shift[rows]
            # dS = w (g·(a_j − a_o) − Σ_k w_k g·(a_k − a_o) + g_lse)
            d_scores.addcmul_(weights, taken[:, None], value=-1)
            total[rows] = d_scores.sum(1)
            spread[rows] = torch.addmm(own[rows] * total[rows, None], d_scores, self.anchors, beta=-1)
            into.anchors.addmm_(weights.T, g[rows]).addmm_(d_scores.T, query.to(e.dtype))
            into.radial.add_(d_scores.sum(0), alpha=r * r)
        return Cotangent(spread, total, weight)

    def _roots(self, e: Tensor, own: Tensor, index: Tensor, threshold: float) -> Tensor:
        """r [b, m] above which each anchor's weight stays under exp(−threshold) while a row stays at e (float64).

        While Δ = 0, e is constant and s_j(r) = r u_j − ½ r² ρ_j² with u_j = e·(a_j − a_o), ρ_j = ‖a_j − a_o‖: it
        stays under −threshold for all r above the larger root. Equal weights only.
        """
        e64, own64 = e.double(), own.double()
        u = torch.addmm((e64 * own64).sum(1, keepdim=True), e64, self.anchors64.T, beta=-1)
        square = torch.addmm(self.half_norms, own64, self.anchors64.T, beta=2, alpha=-2)
        square = square.add_(own64.square().sum(1, keepdim=True)).clamp_(min=1e-300)
        # (u + √(u² + 2ρ²T))/ρ², in the form that stays finite and certain where ρ and u round to nothing
        root = torch.addcmul(square * (2 * threshold), u, u).sqrt_().sub_(u).reciprocal_().mul_(2 * threshold)
        self._at_references(root, index, 0.0)
        return root

    def reach(self, e: Tensor, own: Tensor, index: Tensor, threshold: float) -> Tensor:
        """[b] float64: from which r downwards each row, starting at e, feels another of these anchors."""
        result = e.new_empty(len(e), dtype=torch.float64)
        for rows in self.tiles(len(e)):
            result[rows] = self._roots(e[rows], own[rows], index[rows], threshold).amax(1)
        return result

    def near(self, e: Tensor, own: Tensor, index: Tensor, threshold: float, r: float) -> Pairs:
        """The pairs that may carry weight at r; columns count from this block's start."""
        rows_found, columns_found = [index.new_empty(0)], [index.new_empty(0)]
        for rows in self.tiles(len(e)):
            row, column = (self._roots(e[rows], own[rows], index[rows], threshold) > r).nonzero(as_tuple=True)
            rows_found.append(row + rows.start)
            columns_found.append(column)
        return Pairs(torch.cat(rows_found), torch.cat(columns_found))


class Field(Protocol):
    """The field as a trajectory sees it. Anchors are numbered 0..count−1; this process holds `held` from `start` on.

    e, own, references, grad_delta: [b, d]; own = references − centre; index: int64 [b], the references' numbers;
    lse, grad_lse: float64 [b]. Where anchors are spread over processes, every method but the last properties is
    collective: all processes call it together, some with no rows, and `wanted` tells them when.
    """

    count: int
    start: int
    held: int
    centre: Tensor
    weighted: bool  # log-weights are not equal

    def wanted(self, here: list[bool]) -> list[bool]:
        """Which of these are wanted by any process."""

    def posterior(self, e: Tensor, own: Tensor, index: Tensor, r: float, *, settle: bool = False) -> Posterior:
        """The field at e; settle: with `settled`, `partner` and `heaviest`."""

    def vjp(
        self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor,
        grad_delta: Tensor, grad_lse: Tensor | None, into: AnchorGradient,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Cotangents of e and of the references for those of delta and lse; the anchors' are added to `into`."""

    def reach(self, e: Tensor, own: Tensor, index: Tensor) -> Tensor:
        """[b] float64: from which r downwards each row, starting at e, feels another anchor than its own."""

    def near_posterior(self, e: Tensor, references: Tensor, index: Tensor, r: float) -> Posterior:
        """As `posterior`, of rows that have not moved yet, at an r where products have no accurate digits."""

    def near_vjp(
        self, e: Tensor, references: Tensor, index: Tensor, r: float, lse: Tensor, grad_delta: Tensor,
        into: AnchorGradient,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """As `vjp`, for `near_posterior`."""

    def gradient(self) -> AnchorGradient:
        """Of the anchors that this process holds, at zero."""

    def deliver(self, numbers: Tensor, cotangents: Tensor, into: AnchorGradient) -> None:
        """Add cotangents [p, d] of the anchors with these numbers [p]."""

    def finish(self, into: AnchorGradient) -> None:
        """Apply what `vjp` deferred; once, after everything else. Not collective."""


FieldFactory = Callable[[Tensor, Tensor | None], Field]
Part = TypeVar("Part", Partial, Moments, Cotangent)


class AnchorField:
    """The field of one set of anchors [n, d] (float32 or float64), log_weights [n] or None for equal weights.

    Here they are one block, on this process. A subclass may let them come in several: it gives this process' block,
    the centre, the start and the count of all, and overrides `blocks`, `gradient_blocks` and `wanted`.
    """

    def __init__(
        self, anchors: Tensor, log_weights: Tensor | None = None, *,
        centre: Tensor | None = None, start: int = 0, count: int | None = None,
    ) -> None:  # fmt: skip
        self.start, self.held = start, len(anchors)
        self.count = self.held if count is None else count
        self.weighted = log_weights is not None
        # the field is invariant to a common shift; without it, clustered anchors would lose digits to their mean
        self.centre = anchors.mean(0) if centre is None else centre
        self.block = Block(anchors, self.centre, start, log_weights, whole=count is None)
        # Weights below exp(-threshold) are dropped; the slack over the rounding unit covers their amplification.
        self.threshold = (46.0 if anchors.dtype == torch.float64 else 25.0) + math.log(max(self.count, 1))

    def wanted(self, here: list[bool]) -> list[bool]:
        return here

    def blocks(self) -> Iterator[Block]:
        """All anchors, block by block; each is done with when the next is asked for."""
        yield self.block

    def gradient_blocks(self, into: AnchorGradient) -> Iterator[tuple[Block, AnchorGradient]]:
        """As `blocks`, each with where its gradient is to be added; what all processes add ends in their `into`."""
        yield self.block, into

    def posterior(self, e: Tensor, own: Tensor, index: Tensor, r: float, *, settle: bool = False) -> Posterior:
        """The field at e [b, d] relative to own [b, d] (centred), which is anchor index [b]. Two products a row."""
        parts = (block.part(e, own, index, r, settle=settle) for block in self.blocks() if len(block))
        return _merged(parts).conclude(self.threshold)

    def vjp(
        self, e: Tensor, own: Tensor, index: Tensor, r: float, lse: Tensor,
        grad_delta: Tensor, grad_lse: Tensor | None, into: AnchorGradient,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Cotangents of e and own [b, d] for those of delta [b, d] and lse [b]; the anchors' are added to `into`.

        One block: five products a row. Several: two more, as dS needs a sum over all anchors before the first one's.
        """
        shift = None
        if not self.block.whole:
            moments = (block.moments(e, own, index, r, lse, grad_delta) for block in self.blocks() if len(block))
            shift = _merged(moments).shift(lse, grad_lse)
        parts = (
            block.pull_back(e, own, index, r, lse, grad_delta, grad_lse, shift, gradient)
            for block, gradient in self.gradient_blocks(into)
            if len(block)
        )
        return _merged(parts).conclude(e, grad_delta, r)

    def reach(self, e: Tensor, own: Tensor, index: Tensor) -> Tensor:
        farthest = e.new_zeros(len(e), dtype=torch.float64)
        for block in self.blocks():
            if len(block):
                farthest = torch.maximum(farthest, block.reach(e, own, index, self.threshold))
        return farthest

    def _near(self, block: Block, e: Tensor, references: Tensor, index: Tensor, r: float) -> PairScores:
        # cancellation blurs the roots of tiny distances; a factor two covers it and the pairs are exact anyway
        pairs = block.near(e, references - self.centre, index, self.threshold, 0.5 * r)
        return PairScores(block.raw, e, references, pairs, r, tile_elements(e.device))

    def near_posterior(self, e: Tensor, references: Tensor, index: Tensor, r: float) -> Posterior:
        parts = (self._near(block, e, references, index, r).part() for block in self.blocks() if len(block))
        found = _merged(parts).conclude(self.threshold)
        return Posterior(found.delta.to(e.dtype), found.lse)

    def near_vjp(
        self, e: Tensor, references: Tensor, index: Tensor, r: float, lse: Tensor, grad_delta: Tensor,
        into: AnchorGradient,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        g = grad_delta.double()
        moments = (self._near(block, e, references, index, r).moments(lse, g) for block in self.blocks() if len(block))
        shift = _merged(moments).shift(lse, None)
        parts = (
            self._near(block, e, references, index, r).pull_back(lse, g, shift, gradient.anchors)
            for block, gradient in self.gradient_blocks(into)
            if len(block)
        )
        return _merged(parts).conclude(e, grad_delta, r)

    def gradient(self) -> AnchorGradient:
        return AnchorGradient(self.block.raw)

    def deliver(self, numbers: Tensor, cotangents: Tensor, into: AnchorGradient) -> None:
        for block, gradient in self.gradient_blocks(into):
            columns = numbers - block.start
            here = _rows((columns >= 0) & (columns < len(block)))
            gradient.anchors.index_add_(0, columns[here], cotangents[here])

    def finish(self, into: AnchorGradient) -> None:
        into.anchors.addcmul_(into.radial[:, None], self.block.anchors, value=-1)


def _rows(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _merged(parts: Iterator[Part]) -> Part:
    # one after the other: the next block may still be on its way
    result = next(parts)
    for part in parts:
        result = result.merge(part)
    return result
