"""The overhead of LZN's representation objective over SimCLR's loss: same encoder, views, batch, engine, optimiser.

    python tests/benchmarks/overhead.py [--quick] [--output FILE]

SimCLR's loss is NT-Xent (arXiv 2002.05709, equation 1; temperature 0.1) on the same anchors, normalised. Both train
from the same weights on one batch of smooth random images. Whole steps (encode two views, loss, backward, clipping,
Adam, averages) of the two take turns in one process, in alternating order, then the losses alone (forward and backward
to the anchors) on the anchors of LZN's trained encoder. Ratios are taken within a turn; medians and quartiles. As the
steps differ in the loss alone, 1 + (LZN's loss − SimCLR's loss) / SimCLR's step is their ratio with less noise where
the encoder's seconds scatter: "from the parts".
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from common import machine
from grad_cache import CPU, ENCODER, make_samples, representation, spread, take_turns
from torch import Tensor

from lzn_dist.config import load_config
from lzn_dist.networks import Networks
from lzn_dist.objectives import Samples
from lzn_dist.training.optimizer import schedule
from lzn_dist.training.setup import single_state
from lzn_dist.training.step import TrainState, apply_gradients, train_step


@dataclass
class Case:
    """turns: of whole steps; the losses alone take loss_turns."""

    name: str
    batch: int
    size: int
    channels: int
    overrides: tuple[str, ...]
    turns: int
    loss_turns: int = 30


RESNET_50 = (
    f"{ENCODER}.channels=64", f"{ENCODER}.blocks=[3,4,6,3]", f"{ENCODER}.stem=imagenet", "latent.dim=256",
)  # fmt: skip


def alignment_of(name: str) -> tuple[str, ...]:
    """How a configuration of configs/ makes latents and aligns them, as overrides."""
    found = load_config(name)
    length = json.dumps(found.modalities["image"].anchor_norm)
    return (
        f"alignment={found.alignment.model_dump_json()}", f"latent.steps={found.latent.steps}",
        f"latent.noise_scale={found.latent.noise_scale}",
        f"modalities.image.anchor_norm={length}",
    )  # fmt: skip


FULL = [
    Case("digits encoder, 8x8, batch 256, D 64", 256, 8, 1, (), 30),
    Case("so, digits_representation.yaml's 20 + 8 steps", 256, 8, 1, alignment_of("digits_representation"), 30),
    Case("so, 2 + 3 steps, both directions, soft", 256, 8, 1, alignment_of("mnist5k_representation_soft"), 30),
    Case("ResNet-50, 64x64, batch 128, D 256", 128, 64, 3, RESNET_50, 7),
]
QUICK = [
    Case("digits encoder, 8x8, batch 64, D 64", 64, 8, 1, (), 3, 3),
    Case("ResNet-50, 64x64, batch 8, D 256", 8, 64, 3, RESNET_50, 2, 3),
]


def nt_xent(first: Tensor, second: Tensor, temperature: float = 0.1) -> Tensor:
    """Mean over both directions of −log softmax at the pair, all 2b − 2 others being negatives."""
    z = F.normalize(torch.cat([first, second]), dim=1)
    logits = (z @ z.T / temperature).fill_diagonal_(-torch.inf)
    b = len(first)
    return F.cross_entropy(logits, torch.arange(2 * b).roll(b))


def simclr_step(state: TrainState, samples: Samples) -> None:
    """`train_step` with the other loss."""

    def loss(networks: Networks) -> tuple[Tensor, None]:
        first, second = (state.objective.encode(networks, samples, view) for view in state.objective.needs.encodes)
        return nt_xent(first, second), None

    schedule(state.engine, state.counters.step, state.config)
    state.engine.backward(loss)
    apply_gradients(state)


def lzn_loss(state: TrainState, samples: Samples, anchors: list[Tensor]) -> None:
    leaves = [value.clone().requires_grad_() for value in anchors]
    views = state.objective.needs.encodes
    loss = state.objective.relate(dict(zip(views, leaves, strict=True)), {}, samples).loss
    assert loss is not None
    loss.backward()


def simclr_loss(anchors: list[Tensor]) -> None:
    first, second = (value.clone().requires_grad_() for value in anchors)
    nt_xent(first, second).backward()


def measure(case: Case) -> tuple[list[list[float]], list[list[float]]]:
    """Seconds of each turn, LZN's and SimCLR's: whole steps, losses alone."""
    settings = representation(case.batch, case.size, case.channels, case.overrides)
    samples = make_samples(case.batch, case.size, case.channels)
    ours, theirs = single_state(settings, CPU), single_state(settings, CPU)
    steps = take_turns([lambda: train_step(ours, samples), lambda: simclr_step(theirs, samples)], case.turns)
    anchors = [
        ours.engine.forward(lambda networks, v=view: ours.objective.encode(networks, samples, v))  # type: ignore[misc]
        for view in ours.objective.needs.encodes
    ]
    losses = take_turns(
        [lambda: lzn_loss(ours, samples, anchors), lambda: simclr_loss(anchors)], case.loss_turns
    )  # fmt: skip
    return steps, losses


def rows(case: Case) -> list[str]:
    steps, losses = measure(case)
    extra = statistics.median(losses[0]) - statistics.median(losses[1])
    expected = f"{1 + extra / statistics.median(steps[1]):.3f}"
    lines = []
    for what, (lzn, simclr), parts in (("whole step", steps, expected), ("loss alone", losses, "")):
        ratios = [a / b for a, b in zip(lzn, simclr, strict=True)]
        shown = [spread([1e3 * value for value in times], 1) for times in (lzn, simclr)]
        lines.append(f"| {case.name} | {what} | {shown[0]} | {shown[1]} | {spread(ratios, 2)} | {parts} |")
        print(lines[-1], file=sys.stderr, flush=True)
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small batches, a few calls each")
    parser.add_argument("--output", type=Path, help="also write the table there")
    arguments = parser.parse_args()
    start = time.perf_counter()
    lines = [
        "# LZN's objective beside SimCLR's loss", "", f"{machine()}.",
        "Euler 20 + 20 steps, noise 0.45, where nothing else is said, float32; NT-Xent at temperature 0.1.",
        "Milliseconds and ratios within a turn, median (quartiles); from the parts: 1 + (LZN's loss − SimCLR's loss) /",
        "SimCLR's step.", "",
        "| encoder | what | LZN ms | SimCLR ms | LZN / SimCLR | from the parts |", "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for case in QUICK if arguments.quick else FULL:
        lines += rows(case)
    text = "\n".join(lines) + "\n"
    print(f"{time.perf_counter() - start:.0f} s in all", file=sys.stderr)
    print(text)
    if arguments.output:
        arguments.output.write_text(text)


if __name__ == "__main__":
    main()
