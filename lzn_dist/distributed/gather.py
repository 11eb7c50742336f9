"""The anchors of the global batch on every rank, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lzn_dist.distributed.topology import Topology


def gather_rows(rows: Tensor) -> Tensor:
    """Concatenate [b, ...] over ranks in rank order, without gradients; b may differ between ranks."""
    world_size = Topology.current().world_size
    if world_size == 1:
        return rows
    counts = _row_counts(rows)
    # gloo gathers only equal shapes
    padded = rows.new_zeros(max(counts), *rows.shape[1:])
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size)]
    dist.all_gather(parts, padded.contiguous())
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def _row_counts(rows: Tensor) -> list[int]:
    own = torch.tensor([len(rows)], device=rows.device)
    counts = [torch.empty_like(own) for _ in range(Topology.current().world_size)]
    dist.all_gather(counts, own)
    return [int(count) for count in torch.cat(counts)]


class _GatherAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor) -> Tensor:
        counts = _row_counts(anchors)
        rank = Topology.current().rank
        ctx.start, ctx.count = sum(counts[:rank]), counts[rank]
        return gather_rows(anchors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # The reduce-scatter is a sum: every rank's loss depends on every anchor. (gloo has no reduce-scatter.)
        total = grads[0].contiguous().clone()
        dist.all_reduce(total)
        return total[ctx.start : ctx.start + ctx.count]


def gather_anchors(anchors: Tensor) -> Tensor:
    """[b, d] on each rank → [sum of b over ranks, d] on every rank, in rank order; b may differ between ranks.

    Differentiable: the backward sums the cotangents of all ranks. With an engine that *averages* parameter gradients
    over W ranks, a rank's loss is W · (sum over its samples) / N: for equal shares, its local mean. Then the gradients
    are those of one process on the global batch. Collective, in the backward as well.
    """
    if Topology.current().world_size == 1:
        return anchors
    gathered: Tensor = _GatherAnchors.apply(anchors)
    return gathered
