"""Gradient caching: peak memory and seconds of a step, over the global batch and over the micro-batch, one process.

    python tests/benchmarks/grad_cache.py [--quick] [--output FILE]

The representation task (two views, D = 256, 20 + 20 steps of flow, noise 0.45) with a small ResNet on 32x32 images of
noise; one step's gradients, forward and backward. Each row is a process of its own; memory is resident memory above
that with both views in it, sampled from a thread. The anchors' part is what the coupling cannot do without: anchors,
latents, their gradients and the kept states of the flow, (2·20 + 8) numbers of N x D.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from zones import Peak, machine

from lzn_dist.config import Config, load_config
from lzn_dist.objectives import Samples
from lzn_dist.step import TrainState, compute_gradients
from lzn_dist.wiring import single_state

ROOT = Path(__file__).parents[2]
DIM, SIZE, STEPS = 256, 32, 20
CACHED = [(1024, 128), (2048, 128), (4096, 128), (8192, 128), (2048, 32), (2048, 512), (2048, 2048), (8192, 512)]
UNCACHED = 1024


def config(batch: int, micro_batch: int) -> Config:
    return load_config(
        ROOT / "configs" / "digits_representation.yaml",
        [f"data.global_batch={batch}", f"micro_batch={micro_batch}", "data.embedded=none", f"data.image_size={SIZE}",
         "data.image_channels=3", f"latent.dim={DIM}", "encoder.channels=16", "encoder.blocks=[1,1,1]"],
    )  # fmt: skip


def make_state(settings: Config) -> TrainState:
    return single_state(settings, torch.device("cpu"))


def make_samples(batch: int) -> Samples:
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(batch, 3, SIZE, SIZE, generator=generator) * 2 - 1
    second = (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp_(-1, 1)
    index = torch.arange(batch)
    return Samples(0, index, index, (first, second), index % 10)


def measure(batch: int, micro_batch: int) -> dict[str, float]:
    """In the child process: one step's gradients, and a forward of the encoder over both views."""
    state = make_state(config(batch, micro_batch))
    compute_gradients(make_state(config(8, 4)), make_samples(8))  # libraries' buffers and thread pools
    samples = make_samples(batch)
    with Peak() as peak:
        start = time.perf_counter()
        compute_gradients(state, samples)
        seconds = time.perf_counter() - start
    parts = state.objective.watch.take()
    start = time.perf_counter()
    chunk = micro_batch or batch
    for view in range(2):
        for begin in range(0, batch, chunk):
            part = samples.part(slice(begin, begin + chunk))
            state.engine.forward(lambda networks, p=part, v=view: state.objective.encode(networks, p, v))  # type: ignore[misc]
    forward = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak.most, "forward": forward, "flow": parts.get("flow", 0.0)}


def spawn(batch: int, micro_batch: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--child", str(batch), str(micro_batch)]
    result = subprocess.run(command, check=True, capture_output=True, text=True)
    found: dict[str, float] = json.loads(result.stdout.splitlines()[-1])
    print(f"global {batch}, micro {micro_batch or batch}: {found}", file=sys.stderr, flush=True)
    return found


def table(sizes: list[tuple[int, int]], uncached: int) -> str:
    lines = [
        "# Gradient caching", "", f"{machine()}.",
        f"Representation task, D = {DIM}, {STEPS} + {STEPS} steps, small ResNet on {SIZE}x{SIZE} images, float32; "
        "forward and backward of one step.", "",
        "| global batch | micro-batch | peak MB | anchors' part MB | step s | flow forward s | encoder forward s |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for batch, micro in sizes:
        found = spawn(batch, micro)
        least = (2 * STEPS + 8) * batch * DIM * 4 / 1e6
        lines.append(
            f"| {batch} | {micro} | {found['memory']:.0f} | {least:.0f} | {found['seconds']:.1f} "
            f"| {found['flow']:.1f} | {found['forward']:.1f} |"
        )
    plain, cached = spawn(uncached, 0), spawn(uncached, min(128, uncached))
    extra = (cached["seconds"] - plain["seconds"]) / cached["forward"]
    lines += [
        "",
        f"Without caching, global batch {uncached}: {plain['memory']:.0f} MB and {plain['seconds']:.1f} s; with "
        f"micro-batches of 128: {cached['memory']:.0f} MB and {cached['seconds']:.1f} s, "
        f"{cached['seconds'] / plain['seconds']:.2f} times, the difference being {extra:.2f} forwards of the encoder.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches alone")
    parser.add_argument("--output", type=Path, help="also write the table there")
    parser.add_argument("--child", nargs=2, type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        print(json.dumps(measure(*arguments.child)))
        return
    text = table([(256, 64), (512, 64)], 256) if arguments.quick else table(CACHED, UNCACHED)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
