"""Gradient caching: peak memory and seconds of a step over the global batch and the micro-batch, and its overhead.

    python tests/benchmarks/grad_cache.py [--quick] [--output FILE]

A whole optimiser step of the representation task (two views, D = 256, 20 + 20 Euler steps of flow, noise 0.45) in one
process, with a small ResNet on smooth random 32x32 images.

Memory: each figure comes from the first step of a process of its own. It is resident memory above that before the
step, sampled from a thread, with the default allocator: activations, gradients, the coupling, and what the allocator
keeps of freed memory. Networks and both views of all images (float32) are there before and not in it; the views' size
stands in a column of its own. The anchors' part is what the coupling cannot do without, from its formula: of N x D
float32 numbers, 2 anchors, 2 gradients, 2 centred copies in float64 and 20 + 20 kept states, 48 in all.

Overhead: in one process the uncached step, the cached step and one forward of the encoder over both views take turns,
in alternating order; ratios are taken within a turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from common import Peak, machine, spawn

from lzn_dist.config import Config, load_config
from lzn_dist.objectives import Samples
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import TrainState, train_step

ROOT = Path(__file__).parents[2]
ENCODER = "modalities.image.encoder.arguments"
CPU = torch.device("cpu")
DIM, SIZE, STEPS = 256, 32, 20
MICRO = 128
# (global batches at MICRO, other micro-batches at the largest of them, batch of the overhead, its turns)
FULL = ([1024, 2048, 4096, 8192], [64, 512], 1024, 5)
QUICK = ([128, 256], [64], 128, 2)


def representation(batch: int, size: int, channels: int, overrides: Sequence[str]) -> Config:
    """Published settings of the objective on configs/digits_representation.yaml, for images that are no digits."""
    published = ["alignment.pairs=[{latents: image.1, anchors: image.2}]", f"alignment.steps={STEPS}",
                 "latent.noise_scale=0.45"]  # fmt: skip
    data = [f"data.global_batch={batch}", "data.embedded=none", f"data.image_size={size}"]
    return load_config(
        ROOT / "configs" / "digits_representation.yaml",
        [*published, *data, f"data.image_channels={channels}", *overrides],
    )


def make_samples(batch: int, size: int, channels: int) -> Samples:
    """Smooth random images, and the same with noise as second view: anchors neither all alike nor all apart."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.rand(batch, channels, 4, 4, generator=generator) * 2 - 1
    first = F.interpolate(coarse, size=(size, size), mode="bilinear").contiguous()
    second = (first + 0.3 * torch.randn(first.shape, generator=generator)).clamp_(-1, 1)
    index = torch.arange(batch)
    return Samples(0, index, index, {"image": (first, second)}, index % 10)


def config(batch: int, micro_batch: int) -> Config:
    return representation(
        batch, SIZE, 3,
        [f"micro_batch={micro_batch}", f"latent.dim={DIM}", f"{ENCODER}.channels=16", f"{ENCODER}.blocks=[1, 1, 1]"],
    )  # fmt: skip


def make_state(batch: int, micro_batch: int) -> TrainState:
    return single_state(config(batch, micro_batch), CPU)


def warm_up() -> None:
    """Libraries' buffers and thread pools."""
    for micro_batch in (0, 4):
        train_step(make_state(8, micro_batch), make_samples(8, SIZE, 3))


def one_step(batch: int, micro_batch: int) -> dict[str, float]:
    """In a child process. micro_batch 0: uncached."""
    warm_up()
    state, samples = make_state(batch, micro_batch), make_samples(batch, SIZE, 3)
    with Peak() as peak:
        start = time.perf_counter()
        train_step(state, samples)
        seconds = time.perf_counter() - start
    return {"seconds": seconds, "memory": peak.most, "flow": state.watch.take()["flow"]}


def encode_all(state: TrainState, samples: Samples, micro_batch: int) -> None:
    """One forward of the encoder over both views, as caching adds it."""
    for view in state.objective.needs.encodes:
        for start in range(0, len(samples), micro_batch):
            part = samples.part(slice(start, start + micro_batch))
            state.engine.forward(lambda networks, p=part, v=view: state.objective.encode(networks, p, v))  # type: ignore[misc]


def take_turns(functions: Sequence[Callable[[], object]], turns: int) -> list[list[float]]:
    """[function][turn]: seconds. Every second turn goes backwards; one turn before them is not counted."""
    times: list[list[float]] = [[] for _ in functions]
    for turn in range(turns + 1):
        order = range(len(functions)) if turn % 2 else reversed(range(len(functions)))
        for number in order:
            start = time.perf_counter()
            functions[number]()
            times[number].append(time.perf_counter() - start)
    return [found[1:] for found in times]


