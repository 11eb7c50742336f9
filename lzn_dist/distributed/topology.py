"""Who we are among the processes of a run."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist


@dataclass(frozen=True)
class Topology:
    """rank of this process in 0..world_size−1."""

    rank: int = 0
    world_size: int = 1

    @staticmethod
    def current() -> Topology:
        """Of the default process group; a single process where there is none."""
        if dist.is_available() and dist.is_initialized():
            return Topology(dist.get_rank(), dist.get_world_size())
        return Topology()

    @property
    def is_main(self) -> bool:
        return self.rank == 0
