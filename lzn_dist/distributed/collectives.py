"""Small objects to and from all processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from lzn_dist.distributed.topology import Topology

T = TypeVar("T")


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


def sum_over_ranks(values: Sequence[float], device: torch.device) -> list[float]:
    """Each value's sum over ranks, on every rank; one collective, and a wait for the device. On it, in float32: whole
    numbers are exact up to 2²⁴."""
    if Topology.current().world_size == 1:
        return [float(value) for value in values]
    joined = torch.tensor([float(value) for value in values], device=device)
    dist.all_reduce(joined)
    return joined.tolist()