def spread(values: Sequence[float], digits: int) -> str:
    """Median (quartiles)."""
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
    return f"{middle:.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def overhead(batch: int, micro_batch: int, turns: int) -> dict[str, list[float]]:
    """In a child process: seconds of each turn."""
    samples = make_samples(batch, SIZE, 3)
    plain, cached = make_state(batch, 0), make_state(batch, micro_batch)
    functions: list[Callable[[], object]] = [
        lambda: train_step(plain, samples),
        lambda: train_step(cached, samples),
        lambda: encode_all(cached, samples, micro_batch),
    ]
    return dict(zip(("plain", "cached", "forward"), take_turns(functions, turns), strict=True))


def anchors_part(batch: int) -> float:
    """MB, see the top."""
    return (2 + 2 + 4 + 2 * STEPS) * batch * DIM * 4 / 1e6


def row(batch: int, micro_batch: int, found: dict[str, float]) -> str:
    views = 2 * batch * 3 * SIZE * SIZE * 4 / 1e6
    return (
        f"| {batch} | {micro_batch or 'uncached'} | {found['memory']:.0f} | {anchors_part(batch):.0f} "
        f"| {views:.0f} | {found['seconds']:.1f} | {found['flow']:.1f} |"
    )


def cached_rows(sizes: Sequence[tuple[int, int]]) -> list[str]:
    return [row(batch, micro_batch, spawn(__file__, "step", batch, micro_batch)) for batch, micro_batch in sizes]


def overhead_rows(batch: int, micro_batch: int, turns: int) -> list[str]:
    times: dict[str, list[float]] = spawn(__file__, "overhead", batch, micro_batch, turns)
    plain, cached, forward = times["plain"], times["cached"], times["forward"]
    figures = {
        "uncached step, s": plain,
        "cached step, s": cached,
        "encoder forward over both views, s": forward,
        "cached step / uncached step": [c / p for c, p in zip(cached, plain, strict=True)],
        "encoder forward / uncached step": [f / p for f, p in zip(forward, plain, strict=True)],
    }
    return [f"| {name} | {spread(values, 2)} |" for name, values in figures.items()]


HEAD = [
    "| global batch | micro-batch | peak MB | anchors' part MB | views MB (not in peak) | step s | flow forward s |",
    "|---|---|---|---|---|---|---|",
]


def table(batches: Sequence[int], micro_batches: Sequence[int], uncached: int, turns: int) -> str:
    largest, few = batches[-1], min(MICRO, uncached // 2)
    over_batch = cached_rows([(batch, MICRO) for batch in batches])
    over_micro = cached_rows([(largest, micro_batch) for micro_batch in micro_batches])
    plain = spawn(__file__, "step", uncached, 0)
    more = plain["memory"] * largest / uncached / 1e3
    lines = [
        "# Gradient caching", "", f"{machine()}.",
        f"A step of the representation task, D = {DIM}, {STEPS} + {STEPS} steps, float32, small ResNet on",
        f"{SIZE}x{SIZE} images; one call each. Memory is above that before the step, when networks and views are there",
        "already, and includes what the allocator keeps of freed memory. The anchors' part is computed:",
        f"{2 * STEPS + 8} N x D float32 numbers (anchors, gradients, float64 copies, kept states of the flow).", "",
        "Over the global batch:", "", *HEAD, *over_batch, "",
        f"Over the micro-batch ({MICRO} stands above):", "", *HEAD, *over_micro, "",
        "Without caching:", "", *HEAD, row(uncached, 0, plain), "",
        f"Extrapolated from that in proportion to the batch, not run: {more:.0f} GB at global batch {largest}.", "",
        f"Overhead at global batch {uncached}, micro-batch {few}: {turns} turns in one process, median (quartiles),",
        "ratios within a turn. Caching adds one forward of the encoder:", "", "| | |", "|---|---|",
        *overhead_rows(uncached, few, turns),
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def child(what: str, *numbers: int) -> None:
    print(json.dumps(one_step(*numbers) if what == "step" else overhead(*numbers)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches alone")
    parser.add_argument("--output", type=Path, help="also write the tables there")
    parser.add_argument("--child", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child(arguments.child[0], *map(int, arguments.child[1:]))
        return
    start = time.perf_counter()
    text = table(*(QUICK if arguments.quick else FULL))
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
