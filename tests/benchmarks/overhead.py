"""The overhead of LZN's representation objective over SimCLR's loss: same encoder, views, batch, engine, optimiser.

    python tests/benchmarks/overhead.py [--quick] [--output FILE]

SimCLR's loss is NT-Xent (arXiv 2002.05709, equation 1; temperature 0.1) on the same anchors, normalised. Whole steps
(encode two views, loss, backward, Adam, averages) of the two alternate in one process; medians and their quartiles.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from grad_cache import ROOT, make_state
from torch import Tensor
from zones import machine

from lzn_dist.config import load_config
from lzn_dist.objectives import Samples
from lzn_dist.step import TrainState, apply_gradients, compute_gradients

CASES: dict[str, tuple[int, int, list[str]]] = {
    "digits encoder, 8x8, batch 256, D 64": (256, 8, []),
    "ResNet-50, 64x64, batch 96, D 256": (
        96, 64, ["encoder.channels=64", "encoder.blocks=[3,4,6,3]", "encoder.stem=imagenet", "latent.dim=256"],
    ),
}  # fmt: skip


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over both directions of −log softmax at the pair, all 2b − 2 others being negatives."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    b = len(first)
    return F.cross_entropy(logits, torch.arange(2 * b).roll(b))


def lzn_step(state: TrainState, samples: Samples) -> None:
    compute_gradients(state, samples)
    apply_gradients(state)


def simclr_step(state: TrainState, samples: Samples) -> None:
    def loss(networks: object) -> tuple[Tensor, None]:
        first, second = (state.objective.encode(networks, samples, view) for view in range(2))  # type: ignore[arg-type]
        return nt_xent(first, second), None

    state.engine.backward(loss)
    apply_gradients(state)


def loss_alone(state: TrainState, samples: Samples, anchors: list[Tensor], lzn: bool) -> None:
    leaves = [value.detach().requires_grad_() for value in anchors]
    loss = state.objective.couple(leaves, None, samples).loss if lzn else nt_xent(*leaves)
    assert loss is not None
    loss.backward()


def quartiles(times: list[float]) -> tuple[float, float, float]:
    low, middle, high = statistics.quantiles(times, n=4)
    return low, middle, high


def alternate(functions: list[Callable[[], None]], seconds: float) -> list[list[float]]:
    """Seconds of each call, taking turns for a span, four turns at least, the first one not counted."""
    times: list[list[float]] = [[] for _ in functions]
    end = time.perf_counter() + seconds
    while len(times[0]) < 5 or time.perf_counter() < end:
        for function, found in zip(functions, times, strict=True):
            start = time.perf_counter()
            function()
            found.append(time.perf_counter() - start)
    return [found[1:] for found in times]


def case(batch: int, size: int, overrides: list[str], seconds: float) -> list[tuple[str, list[float], list[float]]]:
    channels = 1 if size == 8 else 3
    data = [] if size == 8 else ["data.embedded=none", f"data.image_size={size}", "data.image_channels=3"]
    settings = load_config(
        ROOT / "configs" / "digits_representation.yaml", [f"data.global_batch={batch}", *data, *overrides]
    )
    generator = torch.Generator().manual_seed(0)
    first = torch.rand(batch, channels, size, size, generator=generator) * 2 - 1
    index = torch.arange(batch)
    samples = Samples(0, index, index, (first, (first * 0.9).clamp(-1, 1)), index % 10)
    ours, theirs = make_state(settings), make_state(settings)
    lzn, simclr = alternate([lambda: lzn_step(ours, samples), lambda: simclr_step(theirs, samples)], seconds)
    networks = ours.engine.networks
    anchors = [ours.objective.encode(networks, samples, view).detach() for view in range(2)]
    lzn_loss, simclr_loss = alternate(
        [lambda lzn=lzn: loss_alone(ours, samples, anchors, lzn) for lzn in (True, False)],  # type: ignore[misc]
        seconds / 4,
    )
    return [("whole step", lzn, simclr), ("loss, forward and backward", lzn_loss, simclr_loss)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a few calls each")
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    lines = [
        "# LZN's objective beside SimCLR's loss", "", f"{machine()}.",
        "Euler 20 + 20 steps, noise 0.45, float32. Medians (quartiles) in ms.", "",
        "| encoder | what | LZN | SimCLR | LZN/SimCLR |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for name, (batch, size, overrides) in CASES.items():
        for what, lzn, simclr in case(batch, size, overrides, 1.0 if arguments.quick else 60.0):
            (a, m, b), (c, n, d) = quartiles(lzn), quartiles(simclr)
            lines.append(
                f"| {name} | {what} | {m * 1e3:.1f} ({a * 1e3:.1f} to {b * 1e3:.1f}) "
                f"| {n * 1e3:.1f} ({c * 1e3:.1f} to {d * 1e3:.1f}) | {m / n:.2f} |"
            )
            print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
