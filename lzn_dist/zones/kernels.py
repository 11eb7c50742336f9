"""The sums of a block of anchors as fused kernels for GPUs, in Triton: no score leaves the chip.

The same sums as `lzn_dist.zones.block`, with the same rule of precision: scores in float64, in float32 where
r² ‖a − centre‖² ≤ `FLOAT32_SCORES` (the device decides, so that nothing is read back), weights and all other products
in the anchors' dtype with IEEE products, never TF32. A program of the forward and of the rows' backward owns some rows
and goes over a chunk of the anchors; one of the anchors' backward owns some anchors and goes over all rows: no atomic
additions, the same digits each time. Row blocks hold [rows, d] accumulators, d up to `KERNEL_DIM`.

Why not attention as a library has it, with queries q and keys and values a_j: xformers' memory_efficient_attention (and
torch's) computes scores in float32 at most, which changes the loss in the third digit (`lzn_dist.zones.field`); the
bias −½ r² ‖a_j‖² would be a [b, n] tensor; and the log-sum-exp that memory_efficient_attention_partial returns has no
gradient of its own ("LSEs weren't used anywhere except in merge attentions", its docstring), while it is the loss here.

Where there is no GPU, Triton's interpreter runs the kernels on the CPU (TRITON_INTERPRET=1): it shows that their logic
is right, not how exact or fast a GPU is.
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lzn_dist.zones.block import FLOAT32_SCORES, AnchorGradient, Block, Rows
from lzn_dist.zones.partial import Cotangent, GroupSums, Moments, Partial, Sums

INTERPRETED = bool(triton.knobs.runtime.interpret)  # when these kernels were made
STEP = 64  # columns of the slices in which scores are summed
PROGRAMS = 256  # about so many at least, where there are anchors for it; the same on every GPU, as sums depend on it
CHUNK_TILES = 4  # of anchors, at least, in a chunk

# pyright: reportInvalidTypeForm=false


@triton.jit
def _points(base, rows, row_mask, first, DIM: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[rows, STEP]: columns first.. of some rows of a matrix of DIM columns; 0 outside."""
    columns = first + tl.arange(0, STEP)
    mask = row_mask[:, None] & (columns < DIM)[None, :]
    return tl.load(base + rows[:, None] * DIM + columns[None, :], mask=mask, other=0.0)


@triton.jit
def _keys(anchors, columns, column_mask, first, DIM: tl.constexpr, STEP: tl.constexpr):  # type: ignore[no-untyped-def]
    """[STEP, columns]: the same of anchors, transposed."""
    width = first + tl.arange(0, STEP)
    mask = (width < DIM)[:, None] & column_mask[None, :]
    return tl.load(anchors + columns[None, :] * DIM + width[:, None], mask=mask, other=0.0)


