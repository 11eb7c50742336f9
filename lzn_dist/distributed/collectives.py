"""Small objects to and from all processes."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist

from lzn_dist.distributed.topology import Topology
from lzn_dist.engines.launch import T


def broadcast_object(value: str | None) -> str | None:
    """The main process's value on every process (which checkpoint to resume from, say)."""
    shared: list[str | None] = [value]
    if Topology.current().world_size > 1:
        dist.broadcast_object_list(shared)
    return shared[0]


def all_gather_object(value: T) -> list[T]:
    """Every process's (small) value, by rank, on every process."""
    if Topology.current().world_size == 1:
        return [value]
    found: list[Any] = [None] * Topology.current().world_size
    dist.all_gather_object(found, value)
    return found
