"""Some of the anchors, and what they add to the field: matrix products in tiles (see `lzn_dist.zones.field`)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from lzn_dist.zones.pairs import Pairs
from lzn_dist.zones.partial import Cotangent, GroupSums, Moments, Partial, Sums, joined

# Elements of one tile of scores, on a CPU and on a GPU: the only memory that grows with rows times anchors. A GPU waits
# for launches where tiles are small (tests/benchmarks/gpu.py); 2²⁴ are 128 MB of float64 scores.
TILE_ELEMENTS = 1 << 20
GPU_TILE_ELEMENTS = 1 << 24
# Of fewer rows a product waits for the anchors, which come from memory once a tile: among 32,768 and 65,536 of them
# such tiles are 1.3 and 1.7 times faster. They grow beyond the elements above for it, but to a GPU's.
TILE_ROWS = 128
# Up to this r² ‖a − centre‖² float32 has the digits for scores: latents change by 4e-7, the loss by 1.5e-7, gradients
# by 1.5e-4 of themselves.
FLOAT32_SCORES = 100.0
KERNEL_DIM = 1024  # the widest anchors that kernels hold (`lzn_dist.zones.kernels`)
EXP_FLOOR = -60.0  # exp of it is 9e-27; times any number of anchors far under float32's rounding unit


def tile_elements(device: torch.device) -> int:
    """Elements of a tile on this device."""
    return GPU_TILE_ELEMENTS if device.type == "cuda" else TILE_ELEMENTS


@dataclass
class Rows:
    """Points of the flow, each with its reference anchor.

    e [b, d]. own [b, d]: the references, centred. index: int64 [b], their numbers. log_weights: float64 [b], theirs
    (finite); None where anchors have equal ones. groups: int64 [b], the group of anchors whose weight is asked for;
    None: the reference's alone. inside: bool [b], whether the reference is of that group.
    """

    e: Tensor
    own: Tensor
    index: Tensor
    log_weights: Tensor | None = None
    groups: Tensor | None = None
    inside: Tensor | None = None
    of_own: dict[str, Tensor] = field(default_factory=dict, repr=False)  # what depends on `own` alone, once it is known

    def __len__(self) -> int:
        return len(self.e)

    def __getitem__(self, at: slice | Tensor) -> Rows:
        if isinstance(at, slice) and at == slice(0, len(self)):
            return self
        given = (self.log_weights, self.groups, self.inside)
        log_weights, groups, inside = (None if value is None else value[at] for value in given)
        return Rows(self.e[at], self.own[at], self.index[at], log_weights, groups, inside)

    def at(self, e: Tensor) -> Rows:
        """The same rows elsewhere."""
        return Rows(e, self.own, self.index, self.log_weights, self.groups, self.inside, self.of_own)

    @property
    def own64(self) -> Tensor:
        if "own64" not in self.of_own:
            self.of_own["own64"] = self.own.double()
        return self.of_own["own64"]

    @property
    def half_squares(self) -> Tensor:
        """½ ‖own‖² [b], float64."""
        if "half_squares" not in self.of_own:
            self.of_own["half_squares"] = 0.5 * self.own64.square().sum(1)
        return self.of_own["half_squares"]


class AnchorGradient:
    """Accumulates the cotangents of anchors [m, d]."""

    def __init__(self, anchors: Tensor) -> None:
        self.anchors = torch.zeros_like(anchors)
        # Σ r² dS over rows: multiplies −a_j once, at the end, instead of at every step
        self.radial = anchors.new_zeros(len(anchors))


class Block:
    """Some of the anchors, raw [m, d]: those numbered start..start+m−1. whole: there are no others.

    log_weights [m] (−inf: absent) and groups int64 [m], or None. Its methods are what these anchors add to the field of
    rows, whose references stand in this block or not. Nothing larger than a tile of rows × m is made.
    """

    def __init__(
        self, raw: Tensor, centre: Tensor, start: int = 0, log_weights: Tensor | None = None,
        groups: Tensor | None = None, *, whole: bool = True,
    ) -> None:  # fmt: skip
        self.raw, self.centre, self.start, self.whole, self.groups = raw.contiguous(), centre, start, whole, groups
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

    @cached_property
    def present(self) -> Tensor | None:
        """[m]: 1 for anchors that are there, 0 for absent ones; None where all are."""
        return None if self.log_weights is None else (self.log_weights > -math.inf).to(self.raw.dtype)

    def tiles(self, rows: int) -> Iterator[slice]:
        height = max(1, tile_elements(self.raw.device) // len(self), min(TILE_ROWS, GPU_TILE_ELEMENTS // len(self)))
        return (slice(start, min(start + height, rows)) for start in range(0, max(1, rows), height))

    def _at_references(self, matrix: Tensor, index: Tensor, value: float) -> None:
        """Write value into the columns of the references that stand in this block. matrix: [b, m]."""
        if self.whole:
            matrix.scatter_(1, index[:, None], value)
            return
        column = index - self.start
        inside = (column >= 0) & (column < len(self))
        column = column.clamp(0, len(self) - 1)[:, None]
        matrix.scatter_(1, column, matrix.gather(1, column).masked_fill_(inside[:, None], value))

    def _in_group(self, rows: Rows) -> Tensor:
        """bool [b, m]: the anchors of each row's group."""
        assert self.groups is not None and rows.groups is not None
        return rows.groups[:, None] == self.groups

    def _queries(self, rows: Rows, r: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries q [b, d] and biases [m], float64, of which scores q·a_j + bias_j are made, and the references' own
        scores [b]."""
        query = torch.add(rows.e.double() * r, rows.own64, alpha=r * r)
        bias = self.half_norms * (-r * r)
        offset = (query * rows.own64).sum(1) - (r * r) * rows.half_squares
        if self.log_weights is not None and rows.log_weights is not None:
            bias = bias + self.log_weights
            offset = offset + rows.log_weights
        return query, bias, offset

    def _scores(self, rows: Rows, r: float) -> tuple[Tensor, Tensor, Tensor]:
        """Queries q [b, d], scores [b, m] with −inf at the reference, and the reference's score [b] (float64).

        Scores of float32 anchors are float64, unless they are so small that float32 has the digits (`FLOAT32_SCORES`).
        """
        # on a GPU, reading the widest would wait for it
        single = self.raw.dtype == torch.float32 and not self.raw.is_cuda and r * r * self.widest <= FLOAT32_SCORES
        query, bias, offset = self._queries(rows, r)
        if single:
            scores = torch.addmm(bias.float(), query.float(), self.anchors.T)
        else:
            scores = torch.addmm(bias, query, self.anchors64.T)
        self._at_references(scores, rows.index, -math.inf)
        return query, scores, offset

    def _weights(self, logarithms: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        """exp [b, m] in the anchors' dtype, 0 at the reference and at absent anchors."""
        logarithms = logarithms.to(dtype)
        if dtype != torch.float32:
            return logarithms.exp_()
        # on a CPU exp costs ten times as much where its result underflows; below this nothing is seen in a sum
        weights = logarithms.clamp_(min=EXP_FLOOR).exp_()
        self._at_references(weights, index, 0.0)
        return weights if self.present is None else weights.mul_(self.present)

    def part(self, rows: Rows, r: float, *, settle: bool) -> Partial:
        """Two products a row. settle: also the heaviest anchor of each row."""
        return joined([self._tile_part(rows[at], r, settle) for at in self.tiles(len(rows))])

    def _tile_part(self, rows: Rows, r: float, settle: bool) -> Partial:
        _, scores, offset = self._scores(rows, r)
        if settle:
            top, column = scores.max(1)
        else:
            top = scores.amax(1)
        top = top.double()
        # relative to the larger of the reference's score (0 after the offset) and the others' largest
        peak = torch.maximum(top, offset)
        given = scores.clone() if rows.groups is not None else scores
        weights = self._weights(given.sub_(peak[:, None].to(scores.dtype)), rows.index, rows.e.dtype)
        others = weights.sum(1)
        found = Partial(
            offset, peak, others, torch.addmm(rows.own * others[:, None], weights, self.anchors, beta=-1)
        )  # fmt: skip
        if rows.groups is not None:
            assert rows.inside is not None
            member = self._in_group(rows)
            outside = weights.masked_fill(member, 0.0).sum(1).double()
            scores.masked_fill_(~member, -math.inf)
            # its own peak: a group far below the others still has its digits
            highest = torch.maximum(scores.amax(1).double(), offset)
            weights = self._weights(scores.sub_(highest[:, None].to(scores.dtype)), rows.index, rows.e.dtype)
            found.group = GroupSums(rows.inside, highest, weights.mul_(member).sum(1).double(), outside)
        if settle:
            found.top, found.partner, found.heaviest = top, column + self.start, self.raw[column]
            if rows.groups is not None and self.groups is not None:
                found.partner_inside = self.groups[column] == rows.groups
        return found

    def _weigh(self, rows: Rows, r: float, lse: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Queries [b, d]; w_j, w_j g·(a_j − a_o) and scores less the row's log-sum-exp [b, m]; the same digits whenever
        it is asked."""
        query, scores, offset = self._scores(rows, r)
        logarithms = scores.sub_((lse + offset)[:, None].to(scores.dtype))
        weights = self._weights(logarithms.clone() if rows.groups is not None else logarithms, rows.index, g.dtype)
        products = torch.addmm((g * rows.own).sum(1, keepdim=True), g, self.anchors.T, beta=-1)
        return query, weights, products.mul_(weights), logarithms

    def moments(self, rows: Rows, r: float, lse: Tensor, g: Tensor) -> Moments:
        """For `pull_back`, where anchors come in several blocks: two products a row."""
        parts = []
        for at in self.tiles(len(g)):
            _, weights, products, _ = self._weigh(rows[at], r, lse[at], g[at])
            parts.append(Moments(weights.sum(1), products.sum(1)))
        return joined(parts)

    def pull_back(
        self, rows: Rows, r: float, posterior: Sums, g: Tensor, grad_target: Tensor | None,
        shift: Tensor | None, into: AnchorGradient,
    ) -> Cotangent:  # fmt: skip
        """Five products a row: scores again, weights from the log-sum-exps; the anchors' part goes to `into`.

        g [b, d], grad_target [b]: cotangents of Δ and of `Sums.target`. shift [b]: `Moments.shift` over all blocks;
        None: this is all.
        """
        parts = []
        for at in self.tiles(len(g)):
            tile, sums = rows[at], posterior[at]
            query, weights, d_scores, logarithms = self._weigh(tile, r, sums.lse, g[at])
            weight = weights.sum(1)
            of_target = None if grad_target is None else grad_target[at].to(g.dtype)
            taken = Moments(weight, d_scores.sum(1)).shift(sums.lse, of_target) if shift is None else shift[at]
            # dS = w (g·(a_j − a_o) − Σ_k w_k g·(a_k − a_o) + g_target), and in the group − g_target exp(s − lse_group)
            d_scores.addcmul_(weights, taken[:, None], value=-1)
            if of_target is not None and rows.groups is not None:
                # lse − lse_group is what `target` says; a weight within the group is at most 1
                inside = logarithms.add_(sums.target.clamp(max=1e30)[:, None].to(logarithms.dtype)).clamp_(max=0.0)
                inside = self._weights(inside, tile.index, g.dtype).mul_(self._in_group(tile))
                d_scores.addcmul_(inside, of_target[:, None], value=-1)
            total = d_scores.sum(1)
            spread = torch.addmm(tile.own * total[:, None], d_scores, self.anchors, beta=-1)
            parts.append(Cotangent(spread, total, weight))
            into.anchors.addmm_(weights.T, g[at]).addmm_(d_scores.T, query.to(g.dtype))
            into.radial.add_(d_scores.sum(0), alpha=r * r)
        return joined(parts)

    def _roots(self, rows: Rows, threshold: float) -> Tensor:
        """r [b, m] above which each anchor's weight stays under exp(−threshold) while a row stays at e (float64).

        While Δ = 0, e is constant and s_j(r) = γ_j + r u_j − ½ r² ρ_j² with u_j = e·(a_j − a_o), ρ_j = ‖a_j − a_o‖
        and γ_j = β_j − β_o: it stays under −threshold for all r above the larger root.
        """
        e64, own64 = rows.e.double(), rows.own64
        u = torch.addmm((e64 * own64).sum(1, keepdim=True), e64, self.anchors64.T, beta=-1)
        square = torch.addmm(self.half_norms, own64, self.anchors64.T, beta=2, alpha=-2)
        square = square.add_(2 * rows.half_squares[:, None]).clamp_(min=1e-300)
        room: float | Tensor = threshold
        if self.log_weights is not None and rows.log_weights is not None:
            # light anchors: no lower than this, which lets them count for longer than they do
            room = (self.log_weights - rows.log_weights[:, None] + threshold).clamp_(min=1.0)
        # (u + √(u² + 2ρ²T))/ρ², in the form that stays finite and certain where ρ and u round to nothing
        root = torch.addcmul(square * (2 * room), u, u).sqrt_().sub_(u).reciprocal_().mul_(2 * room)
        self._at_references(root, rows.index, 0.0)
        return root if self.present is None else root.mul_(self.present)

    def reach(self, rows: Rows, threshold: float) -> Tensor:
        """[b] float64: from which r downwards each row, starting at e, feels another of these anchors."""
        result = rows.e.new_empty(len(rows), dtype=torch.float64)
        for at in self.tiles(len(rows)):
            result[at] = self._roots(rows[at], threshold).amax(1)
        return result

    def near(self, rows: Rows, threshold: float, r: float) -> Pairs:
        """The pairs that may carry weight at r; columns count from this block's start."""
        rows_found, columns_found = [rows.index.new_empty(0)], [rows.index.new_empty(0)]
        for at in self.tiles(len(rows)):
            row, column = (self._roots(rows[at], threshold) > r).nonzero(as_tuple=True)
            rows_found.append(row + at.start)
            columns_found.append(column)
        return Pairs(torch.cat(rows_found), torch.cat(columns_found))
