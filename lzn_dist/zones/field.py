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

Log-sum-exps are float64 whatever the dtype, and so are scores (they are differences of numbers of size ‖q‖‖a‖), unless
r² ‖a‖² ≤ 100, where float32 has the digits; weights and all other products are in the anchors' dtype. Float32 scores
everywhere would change the loss by 10⁻² instead of 10⁻⁶. Bounds of float32 anchors against float64, over adversarial
ones (tests/zones/test_float32.py): latents 2·10⁻⁶, the loss 4·10⁻⁶, gradients 5·10⁻³ of their norm, all
of it where anchors are nearly equal (10⁻⁴ elsewhere).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from importlib.util import find_spec
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from lzn_dist.zones.block import KERNEL_DIM, AnchorGradient, Block, Rows, tile_elements
from lzn_dist.zones.pairs import PairScores
from lzn_dist.zones.partial import Part, Posterior, Sums


class Field(Protocol):
    """The field as a trajectory sees it. Anchors are numbered 0..count−1; this process holds `held` from `start` on.

    Where anchors are spread over processes, every method but the last two is collective: all processes call it
    together, some with no rows, and `wanted` tells them when.
    """

    count: int
    start: int
    held: int
    centre: Tensor
    weighted: bool  # log-weights are not equal
    grouped: bool  # anchors have groups

    def wanted(self, here: list[bool]) -> list[bool]:
        """Which of these are wanted by any process."""

    def posterior(self, rows: Rows, r: float, *, settle: bool = False) -> Posterior:
        """The field at rows.e; settle: with `settled`, `partner` and `heaviest`."""

    def vjp(
        self, rows: Rows, r: float, sums: Sums, grad_delta: Tensor, grad_target: Tensor | None, into: AnchorGradient
    ) -> tuple[Tensor, Tensor]:
        """Cotangents of e and of the references [b, d] for those of delta [b, d] and `Sums.target` [b]; the anchors'
        are added to `into`."""

    def reach(self, rows: Rows) -> Tensor:
        """[b] float64: from which r downwards each row, starting at e, feels another anchor than its own."""

    def near_posterior(self, rows: Rows, references: Tensor, r: float) -> Posterior:
        """As `posterior`, of rows that have not moved yet, at an r where products have no accurate digits.
        references [b, d]: not centred."""

    def near_vjp(
        self, rows: Rows, references: Tensor, r: float, sums: Sums, grad_delta: Tensor, into: AnchorGradient
    ) -> tuple[Tensor, Tensor]:
        """As `vjp`, for `near_posterior`."""

    def gradient(self) -> AnchorGradient:
        """Of the anchors that this process holds, at zero."""

    def deliver(self, numbers: Tensor, cotangents: Tensor, into: AnchorGradient) -> None:
        """Add cotangents [p, d] of the anchors with these numbers [p]."""

    def finish(self, into: AnchorGradient) -> None:
        """Apply what `vjp` deferred; once, after everything else. Not collective."""


@runtime_checkable
class FieldFactory(Protocol):
    """Makes the field of anchors [n, d], with log-weights [n] or None for equal ones, groups int64 [n] or None, and a
    backend: auto, tiled or triton (see `block_class`)."""

    def __call__(
        self, anchors: Tensor, log_weights: Tensor | None, groups: Tensor | None, backend: str, /
    ) -> Field: ...


def block_class(backend: str, anchors: Tensor) -> type[Block]:
    """What computes: tiles of matrix products, or the kernels of `lzn_dist.zones.kernels`; auto takes these on a GPU
    where Triton is installed. Raises ValueError where triton is asked for and cannot be."""
    fits = anchors.shape[1] <= KERNEL_DIM
    if backend != "triton" and not (backend == "auto" and anchors.is_cuda and fits and find_spec("triton")):
        return Block
    if find_spec("triton") is None:
        raise ValueError("backend triton: Triton is not installed; install lzn_dist[gpu], or use backend tiled")
    if not fits:
        raise ValueError(f"backend triton is for at most {KERNEL_DIM} dimensions, got {anchors.shape[1]}: use tiled")
    from lzn_dist.zones.kernels import INTERPRETED, FusedBlock

    if not (anchors.is_cuda or INTERPRETED):
        raise ValueError(
            "backend triton needs a GPU; on a CPU use auto or tiled (TRITON_INTERPRET=1 runs it slowly, for tests)"
        )
    return FusedBlock


