"""The anchors of the global batch on every rank, with gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lzn_dist.distributed.topology import Topology

# by their names since torch 2.13, or those of before
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class _GatherAnchors(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, anchors: Tensor) -> Tensor:
        gathered = anchors.new_empty(len(anchors) * Topology.current().world_size, *anchors.shape[1:])
        _all_gather(gathered, anchors.contiguous())
        return gathered

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        # a sum: every rank's loss depends on every anchor
        total = grads[0].new_empty(len(grads[0]) // Topology.current().world_size, *grads[0].shape[1:])
        _reduce_scatter(total, grads[0].contiguous())
        return total


def gather_anchors(anchors: Tensor) -> Tensor:
    """[b, ...] on each rank → [W · b, ...] on every one of W ranks, in rank order; b is the same on all ranks, as the
    stream's shares of a global batch are.

    Differentiable: the backward sums the cotangents of all ranks. With an engine that *averages* parameter gradients
    over W ranks, a rank's loss is its local mean: W · (sum over its samples) / N. Then the gradients are those of one
    process on the global batch. Collective, in the backward as well; nothing is read back to the host.
    """
    if Topology.current().world_size == 1:
        return anchors
    gathered: Tensor = _GatherAnchors.apply(anchors)
    return gathered
