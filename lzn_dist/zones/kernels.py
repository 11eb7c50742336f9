"""The sums of a block of anchors as fused kernels for GPUs, in Triton: no score leaves the chip.

The same sums as `lzn_dist.zones.block`, with the same rule of precision: scores in float64, in float32 where
r² ‖a − centre‖² ≤ `FLOAT32_SCORES` (the device decides, so that nothing is read back), weights and all other products
in the anchors' dtype, float32 ones with its digits on tensor cores (`PRECISION`). A program of the forward and of the
rows' backward owns some rows and goes over a chunk of the anchors; one of the anchors' backward owns some anchors and
goes over all rows: no atomic additions, the same digits each time. Where no weight of a tile counts, its products are
skipped. Row blocks hold [rows, d] accumulators, d up to `KERNEL_DIM`.

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
from triton.compiler.compiler import max_shared_mem

from lzn_dist.zones.block import EXP_FLOOR, FLOAT32_SCORES, AnchorGradient, Block, Rows
from lzn_dist.zones.partial import Cotangent, GroupSums, Moments, Partial, Sums

INTERPRETED = bool(triton.knobs.runtime.interpret)  # when these kernels were made
STEP = 32  # columns of the slices in which scores are summed: of more, float64 fragments do not fit into registers
WARPS = 8  # of a program
# Three TF32 products, of what each factor's first 11 bits leave too, sum to the digits of float32 on tensor cores; IEEE
# products run on none. (AMD's have no such.)
PRECISION = "ieee" if torch.version.hip else "tf32x3"
PROGRAMS = 256  # about so many at least, where there are anchors for it, whatever the GPU has: sums depend on it
CHUNK_TILES = 4  # of anchors, at least, in a chunk

# pyright: reportInvalidTypeForm=false


def kernel(function: Any) -> Any:
    """One binary whatever the numbers of rows and anchors, which change from step to step."""
    return triton.jit(
        function,
        do_not_specialize=("count", "total", "start", "chunk"),
        do_not_specialize_on_alignment=("offsets", "bases", "alongs", "shifts", "target", "grad_target"),
    )


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
    queries, narrow, anchors, biases, rows, row_mask, columns, column_mask, reference, single,
    DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """float64 [M, N]: q·a_j + bias_j, −inf at the reference and outside."""
    scores = tl.zeros((M, N), tl.float64)
    for first in range(0, DIM, STEP):
        keys = _keys(anchors, columns, column_mask, first, DIM, STEP)
        if single:
            part = _points(narrow, rows, row_mask, first, DIM, STEP).to(tl.float32)
            scores += tl.dot(part, keys.to(tl.float32), input_precision="ieee").to(tl.float64)
        else:
            query = _points(queries, rows, row_mask, first, DIM, STEP)
            scores += tl.dot(query, keys.to(tl.float64), out_dtype=tl.float64)
    # masks go as numbers: Triton 3.9 cannot hand booleans from one layout to that of a float64 product
    bias = tl.load(biases + columns, mask=column_mask, other=float("-inf"))
    return tl.where(columns[None, :] == reference[:, None], float("-inf"), scores + bias[None, :])


@triton.jit
def _projections(  # type: ignore[no-untyped-def]
    g, alongs, anchors, rows, row_mask, columns, column_mask,
    DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """[M, N]: g·(a_j − a_o)."""
    found = tl.zeros((M, N), DTYPE)
    for first in range(0, DIM, STEP):
        part = _points(g, rows, row_mask, first, DIM, STEP)
        keys = _keys(anchors, columns, column_mask, first, DIM, STEP)
        found += tl.dot(part, keys, out_dtype=DTYPE, input_precision=PRECISION)
    return found - tl.load(alongs + rows, mask=row_mask, other=0.0)[:, None]


@triton.jit
def _single(radius, widest, limit, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    if tl.float64 == DTYPE:
        return False
    else:
        r = tl.load(radius)
        return r * r * tl.load(widest) <= limit


@triton.jit
def _felt(logarithms, floor):  # type: ignore[no-untyped-def]
    """Whether any weight of a tile counts."""
    return tl.max(tl.max(logarithms, 1), 0) > floor


@kernel
def _forward(  # type: ignore[no-untyped-def]
    queries, narrow, anchors, biases, index, groups, own_groups, radius, widest,
    offsets, peaks, sums, moments, group_peaks, members, outsides, count, total, start, chunk,
    limit: tl.constexpr, floor: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A `Partial` of each chunk of anchors: one pass over it with a running maximum. Its moment lacks −a_o."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    single = _single(radius, widest, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    peak = tl.load(offsets + rows, mask=row_mask, other=1e300)  # rows that are not there feel nothing
    weight, moment = tl.zeros((M,), DTYPE), tl.zeros((M, FULL), DTYPE)
    group_peak, member = peak, tl.zeros((M,), tl.float64)
    outside = tl.zeros((M,), tl.float64)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            queries, narrow, anchors, biases, rows, row_mask, columns, column_mask, reference, single, DIM, STEP, M, N
        )
        highest = tl.maximum(peak, tl.max(scores, 1))
        logarithms = scores - highest[:, None]
        weights = tl.exp(logarithms.to(DTYPE))
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
        weight = weight * scale + tl.sum(weights, 1)
        peak = highest
        if _felt(logarithms, floor):  # else no maximum has moved, and scale is 1
            values = _points(anchors, columns, column_mask, 0, DIM, FULL)
            moment = moment * scale[:, None] + tl.dot(weights, values, out_dtype=DTYPE, input_precision=PRECISION)
    width = tl.arange(0, FULL)
    mask = row_mask[:, None] & (width < DIM)[None, :]
    places = tl.program_id(1) * count + rows
    tl.store(moments + places[:, None] * DIM + width[None, :], moment, mask=mask)
    tl.store(peaks + places, peak, mask=row_mask)
    tl.store(sums + places, weight, mask=row_mask)
    if GROUPED:
        tl.store(group_peaks + places, group_peak, mask=row_mask)
        tl.store(members + places, member, mask=row_mask)
        tl.store(outsides + places, outside, mask=row_mask)


@kernel
def _moments(  # type: ignore[no-untyped-def]
    queries, narrow, anchors, biases, index, groups, own_groups, radius, widest,
    bases, alongs, g, weights_out, pulls, count, total, start, chunk,
    limit: tl.constexpr, floor: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """`Moments` of each chunk of anchors."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    single = _single(radius, widest, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    base = tl.load(bases + rows, mask=row_mask, other=float("inf"))
    weight, pull = tl.zeros((M,), DTYPE), tl.zeros((M,), DTYPE)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            queries, narrow, anchors, biases, rows, row_mask, columns, column_mask, reference, single, DIM, STEP, M, N
        )
        logarithms = scores - base[:, None]
        weights = tl.exp(logarithms.to(DTYPE))
        weight += tl.sum(weights, 1)
        if _felt(logarithms, floor):
            products = _projections(
                g, alongs, anchors, rows, row_mask, columns, column_mask, DIM, STEP, M, N, DTYPE, PRECISION
            )
            pull += tl.sum(weights * products, 1)
    places = tl.program_id(1) * count + rows
    tl.store(weights_out + places, weight, mask=row_mask)
    tl.store(pulls + places, pull, mask=row_mask)


