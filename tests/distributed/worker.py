"""One rank, started by the tests: gradients of the gather, then a few training steps, written to a folder."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

from lzn_dist.distributed import Topology, gather_anchors
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
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
