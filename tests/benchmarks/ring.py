"""Time and peak memory of latents + alignment + backward on several gloo ranks: anchors in a ring against gathered.

    python tests/benchmarks/ring.py [--quick] [--output FILE]

Each figure comes from processes of its own. Each rank holds N / W anchors of either view and flows the first of them
(--rows, or all with 0). Memory is resident memory above that before the first call, sampled from a thread: the inputs
and the libraries are not in it, the gathered anchors and all that is made of them are.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from zones import Peak, machine

from lzn_dist.distributed import gather_anchors
from lzn_dist.distributed.ring import ring_field
from lzn_dist.zones import align, alignment_loss, compute_latents

DIM, STEPS = 256, 20
VARIANTS = ("gathered", "ring")


def flow(variant: str, anchors: Tensor, others: Tensor, noise: Tensor) -> float:
    """Latents of the first rows of this rank's anchors [N / W, d], aligned along the others [N / W, d]; backward."""
    rows = len(noise)
    index = torch.arange(rows) + dist.get_rank() * len(anchors)
    if variant == "ring":
        field, all_anchors, all_others = ring_field(), anchors, others
    else:
        field, all_anchors, all_others = None, gather_anchors(anchors), gather_anchors(others)
    latents = compute_latents(anchors[:rows], noise, all_anchors, index=index, steps=STEPS, field=field)
    loss = alignment_loss(align(latents, all_others, index, steps=STEPS, field=field).log_probs)
    loss.backward()
    return loss.item()


def data(count: int, rows: int, view: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(dist.get_rank())
    anchors, others = torch.randn(count, DIM, generator=g), torch.randn(count, DIM, generator=g)
    if view == "aligned":
        others = anchors + 0.5 * others
    return anchors.requires_grad_(), others.requires_grad_(), 0.45 * torch.randn(rows, DIM, generator=g)


def measure(variant: str, n: int, rows: int, view: str, calls: int) -> dict[str, float]:
    """In each rank: least seconds of the calls, the slowest rank's, and peak MB of the first, the largest rank's."""
    world = dist.get_world_size()
    flow(variant, *data(8, 4, view))  # libraries' buffers, thread pools and connections
    inputs = data(n // world, min(rows or n, n // world), view)
    seconds, memory = [], []
    for _ in range(calls):
        dist.barrier()
        with Peak() as peak:
            start = time.perf_counter()
            loss = flow(variant, *inputs)
            seconds.append(time.perf_counter() - start)
        memory.append(peak.most)
    worst = torch.tensor([min(seconds), memory[0]])
    dist.all_reduce(worst, dist.ReduceOp.MAX)
    total = torch.tensor(loss)
    dist.all_reduce(total)
    return {"seconds": float(worst[0]), "memory": float(worst[1]), "loss": float(total) / world}


def child(arguments: list[str]) -> None:
    variant, n, rows, view, calls = arguments
    dist.init_process_group("gloo")
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // dist.get_world_size()))
    found = measure(variant, int(n), int(rows), view, int(calls))
    if dist.get_rank() == 0:
        print(json.dumps(found), flush=True)
    dist.destroy_process_group()


def spawn(world: int, *arguments: object) -> dict[str, float]:
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={world}", __file__]
    result = subprocess.run([*launch, "--child", *map(str, arguments)], check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    print(f"{world} ranks, {arguments}: {found}", file=sys.stderr, flush=True)
    return found


def table(sizes: list[int], rows: int, calls: int) -> str:
    lines = [
        "# Ring: anchors that stay on their ranks, against gathered ones",
        "",
        f"{machine()}.",
        f"D = {DIM}, float32, {STEPS} latent steps and {STEPS} alignment steps, forward and backward; gloo ranks on",
        "one machine, of N anchors N(0, 1) of either view N / W on each.",
        f"A rank flows {f'at most {rows}' if rows else 'all'} of them. View 2 is view 1 + 0.5 noise (aligned) or drawn",
        "apart (unaligned). Memory is a rank's, above the inputs, in MB, on the first call; seconds are the least of",
        f"{calls} calls.",
        "",
        "| ranks | N | view | gathered s | ring s | ring/gathered s | gathered MB | ring MB | ring/gathered MB |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for world in (2, 4):
        for n in sizes:
            for view in ("aligned", "unaligned"):
                gathered, ring = (spawn(world, variant, n, rows, view, calls) for variant in VARIANTS)
                assert abs(gathered["loss"] - ring["loss"]) <= 1e-4 * abs(gathered["loss"]) + 1e-6
                lines.append(
                    f"| {world} | {n} | {view} | {gathered['seconds']:.2f} | {ring['seconds']:.2f} "
                    f"| {ring['seconds'] / gathered['seconds']:.2f} | {gathered['memory']:.0f} | {ring['memory']:.0f} "
                    f"| {ring['memory'] / gathered['memory']:.2f} |"
                )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="512 anchors alone, two calls")
    parser.add_argument("--rows", type=int, default=256, help="samples that each rank flows; 0: all that it holds")
    parser.add_argument("--calls", type=int, default=5)
    parser.add_argument("--output", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=5, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child)
        return
    sizes, calls = ([512], 2) if arguments.quick else ([2048, 8192], arguments.calls)
    text = table(sizes, arguments.rows, calls)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
