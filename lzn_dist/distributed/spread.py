"""Work without gradients, spread over ranks: evaluation. Results do not depend on how many ranks there are."""

from __future__ import annotations

import functools
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from lzn_dist.distributed.topology import Topology

T = TypeVar("T")
PATIENCE = timedelta(days=1)


@functools.lru_cache(maxsize=1)
def _patient(_: Any) -> Any:
    """A group for what may take long on one rank, as no collective of training may (collective_timeout): the others
    wait on the host. Made once a world; collective."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def spread(count: int, work: Callable[[int], T]) -> list[T]:
    """[work(0), …, work(count − 1)] on every rank, each computed by one of them. Collective.

    Results travel pickled: keep tensors on the CPU. An error of any rank is raised on all of them.
    """
    topology = Topology.current()
    if topology.world_size == 1:
        return [work(i) for i in range(count)]
    group = _patient(dist.group.WORLD)
    parts: list[Any] = [None] * topology.world_size
    own = _caught(lambda: {i: work(i) for i in range(topology.rank, count, topology.world_size)})
    dist.all_gather_object(parts, own, group=group)
    joined: dict[int, T] = {}
    for part in parts:
        joined |= _result(part)
    return [joined[i] for i in range(count)]


def once(work: Callable[[], T]) -> T:
    """work() of the main process, on every rank; an error of it too. Collective."""
    if Topology.current().world_size == 1:
        return work()
    group = _patient(dist.group.WORLD)
    shared: list[Any] = [_caught(work) if Topology.current().is_main else None]
    dist.broadcast_object_list(shared, group=group)
    found: T = _result(shared[0])
    return found


def _caught(work: Callable[[], T]) -> T | Exception:
    try:
        return work()
    except Exception as error:
        return error


def _result(found: T | Exception) -> T:
    if isinstance(found, Exception):
        raise found
    return found
