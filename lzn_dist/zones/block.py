"""Some of the anchors, and what they add to the field: matrix products in tiles (see `lzn_dist.zones.field`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from lzn_dist.zones.pairs import Pairs
from lzn_dist.zones.partial import Cotangent, Moments, Partial

# Elements of one tile of scores, on a CPU and on a GPU: the only memory that grows with rows times anchors. A GPU waits
# for launches where tiles are small (tests/benchmarks/gpu.py); 2²⁴ are 128 MB of float64 scores.
TILE_ELEMENTS = 1 << 20


GPU_TILE_ELEMENTS = 1 << 24
# Up to this r² ‖a − centre‖² float32 has the digits for scores: latents change by 4e-7, the loss by 1.5e-7, gradients
# by 1.5e-4 of themselves.
FLOAT32_SCORES = 100.0
EXP_FLOOR = -60.0  # exp of it is 9e-27; times any number of anchors far under float32's rounding unit


def tile_elements(device: torch.device) -> int:
    """Elements of a tile on this device."""
    return GPU_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


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

    @cached_property
    def widest(self) -> float:
        """The largest ‖a_j − centre‖²."""
        return 2.0 * float(self.half_norms.max()) if len(self) else 0.0

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
        """Queries q [b, d], scores [b, m] with −inf at the reference, and the reference's score [b] (float64).

        Scores of float32 anchors are float64, unless they are so small that float32 has the digits (`FLOAT32_SCORES`).
        """
        single = self.raw.dtype == torch.float32 and r * r * self.widest <= FLOAT32_SCORES
        own64 = own.double()
        query = torch.add(e.double() * r, own64, alpha=r * r)
        bias = self.half_norms * (-r * r)
        offset = (query * own64).sum(1) - (0.5 * r * r) * own64.square().sum(1)
        if self.log_weights is not None:
            bias = bias + self.log_weights
            offset = offset + self.log_weights[index - self.start]
        if single:
            scores = torch.addmm(bias.float(), query.float(), self.anchors.T)
        else:
            scores = torch.addmm(bias, query, self.anchors64.T)
        self._at_references(scores, index, -math.inf)
        return query, scores, offset

    def _weights(self, logarithms: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """exp [b, m] in the anchors' dtype, 0 at the reference."""
        logarithms = logarithms.to(dtype)
        if dtype != torch.float32 or self.log_weights is not None:  # an anchor of weight 0 has none, exactly
            return logarithms.exp_()
        # on a CPU exp costs ten times as much where its result underflows; below this nothing is seen in a sum
        weights = logarithms.clamp_(min=EXP_FLOOR).exp_()
        self._at_references(weights, index, 0.0)
        return weights

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
            weights = self._weights(torch.sub(scores, highest[:, None].to(scores.dtype)), index[rows], e.dtype)
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
        weights = self._weights(scores.sub_((lse + offset)[:, None].to(scores.dtype)), index, e.dtype)
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