@triton.jit
def _cotangents(  # type: ignore[no-untyped-def]
    logarithms, weights, anchors, groups, own_groups, alongs, g, target, grad_target, shifts,
    rows, row_mask, columns, column_mask, GROUPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """[M, N]: dS of scores less the rows' log-sum-exps. GROUPED: groups have a part of their own in it."""
    products = _projections(g, alongs, anchors, rows, row_mask, columns, column_mask, DIM, STEP, M, N, DTYPE, PRECISION)
    shift = tl.load(shifts + rows, mask=row_mask, other=0.0)
    found = weights * (products - shift[:, None])
    if GROUPED:
        of_target = tl.load(grad_target + rows, mask=row_mask, other=0.0).to(DTYPE)
        ours = tl.load(own_groups + rows, mask=row_mask, other=0)
        theirs = tl.load(groups + columns, mask=column_mask, other=0)
        # an absent group has an infinite target: its members' weights stay 0
        missed = tl.minimum(tl.load(target + rows, mask=row_mask, other=0.0), 1e30)
        inner = tl.exp(tl.minimum(logarithms + missed[:, None], 0.0).to(DTYPE))
        found -= tl.where(ours[:, None] == theirs[None, :], inner, 0.0) * of_target[:, None]
    return found


@kernel
def _backward_rows(  # type: ignore[no-untyped-def]
    queries, narrow, anchors, biases, index, groups, own_groups, radius, widest,
    bases, alongs, g, target, grad_target, shifts, weights_out, totals, spreads, count, total, start, chunk,
    limit: tl.constexpr, floor: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """A `Cotangent` of each chunk of anchors. Its spread lacks −a_o."""
    rows = tl.program_id(0) * M + tl.arange(0, M)
    row_mask = rows < count
    single = _single(radius, widest, limit, DTYPE)
    reference = tl.load(index + rows, mask=row_mask, other=-1) - start
    base = tl.load(bases + rows, mask=row_mask, other=float("inf"))
    weight, sum_d, spread = tl.zeros((M,), DTYPE), tl.zeros((M,), DTYPE), tl.zeros((M, FULL), DTYPE)
    behind = tl.minimum((tl.program_id(1) + 1) * chunk, total)
    for first in range(tl.program_id(1) * chunk, behind, N):
        columns = first + tl.arange(0, N)
        column_mask = columns < total
        scores = _scores(
            queries, narrow, anchors, biases, rows, row_mask, columns, column_mask, reference, single, DIM, STEP, M, N
        )
        logarithms = scores - base[:, None]
        weights = tl.exp(logarithms.to(DTYPE))
        weight += tl.sum(weights, 1)
        if GROUPED or _felt(logarithms, floor):
            d_scores = _cotangents(
                logarithms, weights, anchors, groups, own_groups, alongs, g, target, grad_target, shifts,
                rows, row_mask, columns, column_mask, GROUPED, DTYPE, PRECISION, DIM, STEP, M, N,
            )  # fmt: skip
            sum_d += tl.sum(d_scores, 1)
            values = _points(anchors, columns, column_mask, 0, DIM, FULL)
            spread += tl.dot(d_scores, values, out_dtype=DTYPE, input_precision=PRECISION)
    width = tl.arange(0, FULL)
    mask = row_mask[:, None] & (width < DIM)[None, :]
    places = tl.program_id(1) * count + rows
    tl.store(spreads + places[:, None] * DIM + width[None, :], spread, mask=mask)
    tl.store(totals + places, sum_d, mask=row_mask)
    tl.store(weights_out + places, weight, mask=row_mask)


@kernel
def _backward_anchors(  # type: ignore[no-untyped-def]
    queries, narrow, anchors, biases, index, groups, own_groups, radius, widest,
    bases, alongs, g, target, grad_target, shifts, gradients, radials, count, total, start,
    limit: tl.constexpr, floor: tl.constexpr, GROUPED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
    DIM: tl.constexpr, FULL: tl.constexpr, STEP: tl.constexpr, M: tl.constexpr, N: tl.constexpr,
):  # fmt: skip
    """Adds the anchors' gradients."""
    columns = tl.program_id(0) * N + tl.arange(0, N)
    column_mask = columns < total
    single = _single(radius, widest, limit, DTYPE)
    gradient, radial = tl.zeros((N, FULL), DTYPE), tl.zeros((N,), DTYPE)
    for first in range(0, count, M):
        rows = first + tl.arange(0, M)
        row_mask = rows < count
        reference = tl.load(index + rows, mask=row_mask, other=-1) - start
        base = tl.load(bases + rows, mask=row_mask, other=float("inf"))
        scores = _scores(
            queries, narrow, anchors, biases, rows, row_mask, columns, column_mask, reference, single, DIM, STEP, M, N
        )
        logarithms = scores - base[:, None]
        if GROUPED or _felt(logarithms, floor):
            weights = tl.exp(logarithms.to(DTYPE))
            d_scores = _cotangents(
                logarithms, weights, anchors, groups, own_groups, alongs, g, target, grad_target, shifts,
                rows, row_mask, columns, column_mask, GROUPED, DTYPE, PRECISION, DIM, STEP, M, N,
            )  # fmt: skip
            radial += tl.sum(d_scores, 0)
            cotangent = _points(g, rows, row_mask, 0, DIM, FULL)
            gradient += tl.dot(tl.trans(weights), cotangent, out_dtype=DTYPE, input_precision=PRECISION)
            query = _points(narrow, rows, row_mask, 0, DIM, FULL)
            gradient += tl.dot(tl.trans(d_scores), query, out_dtype=DTYPE, input_precision=PRECISION)
    width = tl.arange(0, FULL)
    places = columns[:, None] * DIM + width[None, :]
    mask = column_mask[:, None] & (width < DIM)[None, :]
    tl.store(gradients + places, tl.load(gradients + places, mask=mask, other=0.0) + gradient, mask=mask)
    held = tl.load(radials + columns, mask=column_mask, other=0.0)
    r = tl.load(radius)
    tl.store(radials + columns, held + radial * (r * r).to(DTYPE), mask=column_mask)


def shapes(dim: int, dtype: torch.dtype, shared: int) -> dict[str, int]:
    """Of a program's tiles: as large as `shared` bytes of memory hold the anchors of one, twice, and its scores."""
    full = max(16, triton.next_power_of_2(dim))
    side = 64
    while side > 16 and side * (2 * full * dtype.itemsize + 8 * side) > shared:
        side //= 2
    return {"DIM": dim, "FULL": full, "STEP": min(STEP, full), "M": side, "N": side}


class FusedBlock(Block):
    """A `Block` whose sums are these kernels'. Its lists of near pairs, of one step, are the tiles'."""

    @cached_property
    def widest_here(self) -> Tensor:
        """float64 [1], on the device: `Block.widest` without a wait."""
        return 2.0 * self.half_norms.amax(0, keepdim=True)

    def _given(self, rows: Rows, r: float) -> tuple[list[Tensor], Tensor, dict[str, Any], tuple[int, int]]:
        """Tensors and numbers that all kernels are given, the references' scores [b], and the programs, of rows and of
        chunks of anchors."""
        queries, biases, offset = self._queries(rows, r)
        queries, dtype = queries.contiguous(), rows.e.dtype
        groups, own_groups = (rows.index if one is None else one for one in (self.groups, rows.groups))
        tensors = [
            queries, queries.to(dtype), self.anchors, biases,
            *(which.contiguous() for which in (rows.index, groups, own_groups)),
            # as a tensor, filled on the device: a kernel's own numbers are float32
            torch.full((1,), r, dtype=torch.float64, device=rows.e.device), self.widest_here,
        ]  # fmt: skip
        # the interpreter has no limit: so little that anchors come in several tiles
        sizes = shapes(rows.e.shape[1], dtype, max_shared_mem(rows.e.device.index) if rows.e.is_cuda else 1 << 14)
        programs, tiles = triton.cdiv(len(rows), sizes["M"]), triton.cdiv(len(self), sizes["N"])
        # few rows would leave most of a GPU idle: their anchors come in chunks, whose sums are put together after
        chunks = max(1, min(tiles // CHUNK_TILES, PROGRAMS // max(1, programs)))
        chunk = triton.cdiv(tiles, chunks) * sizes["N"]
        numbers: dict[str, Any] = {
            "count": len(rows), "total": len(self), "start": self.start, "chunk": chunk,
            "limit": FLOAT32_SCORES, "floor": EXP_FLOOR, "GROUPED": self.groups is not None and rows.groups is not None,
            "DTYPE": tl.float64 if dtype == torch.float64 else tl.float32, "PRECISION": PRECISION,
            **sizes, "num_warps": WARPS,
        }  # fmt: skip
        return tensors, offset, numbers, (programs, triton.cdiv(len(self), chunk))

    def part(self, rows: Rows, r: float, *, settle: bool) -> Partial:
        if settle:
            return super().part(rows, r, settle=settle)
        e, count = rows.e, len(rows)
        tensors, offset, numbers, grid = self._given(rows, r)
        wide = [e.new_empty(grid[1], count, dtype=torch.float64) for _ in range(4 if numbers["GROUPED"] else 1)]
        sums, moments = e.new_empty(grid[1], count), e.new_empty(grid[1], *e.shape)
        if count:
            group = wide[1:] or wide * 3
            _forward[grid](*tensors, offset, wide[0], sums, moments, *group, **numbers)
        peak = wide[0].amax(0)
        scale = (wide[0] - peak).exp()
        narrow = scale.to(e.dtype)
        others = (sums * narrow).sum(0)
        moment = (moments * narrow[:, :, None]).sum(0)
        found = Partial(offset, peak, others, moment.addcmul_(rows.own, others[:, None], value=-1))
        if numbers["GROUPED"]:
            assert rows.inside is not None
            _, group_peaks, members, outsides = wide
            highest = group_peaks.amax(0)
            members = (members * (group_peaks - highest).exp()).sum(0)
            found.group = GroupSums(rows.inside, highest, members, (outsides * scale).sum(0))
        return found

    def _moments(self, tensors: list[Tensor], numbers: dict[str, Any], grid: tuple[int, int], g: Tensor) -> Moments:
        weight, pull = g.new_empty(grid[1], len(g)), g.new_empty(grid[1], len(g))
        if len(g):
            _moments[grid](*tensors, weight, pull, **numbers)
        return Moments(weight.sum(0), pull.sum(0))

    def moments(self, rows: Rows, r: float, lse: Tensor, g: Tensor) -> Moments:
        tensors, offset, numbers, grid = self._given(rows, r)
        g = g.contiguous()
        return self._moments([*tensors, lse + offset, (g * rows.own).sum(1), g], numbers, grid, g)

    def pull_back(
        self, rows: Rows, r: float, posterior: Sums, g: Tensor, grad_target: Tensor | None,
        shift: Tensor | None, into: AnchorGradient,
    ) -> Cotangent:  # fmt: skip
        g = g.contiguous()
        tensors, offset, numbers, grid = self._given(rows, r)
        tensors += [posterior.lse + offset, (g * rows.own).sum(1), g]
        if shift is None:
            shift = self._moments(tensors, numbers, grid, g).shift(posterior.lse, grad_target)
        # without a cotangent of the target, groups have no part in the gradient
        numbers["GROUPED"] = numbers["GROUPED"] and grad_target is not None
        weight, total = g.new_empty(grid[1], len(g)), g.new_empty(grid[1], len(g))
        spread = g.new_empty(grid[1], *g.shape)
        if len(g):
            of_target = posterior.lse if grad_target is None else grad_target
            tensors += [posterior.target, of_target, shift]
            _backward_rows[grid](*tensors, weight, total, spread, **numbers)
            del numbers["chunk"]
            columns = (triton.cdiv(len(self), numbers["N"]),)
            _backward_anchors[columns](*tensors, into.anchors, into.radial, **numbers)
        summed = total.sum(0)
        return Cotangent(spread.sum(0).addcmul_(rows.own, summed[:, None], value=-1), summed, weight.sum(0))
