"""One rank, started by the tests: gradients of the gather, written to a folder; then what it takes long over alone."""

from __future__ import annotations

import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import _set_pg_timeout

from lzn_dist.distributed import Topology, gather_anchors
from lzn_dist.distributed.spread import once, spread
from lzn_dist.terminal import command
from lzn_dist.zones import align, alignment_loss, compute_latents


def shared_objective(everyone: torch.Tensor, rows: slice, weight: torch.Tensor) -> torch.Tensor:
    """W · (sum over the rank's samples) / N of a loss that couples all samples."""
    own = (everyone @ weight)[rows]
    anchors = gather_anchors(own)
    index = torch.arange(len(everyone))[rows]
    noise = everyone[rows, : weight.shape[1]] * 0.45
    latents = compute_latents(own, noise, anchors, index=index, steps=5)
    log_probs = align(latents, anchors.flip(0), len(everyone) - 1 - index, steps=5).log_probs
    return alignment_loss(log_probs) * Topology.current().world_size * len(own) / len(everyone)


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(24, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 6, dtype=torch.float64, generator=generator).requires_grad_()
    share = len(everyone) // world
    rows = slice(rank * share, (rank + 1) * share)
    loss = shared_objective(everyone, rows, weight)
    loss.backward()
    assert weight.grad is not None
    dist.all_reduce(weight.grad)
    dist.all_reduce(loss := loss.detach())
    if rank == 0:
        torch.save({"grad": weight.grad / world, "loss": loss / world}, folder / "gather.pt")
    # what one rank does alone may take longer than a collective may
    _set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    assert once(lambda: time.sleep(2) or "found") == "found"
    assert spread(3, lambda i: time.sleep(1.5 * i) or i) == [0, 1, 2]
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