@triton.jit
def _scores(  # type: ignore[no-untyped-def]
    e, own, anchors, biases, log_weights, rows, row_mask, columns, column_mask, reference, r, single,
    WEIGHTED: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """float64 [M, N]: q·a_j − ½ r² ‖a_j‖² + β_j, −inf at the reference and outside."""
    scores = tl.zeros((M, N), tl.float64)
    for first in range(0, DIM, STEP):
        query = _points(e, rows, row_mask, first, DIM, STEP).to(tl.float64) * r
        query += _points(own, rows, row_mask, first, DIM, STEP).to(tl.float64) * (r * r)
        keys = _keys(anchors, columns, column_mask, first, DIM, STEP)
        if single:
            scores += tl.dot(query.to(tl.float32), keys.to(tl.float32), input_precision="ieee").to(tl.float64)
        else:
            scores += tl.dot(query, keys.to(tl.float64), out_dtype=tl.float64)
    # masks go as numbers: Triton 3.9 cannot hand booleans from one layout to that of a float64 product
    bias = tl.load(biases + columns, mask=column_mask, other=float("inf")) * -tl.maximum(r * r, 1e-300)  # not 0 · ∞
    if WEIGHTED:
        bias += tl.load(log_weights + columns, mask=column_mask, other=float("-inf"))
    return tl.where(columns[None, :] == reference[:, None], float("-inf"), scores + bias[None, :])


@triton.jit
def _projections(  # type: ignore[no-untyped-def]
    g, own, anchors, rows, row_mask, columns, column_mask,
    DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[M, N]: g·(a_j − a_o)."""
    found, base = tl.zeros((M, N), DTYPE), tl.zeros((M,), DTYPE)
    for first in range(0, DIM, STEP):
        part = _points(g, rows, row_mask, first, DIM, STEP)
        keys = _keys(anchors, columns, column_mask, first, DIM, STEP)
        found += tl.dot(part, keys, out_dtype=DTYPE, input_precision="ieee")
        base += tl.sum(part * _points(own, rows, row_mask, first, DIM, STEP), 1)
    return found - base[:, None]


@triton.jit
def _offset(  # type: ignore[no-untyped-def]
    e, own, own_weights, rows, row_mask, r,
    WEIGHTED: tl.constexpr, DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr,
):  # fmt: skip
    """float64 [M]: the reference's score."""
    offset = tl.zeros((M,), tl.float64)
    for first in range(0, DIM, STEP):
        o = _points(own, rows, row_mask, first, DIM, STEP).to(tl.float64)
        point = _points(e, rows, row_mask, first, DIM, STEP).to(tl.float64)
        offset += tl.sum((point * r + o * (0.5 * r * r)) * o, 1)
    if WEIGHTED:
        offset += tl.load(own_weights + rows, mask=row_mask, other=0.0)
    return offset


@triton.jit
def _single(widest, r, limit, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.float64 == DTYPE:
        return False
    else:
        return r * r * tl.load(widest) <= limit


@triton.jit
def _forward(  # type: ignore[no-untyped-def]
    e, own, anchors, biases, log_weights, own_weights, index, groups, own_groups, radius, widest,
    offsets, peaks, sums, moments, group_peaks, members, outsides, count, total, start, chunk, limit: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A `Partial` of each chunk of anchors: one pass over it with a running maximum."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    r = tl.load(radius)
    single = _single(widest, r, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    offset = _offset(e, own, own_weights, rows, row_mask, r, WEIGHTED, DIM, STEP, M)
    peak, weight, moment = offset, tl.zeros((M,), DTYPE), tl.zeros((M, FULL), DTYPE)
    group_peak, member = offset, tl.zeros((M,), tl.float64)
    outside = tl.zeros((M,), tl.float64)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            e, own, anchors, biases, log_weights, rows, row_mask, columns, column_mask, reference, r, single,
            WEIGHTED, DIM, STEP, M, N,
        )  # fmt: skip
        highest = tl.maximum(peak, tl.max(scores, 1))
        weights = tl.exp((scores - highest[:, None]).to(DTYPE))
        scale = tl.exp((peak - highest).to(DTYPE))
        if GROUPED:
            ours = tl.load(own_groups + rows, mask=row_mask, other=0)
            theirs = tl.load(groups + columns, mask=column_mask, other=0)
            same = ours[:, None] == theirs[None, :]
            outside = outside * scale.to(tl.float64) + tl.sum(tl.where(same, 0.0, weights), 1).to(tl.float64)
            best = tl.maximum(group_peak, tl.max(tl.where(same, scores, float("-inf")), 1))
            inner = tl.exp(tl.minimum(scores - best[:, None], 0.0).to(DTYPE))
            member = member * tl.exp(group_peak - best) + tl.sum(tl.where(same, inner, 0.0), 1).to(tl.float64)
            group_peak = best
        values = _points(anchors, columns, column_mask, 0, DIM, FULL)
        weight = weight * scale + tl.sum(weights, 1)
        moment = moment * scale[:, None] + tl.dot(weights, values, out_dtype=DTYPE, input_precision="ieee")
        peak = highest
    width = tl.arange(0, FULL)
    moment -= weight[:, None] * _points(own, rows, row_mask, 0, DIM, FULL)
    mask = row_mask[:, None] & (width < DIM)[None, :]
    tl.store(offsets + rows, offset, mask=row_mask)  # every chunk's is the same
    places = tl.program_id(1) * count + rows
    tl.store(moments + places[:, None] * DIM + width[None, :], moment, mask=mask)
    tl.store(peaks + places, peak, mask=row_mask)
    tl.store(sums + places, weight, mask=row_mask)
    if GROUPED:
        tl.store(group_peaks + places, group_peak, mask=row_mask)
        tl.store(members + places, member, mask=row_mask)
        tl.store(outsides + places, outside, mask=row_mask)


@triton.jit
def _moments(  # type: ignore[no-untyped-def]
    e, own, anchors, biases, log_weights, own_weights, index, groups, own_groups, radius, widest,
    lse, g, weights_out, pulls, count, total, start, chunk, limit: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`Moments` of each chunk of anchors."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    r = tl.load(radius)
    single = _single(widest, r, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    base = tl.load(lse + rows, mask=row_mask, other=0.0)
    base += _offset(e, own, own_weights, rows, row_mask, r, WEIGHTED, DIM, STEP, M)
    weight, pull = tl.zeros((M,), DTYPE), tl.zeros((M,), DTYPE)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            e, own, anchors, biases, log_weights, rows, row_mask, columns, column_mask, reference, r, single,
            WEIGHTED, DIM, STEP, M, N,
        )  # fmt: skip
        weights = tl.exp((scores - base[:, None]).to(DTYPE))
        products = _projections(g, own, anchors, rows, row_mask, columns, column_mask, DIM, STEP, M, N, DTYPE)
        weight += tl.sum(weights, 1)
        pull += tl.sum(weights * products, 1)
    places = tl.program_id(1) * count + rows
    tl.store(weights_out + places, weight, mask=row_mask)
    tl.store(pulls + places, pull, mask=row_mask)


@triton.jit
def _backward_rows(  # type: ignore[no-untyped-def]
    e, own, anchors, biases, log_weights, own_weights, index, groups, own_groups, radius, widest,
    lse, target, g, grad_target, shifts, weights_out, totals, spreads, count, total, start, chunk, limit: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, TARGETED: tl.constexpr, DTYPE: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A `Cotangent` of each chunk of anchors."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    r = tl.load(radius)
    single = _single(widest, r, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    base = tl.load(lse + rows, mask=row_mask, other=0.0)
    base += _offset(e, own, own_weights, rows, row_mask, r, WEIGHTED, DIM, STEP, M)
    shift = tl.load(shifts + rows, mask=row_mask, other=0.0)
    of_target = tl.zeros((M,), DTYPE)
    if TARGETED:
        of_target = tl.load(grad_target + rows, mask=row_mask, other=0.0).to(DTYPE)
    weight, sum_d, spread = tl.zeros((M,), DTYPE), tl.zeros((M,), DTYPE), tl.zeros((M, FULL), DTYPE)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            e, own, anchors, biases, log_weights, rows, row_mask, columns, column_mask, reference, r, single,
            WEIGHTED, DIM, STEP, M, N,
        )  # fmt: skip
        logarithms = scores - base[:, None]
        products = _projections(g, own, anchors, rows, row_mask, columns, column_mask, DIM, STEP, M, N, DTYPE)
        d_scores = _cotangents(
            logarithms, products, shift, of_target, target, groups, own_groups, rows, row_mask, columns, column_mask,
            GROUPED and TARGETED, DTYPE,
        )  # fmt: skip
        values = _points(anchors, columns, column_mask, 0, DIM, FULL)
        weight += tl.sum(tl.exp(logarithms.to(DTYPE)), 1)
        sum_d += tl.sum(d_scores, 1)
        spread += tl.dot(d_scores, values, out_dtype=DTYPE, input_precision="ieee")
    width = tl.arange(0, FULL)
    spread -= sum_d[:, None] * _points(own, rows, row_mask, 0, DIM, FULL)
    mask = row_mask[:, None] & (width < DIM)[None, :]
    places = tl.program_id(1) * count + rows
    tl.store(spreads + places[:, None] * DIM + width[None, :], spread, mask=mask)
    tl.store(totals + places, sum_d, mask=row_mask)
    tl.store(weights_out + places, weight, mask=row_mask)


@triton.jit
def _cotangents(  # type: ignore[no-untyped-def]
    logarithms, products, shift, of_target, target, groups, own_groups, rows, row_mask, columns, column_mask,
    GROUPED: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """[M, N]: dS of scores less the rows' log-sum-exps."""
    found = tl.exp(logarithms.to(DTYPE)) * (products - shift[:, None])
    if GROUPED:
        ours = tl.load(own_groups + rows, mask=row_mask, other=0)
        theirs = tl.load(groups + columns, mask=column_mask, other=0)
        # an absent group has an infinite target: its members' weights stay 0
        missed = tl.minimum(tl.load(target + rows, mask=row_mask, other=0.0), 1e30)
        inner = tl.exp(tl.minimum(logarithms + missed[:, None], 0.0).to(DTYPE))
        found -= tl.where(ours[:, None] == theirs[None, :], inner, 0.0) * of_target[:, None]
    return found


@triton.jit
def _backward_anchors(  # type: ignore[no-untyped-def]
    e, own, anchors, biases, log_weights, own_weights, index, groups, own_groups, radius, widest,
    lse, target, g, grad_target, shifts, gradients, radials, count, total, start, limit: tl.constexpr,
    WEIGHTED: tl.constexpr, GROUPED: tl.constexpr, TARGETED: tl.constexpr, DTYPE: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds the anchors' gradients."""
    columns = tl.program_id(0) * N + tl.arange(0, N)
    column_mask = columns < total
    r = tl.load(radius)
    single = _single(widest, r, limit, DTYPE)
    width = tl.arange(0, FULL)
    places = columns[:, None] * DIM + width[None, :]
    mask = column_mask[:, None] & (width < DIM)[None, :]
    gradient, radial = tl.zeros((N, FULL), DTYPE), tl.zeros((N,), DTYPE)
    for first in range(0, count, M):
        rows = first + tl.arange(0, M)
        row_mask = rows < count
        reference = tl.load(index + rows, mask=row_mask, other=-1) - start
        base = tl.load(lse + rows, mask=row_mask, other=float("inf"))
        base += _offset(e, own, own_weights, rows, row_mask, r, WEIGHTED, DIM, STEP, M)
        scores = _scores(
            e, own, anchors, biases, log_weights, rows, row_mask, columns, column_mask, reference, r, single,
            WEIGHTED, DIM, STEP, M, N,
        )  # fmt: skip
        logarithms = scores - base[:, None]
        products = _projections(g, own, anchors, rows, row_mask, columns, column_mask, DIM, STEP, M, N, DTYPE)
        shift = tl.load(shifts + rows, mask=row_mask, other=0.0)
        of_target = tl.zeros((M,), DTYPE)
        if TARGETED:
            of_target = tl.load(grad_target + rows, mask=row_mask, other=0.0).to(DTYPE)
        d_scores = _cotangents(
            logarithms, products, shift, of_target, target, groups, own_groups, rows, row_mask, columns, column_mask,
            GROUPED and TARGETED, DTYPE,
        )  # fmt: skip
        weights = tl.trans(tl.exp(logarithms.to(DTYPE)))
        query = _points(e, rows, row_mask, 0, DIM, FULL).to(tl.float64) * r
        query += _points(own, rows, row_mask, 0, DIM, FULL).to(tl.float64) * (r * r)
        cotangent = _points(g, rows, row_mask, 0, DIM, FULL)
        gradient += tl.dot(weights, cotangent, out_dtype=DTYPE, input_precision="ieee")
        gradient += tl.dot(tl.trans(d_scores), query.to(DTYPE), out_dtype=DTYPE, input_precision="ieee")
        radial += tl.sum(d_scores, 0)
    tl.store(gradients + places, tl.load(gradients + places, mask=mask, other=0.0) + gradient, mask=mask)
    held = tl.load(radials + columns, mask=column_mask, other=0.0)
    tl.store(radials + columns, held + radial * (r * r).to(DTYPE), mask=column_mask)


def shapes(dim: int) -> dict[str, int]:
    """Of a program's tiles: smaller where [rows, d] is wide."""
    full = max(16, triton.next_power_of_2(dim))
    side = 16 if full > 256 else 32
    return {"DIM": dim, "FULL": full, "STEP": min(STEP, full), "M": side, "N": side}


class FusedBlock(Block):
    """A `Block` whose sums are these kernels'. Its lists of near pairs, of one step, are the tiles'."""

    @cached_property
    def widest_here(self) -> Tensor:
        """float64 [1], on the device: `Block.widest` without a wait."""
        return 2.0 * self.half_norms.amax(0, keepdim=True)

    def _given(self, rows: Rows, r: float) -> tuple[dict[str, Tensor], dict[str, Any], tuple[int, int]]:
        """What all kernels are given: tensors and numbers; and the programs, of rows and of chunks of anchors."""
        nothing = self.half_norms[:1]
        dim = rows.e.shape[1]
        tensors = {
            "e": rows.e.contiguous(), "own": rows.own.contiguous(), "anchors": self.anchors, "biases": self.half_norms,
            "log_weights": nothing if self.log_weights is None else self.log_weights,
            "own_weights": nothing if rows.log_weights is None else rows.log_weights,
            "index": rows.index, "groups": rows.index if self.groups is None else self.groups,
            "own_groups": rows.index if rows.groups is None else rows.groups,
            # as a tensor, filled on the device: a kernel's own numbers are float32
            "radius": torch.full((1,), r, dtype=torch.float64, device=rows.e.device), "widest": self.widest_here,
        }  # fmt: skip
        sizes = shapes(dim)
        programs, tiles = triton.cdiv(len(rows), sizes["M"]), triton.cdiv(len(self), sizes["N"])
        # few rows would leave most of a GPU idle: their anchors come in chunks, whose sums are put together after
        chunks = max(1, min(tiles // CHUNK_TILES, PROGRAMS // max(1, programs)))
        chunk = triton.cdiv(tiles, chunks) * sizes["N"]
        numbers: dict[str, Any] = {
            "count": len(rows), "total": len(self), "start": self.start, "chunk": chunk, "limit": FLOAT32_SCORES,
            "WEIGHTED": self.log_weights is not None and rows.log_weights is not None,
            "GROUPED": self.groups is not None and rows.groups is not None,
            "DTYPE": tl.float64 if rows.e.dtype == torch.float64 else tl.float32,
            **sizes,
        }  # fmt: skip
        return tensors, numbers, (programs, triton.cdiv(len(self), chunk))

    def part(self, rows: Rows, r: float, *, settle: bool) -> Partial:
        if settle:
            return super().part(rows, r, settle=settle)
        e, count = rows.e, len(rows)
        tensors, numbers, grid = self._given(rows, r)
        wide = [e.new_empty(grid[1], count, dtype=torch.float64) for _ in range(4 if numbers["GROUPED"] else 1)]
        offset, sums = wide[0].new_empty(count), e.new_empty(grid[1], count)
        moments = e.new_empty(grid[1], *e.shape)
        if count:
            group = wide[1:] or wide * 3
            _forward[grid](*tensors.values(), offset, wide[0], sums, moments, *group, **numbers)
        peak = wide[0].amax(0)
        scale = (wide[0] - peak).exp()
        narrow = scale.to(e.dtype)
        found = Partial(offset, peak, (sums * narrow).sum(0), (moments * narrow[:, :, None]).sum(0))
        if numbers["GROUPED"]:
            assert rows.inside is not None
            _, group_peaks, members, outsides = wide
            highest = group_peaks.amax(0)
            members = (members * (group_peaks - highest).exp()).sum(0)
            found.group = GroupSums(rows.inside, highest, members, (outsides * scale).sum(0))
        return found

    def moments(self, rows: Rows, r: float, lse: Tensor, g: Tensor) -> Moments:
        tensors, numbers, grid = self._given(rows, r)
        weight, pull = g.new_empty(grid[1], len(g)), g.new_empty(grid[1], len(g))
        if len(g):
            _moments[grid](*tensors.values(), lse, g.contiguous(), weight, pull, **numbers)
        return Moments(weight.sum(0), pull.sum(0))

    def pull_back(
        self, rows: Rows, r: float, posterior: Sums, g: Tensor, grad_target: Tensor | None,
        shift: Tensor | None, into: AnchorGradient,
    ) -> Cotangent:  # fmt: skip
        g, targeted = g.contiguous(), grad_target is not None
        if shift is None:
            shift = self.moments(rows, r, posterior.lse, g).shift(posterior.lse, grad_target)
        tensors, numbers, grid = self._given(rows, r)
        total, weight, spread = (g.new_empty(grid[1], *shape) for shape in (g.shape[:1], g.shape[:1], g.shape))
        if len(g):
            of_target = posterior.lse if grad_target is None else grad_target
            given = [*tensors.values(), posterior.lse, posterior.target, g, of_target, shift]
            _backward_rows[grid](*given, weight, total, spread, **numbers, TARGETED=targeted)
            del numbers["chunk"]
            columns = (triton.cdiv(len(self), numbers["N"]),)
            _backward_anchors[columns](*given, into.anchors, into.radial, **numbers, TARGETED=targeted)
        return Cotangent(spread.sum(0), total.sum(0), weight.sum(0))
