"""The flow on a GPU: time, launches and waits of latents + alignment + backward, and its share of a ResNet-50 step.

    python tests/benchmarks/gpu.py [--quick] [--output FILE]

Zones: one GPU's share of the ImageNet case, b = 1024 of n = 8192 anchors, D = 256, 20 + 20 Euler steps, forward and
backward, float32. `ours` with kernels, their products on tensor cores and not, and with tiles of several sizes (the
default is marked); `published` is the paper's formula as published (`zones.py`); `attention` is the same number of
dense steps by scaled_dot_product_attention in float32, whose logits are too coarse for the flow (it is a speed to
compare with, not a way to compute it); `products` is what meeting every pair costs: scores twice in float64 and five
products in float32 a step, by torch.matmul. Milliseconds are medians of calls timed with CUDA events; launches and
synchronisations are the profiler's, of one call.

Step: the representation task's optimiser step at 1024 images of 224 x 224 (two views), gradients cached in
micro-batches of 128, in bf16 and in float32, with LZN's loss and with SimCLR's; the flow alone is LZN's loss and its
backward to the anchors of all images.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import zones
from grad_cache import representation
from overhead import RESNET_50, lzn_loss
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from lzn_dist.objectives import Samples
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import TrainState, train_step
from lzn_dist.zones import align, alignment_loss, block, compute_latents, kernels
from lzn_dist.zones.arguments import Backend

DIM, STEPS = zones.DIM, zones.STEPS
GPU = torch.device("cuda", 0)
TILES = [18, 20, 22, 24]  # binary logarithms of elements


def median_ms(function: Callable[[], object], calls: int) -> float:
    """Median milliseconds of a call, after one that is not counted."""
    function()
    found = []
    for _ in range(calls):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()  # type: ignore[no-untyped-call]
        function()
        end.record()  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        found.append(begin.elapsed_time(end))  # type: ignore[no-untyped-call]
    return statistics.median(found)


def counted(function: Callable[[], object]) -> tuple[int, int]:
    """Kernel launches and host synchronisations of one call."""
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        function()
    calls = {event.key: event.count for event in seen.key_averages()}
    launches = sum(count for key, count in calls.items() if "LaunchKernel" in key)
    waits = sum(count for key, count in calls.items() if "StreamSynchronize" in key)
    return launches, waits


def peak_mb(function: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    function()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 1e6


def inputs(b: int, n: int, view: str) -> tuple[Tensor, Tensor, Tensor]:
    first, second, noise = (value.detach().to(GPU) for value in zones.data(b, n, view))
    return first.requires_grad_(), second.requires_grad_(), noise


def ours(first: Tensor, second: Tensor, noise: Tensor, backend: Backend) -> None:
    index = torch.arange(len(noise), device=GPU)
    latents = compute_latents(first[: len(noise)], noise, first, index=index, steps=STEPS, backend=backend)
    alignment_loss(align(latents, second, index, steps=STEPS, backend=backend).log_probs).backward()


def attention(first: Tensor, second: Tensor, noise: Tensor) -> None:
    x = noise
    for anchors in (first, second):
        keys = anchors[None, None]
        for _ in range(STEPS):
            x = F.scaled_dot_product_attention(x[None, None], keys, keys)[0, 0]
    x.square().sum().backward()


def products_ms(b: int, n: int) -> float:
    w, a, q = torch.rand(b, n, device=GPU), torch.randn(n, DIM, device=GPU), torch.randn(b, DIM, device=GPU)
    a64, q64 = a.double(), q.double()
    parts: list[tuple[int, Callable[[], object]]] = [
        (2, lambda: q64 @ a64.T), (1, lambda: q @ a.T), (2, lambda: w @ a), (2, lambda: w.T @ q),
    ]  # fmt: skip
    return 2 * STEPS * sum(count * median_ms(part, 20) for count, part in parts)


def zone_rows(sizes: list[tuple[int, int]], calls: int) -> list[str]:
    lines = [
        "| b | n | view | what | ms | launches | waits | peak MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    default = block.tile_elements

    def row(b: int, n: int, view: str, what: str, function: Callable[[], object], counts: bool = True) -> None:
        memory = peak_mb(function)
        launches, waits = counted(function) if counts else ("", "")
        ms = median_ms(function, calls)
        lines.append(f"| {b} | {n} | {view} | {what} | {ms:.1f} | {launches} | {waits} | {memory:.0f} |")
        print(lines[-1], flush=True)

    for b, n in sizes:
        for view in ("sphere", "clusters 0.3"):
            given = inputs(b, n, view)
            for products in dict.fromkeys((kernels.PRECISION, "ieee")):
                with mock.patch.object(kernels, "PRECISION", products):
                    what = f"ours, kernels, {products} products"
                    row(b, n, view, what, lambda given=given: ours(*given, "triton"))  # type: ignore[misc]
            for power in TILES:
                block.tile_elements = lambda device, power=power: 1 << power  # type: ignore[misc]
                mark = ", the default" if default(GPU) == 1 << power else ""
                row(b, n, view, f"ours, tiles of 2^{power}{mark}", lambda given=given: ours(*given, "tiled"))  # type: ignore[misc]
            block.tile_elements = default
        row(b, n, "", "attention, float32", lambda given=given: attention(*given))  # type: ignore[misc]
        lines.append(f"| {b} | {n} | | products | {products_ms(b, n):.1f} | | | |")
        print(lines[-1], flush=True)
        broadcast = b * n * DIM * 4 * 8  # its tensors alive at once
        if broadcast < torch.cuda.get_device_properties(GPU).total_memory:
            row(b, n, view, "published", lambda given=given: zones.published(*given), counts=False)  # type: ignore[misc]
    return lines


def samples(batch: int, size: int) -> Samples:
    generator = torch.Generator(GPU).manual_seed(0)
    first = torch.rand(batch, 3, size, size, generator=generator, device=GPU) * 2 - 1
    index = torch.arange(batch, device=GPU)
    return Samples(0, index, index, {"image": (first, first.flip(3))}, index % 10)


def step_rows(batch: int, size: int, calls: int) -> list[str]:
    lines = [
        "| precision | LZN ms | images/s | SimCLR ms | flow alone ms | flow's share | peak GB |",
        "|---|---|---|---|---|---|---|",
    ]
    batch_of_images = samples(batch, size)
    for precision in ("bf16", "float32"):
        found = {}
        states: dict[str, TrainState] = {}
        for objective in ("lzn", "simclr"):
            more = (f"precision={precision}", "micro_batch=128", f"objective={objective}")
            states[objective] = single_state(representation(batch, size, 3, (*RESNET_50, *more)), GPU)
            state = states[objective]
            torch.cuda.reset_peak_memory_stats()
            found[objective] = median_ms(lambda state=state: train_step(state, batch_of_images), calls)  # type: ignore[misc]
            if objective == "lzn":
                memory = torch.cuda.max_memory_allocated() / 1e9
        anchors = [torch.randn(batch, DIM, device=GPU) for _ in range(2)]
        lzn = states["lzn"]
        flow = median_ms(lambda lzn=lzn, anchors=anchors: lzn_loss(lzn, batch_of_images, anchors), 5)  # type: ignore[misc]
        lines.append(
            f"| {precision} | {found['lzn']:.0f} | {1e3 * batch / found['lzn']:.0f} | {found['simclr']:.0f} "
            f"| {flow:.1f} | {100 * flow / found['lzn']:.1f} % | {memory:.1f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, a few calls")
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    start = time.perf_counter()
    quick = arguments.quick
    lines = [
        "# The flow on a GPU", "",
        f"{torch.cuda.get_device_name(GPU)}, torch {torch.__version__}, {time.strftime('%Y-%m-%d')}.", "",
        f"## Latents, alignment and their backward (D = {DIM}, {STEPS} + {STEPS} steps, float32)", "",
        *zone_rows([(64, 512)] if quick else [(256, 2048), (1024, 8192)], 3 if quick else 7), "",
        "## A ResNet-50 step of the representation task, 224 x 224, two views, micro-batches of 128", "",
        f"Global batch {128 if quick else 1024}, one process (n = b). Flow alone: latents, alignment and backward.", "",
        *step_rows(128 if quick else 1024, 224, 2 if quick else 3),
    ]  # fmt: skip
    text = "\n".join(lines) + "\n"
    print(f"{time.perf_counter() - start:.0f} s in all")
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