class AnchorField:
    """The field of one set of anchors [n, d] (float32 or float64), with log_weights [n] (−inf: absent; None: equal)
    and groups int64 [n] or None.

    Here they are one block, on this process. A subclass may let them come in several: it gives this process' block,
    the centre, the start and the count of all, and overrides `blocks`, `gradient_blocks` and `wanted`.
    """

    def __init__(
        self, anchors: Tensor, log_weights: Tensor | None = None, groups: Tensor | None = None,
        backend: str = "auto", *,
        centre: Tensor | None = None, start: int = 0, count: int | None = None,
    ) -> None:  # fmt: skip
        block = block_class(backend, anchors)
        self.start, self.held = start, len(anchors)
        self.count = self.held if count is None else count
        self.weighted, self.grouped = log_weights is not None, groups is not None
        # the field is invariant to a common shift; without it, clustered anchors would lose digits to their mean
        self.centre = anchors.mean(0) if centre is None else centre
        self.block = block(anchors, self.centre, start, log_weights, groups, whole=count is None)
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

    def posterior(self, rows: Rows, r: float, *, settle: bool = False) -> Posterior:
        """Two products a row."""
        parts = (block.part(rows, r, settle=settle) for block in self.blocks() if len(block))
        return _merged(parts).conclude(self.threshold)

    def vjp(
        self, rows: Rows, r: float, sums: Sums, grad_delta: Tensor, grad_target: Tensor | None, into: AnchorGradient
    ) -> tuple[Tensor, Tensor]:
        """One block: five products a row. Several: two more, as dS needs a sum over all anchors first."""
        shift = None
        if not self.block.whole:
            moments = (block.moments(rows, r, sums.lse, grad_delta) for block in self.blocks() if len(block))
            shift = _merged(moments).shift(sums.lse, grad_target)
        parts = (
            block.pull_back(rows, r, sums, grad_delta, grad_target, shift, gradient)
            for block, gradient in self.gradient_blocks(into)
            if len(block)
        )
        return _merged(parts).conclude(rows.e, grad_delta, r)

    def reach(self, rows: Rows) -> Tensor:
        farthest = rows.e.new_zeros(len(rows), dtype=torch.float64)
        for block in self.blocks():
            if len(block):
                farthest = torch.maximum(farthest, block.reach(rows, self.threshold))
        return farthest

    def _near(self, block: Block, rows: Rows, references: Tensor, r: float) -> PairScores:
        # cancellation blurs the roots of tiny distances; a factor two covers it and the pairs are exact anyway
        pairs = block.near(rows, self.threshold, 0.5 * r)
        ratios = None
        if block.log_weights is not None and rows.log_weights is not None:
            ratios = block.log_weights[pairs.columns] - rows.log_weights[pairs.rows]
        return PairScores(block.raw, rows.e, references, pairs, r, tile_elements(rows.e.device), ratios)

    def near_posterior(self, rows: Rows, references: Tensor, r: float) -> Posterior:
        parts = (self._near(block, rows, references, r).part() for block in self.blocks() if len(block))
        found = _merged(parts).conclude(self.threshold)
        return Posterior(found.delta.to(rows.e.dtype), found.sums)

    def near_vjp(
        self, rows: Rows, references: Tensor, r: float, sums: Sums, grad_delta: Tensor, into: AnchorGradient
    ) -> tuple[Tensor, Tensor]:
        g, lse = grad_delta.double(), sums.lse
        moments = (self._near(block, rows, references, r).moments(lse, g) for block in self.blocks() if len(block))
        shift = _merged(moments).shift(lse, None)
        parts = (
            self._near(block, rows, references, r).pull_back(lse, g, shift, gradient.anchors)
            for block, gradient in self.gradient_blocks(into)
            if len(block)
        )
        return _merged(parts).conclude(rows.e, grad_delta, r)

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
