"""Time and peak memory of latents + alignment + backward: tiled path, published form, and the products that remain.

    python tests/benchmarks/zones.py [--sizes N ...] [--batch B] [--kinds KIND ...] [--trained RUN ...]
        [--before CHECKOUT] [--output FILE.md]

b = n/8 samples (or always as many) among n anchors of 256 dimensions, on a sphere, in 64 clusters and N(0, 0.1²); their
second views 0.3 apart (0.1, in the tight clusters; 0.05); and those that a representation run's encoder gives to two
views of n training images (a run with latent.dim=256 and so many images, `glyphs_representation` say). Each figure
comes from a process of its own, which imports, warms up on a small batch and then samples its resident memory from a
thread. `before` is the tiled path of another checkout.
`published` is the form of the paper's formula as published: b × n × d differences, weights by exponentiating and
dividing, every step under torch.utils.checkpoint; up to 1,024 anchors. `dense` is what a path that meets every pair of
sample and anchor cannot do without, a step: the scores twice (in float64, in float32 where these are small enough),
five products in float32, two exponentials of float32. `left` is the share of these products that the flow does, the
others being straight lines; `over what is left` is its time over theirs; `growth` the time over the one before it in
the table, of the same kind. With --output the times are also drawn.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from common import Peak, clock, machine, spawn
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from lzn_dist.zones import SIGMA_MIN, AnchorField, align, alignment_loss, compute_latents

DIM, STEPS = 256, 20
SIZES = [1024, 2048, 4096, 8192]
KINDS = ["sphere", "clusters 0.3", "clusters 0.1", "small"]
PUBLISHED = 1024  # anchors; its memory and time grow with their square


def data(b: int, n: int, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, DIM, generator=g) for _ in range(2))
    if kind == "sphere":
        first = first / first.norm(dim=1, keepdim=True) * DIM**0.5
        second = first + 0.3 * second
    elif kind.startswith("clusters"):
        spread = float(kind.split()[1])
        centres = torch.randn(64, DIM, generator=g)[torch.arange(n) % 64]
        first, second = centres + spread * first, centres + spread * second
    elif kind.endswith(".pt"):  # of `encode`
        first, second = torch.load(kind)[:, :n].clone()
    elif kind == "small":
        first, second = 0.1 * first, 0.1 * first + 0.05 * second
    else:
        raise ValueError(kind)
    return first.requires_grad_(), second.requires_grad_(), 0.45 * torch.randn(b, DIM, generator=g)


def encode(run: Path, n: int, folder: Path) -> str:
    """Keep the anchors [2, n, d] of both views of a batch of n, by a run's weights: the file is the kind for `data`."""
    from lzn_dist.config import load_config
    from lzn_dist.distributed import Topology
    from lzn_dist.training.batches import open_stream, prepare_samples
    from lzn_dist.training.checkpoint import find_checkpoint, load_weights
    from lzn_dist.training.setup import single_state

    config = load_config(run / "config.yaml", [f"data.global_batch={n}", "micro_batch=0"])
    if config.latent.dim != DIM:
        raise SystemExit(f"{run} has anchors of {config.latent.dim} dimensions, not {DIM}: train with latent.dim={DIM}")
    cpu, found = torch.device("cpu"), find_checkpoint(run)
    state = single_state(config, cpu)
    load_weights(state.engine.networks, found)
    samples = prepare_samples(open_stream(config, Topology()).batch(0), 0, state.objective, cpu, Topology())
    with torch.no_grad():
        anchors = [
            state.objective.encode(state.engine.networks, samples, view) for view in state.objective.needs.encodes
        ]
    path = folder / f"trained {run.resolve().name}, {int(found.name.removeprefix('step_'))} steps.pt"
    if path.exists():
        raise SystemExit(f"two runs are called {run.resolve().name}: their rows could not be told apart")
    torch.save(torch.stack(anchors).float(), path)
    return str(path)


def tiled(first: Tensor, second: Tensor, noise: Tensor) -> float:
    b = len(noise)
    latents = compute_latents(first[:b], noise, first, steps=STEPS)
    loss = alignment_loss(align(latents, second, torch.arange(b), steps=STEPS).log_probs)
    loss.backward()
    return loss.item()


def published(first: Tensor, second: Tensor, noise: Tensor) -> float:
    def weights(x: Tensor, sigma: float, anchors: Tensor) -> Tensor:
        density = torch.exp(-0.5 * ((x[:, None] - (1 - sigma) * anchors[None]) / sigma).square().sum(-1))
        return density / density.sum(1, keepdim=True)

    def latent_step(x: Tensor, anchors: Tensor, sigma: float, h: float) -> Tensor:
        mean = (weights(x, sigma, anchors)[:, :, None] * anchors[None]).sum(1)
        return x + h * (x - mean) / sigma

    def align_step(x: Tensor, anchors: Tensor, sigma: float, h: float) -> tuple[Tensor, Tensor]:
        w = weights(x, sigma, anchors)
        mean = (w[:, :, None] * anchors[None]).sum(1)
        return x - h * (x - mean) / sigma, w.diagonal()

    sigma, h = SIGMA_MIN, (1 - SIGMA_MIN) / STEPS
    x = sigma * noise + (1 - sigma) * first[: len(noise)]
    for k in range(STEPS):
        x = checkpoint(latent_step, x, first, sigma + k * h, h, use_reentrant=False)
    recorded = []
    for k in range(STEPS):
        x, w = checkpoint(align_step, x, second, 1 - k / STEPS, 1 / STEPS, use_reentrant=False)
        recorded.append(w)
    loss = alignment_loss(torch.stack(recorded).log())
    loss.backward()
    return loss.item()


def dense(b: int, n: int) -> dict[str, float]:
    """Seconds of a step's products and exponentials alone, forward and backward, with scores in float64 and float32; of
    many samples measured on a part."""
    rows = min(b, 1024)
    w, a, q = torch.rand(rows, n), torch.randn(n, DIM), torch.randn(rows, DIM)
    a64, q64 = a.double(), q.double()

    def seconds(part: Callable[[], object]) -> float:
        part()
        return clock(part, 1.0) * b / rows

    double, single = seconds(lambda: q64 @ a64.T), seconds(lambda: q @ a.T)
    mean, gradient, weights = seconds(lambda: w @ a), seconds(lambda: w.T @ q), seconds(w.exp)
    return {
        f"{way} {name}": score + mean + weights if way == "forward" else
        score + single + mean + 2 * gradient + weights
        for name, score in (("64", double), ("32", single)) for way in ("forward", "backward")
    }  # fmt: skip


class Counted:
    """A context in which the rows that meet all anchors are counted, by way and precision as in `dense`."""

    def __enter__(self) -> Counted:
        self.rows: Counter[str] = Counter()
        self.calls = AnchorField.posterior, AnchorField.vjp
        AnchorField.posterior = self._counting("forward", self.calls[0])  # type: ignore[method-assign, assignment]
        AnchorField.vjp = self._counting("backward", self.calls[1])  # type: ignore[method-assign, assignment]
        return self

    def __exit__(self, *_: object) -> None:
        AnchorField.posterior, AnchorField.vjp = self.calls  # type: ignore[method-assign]

    def _counting(self, way: str, call: Callable[..., object]) -> Callable[..., object]:
        def counted(field: AnchorField, rows: object, r: float, *args: object, **options: object) -> object:
            precision = "32" if r * r * field.block.widest <= 100 else "64"
            self.rows[f"{way} {precision}"] += len(rows)  # type: ignore[arg-type]
            return call(field, rows, r, *args, **options)

        return counted

    def share(self, b: int) -> float:
        """Of a dense path's products."""
        products = sum(rows * (2 if name.startswith("forward") else 5) for name, rows in self.rows.items())
        return products / (7 * 2 * STEPS * b)


def measure(variant: str, b: int, n: int, kind: str) -> dict[str, float]:
    """In the child process."""
    function = published if variant == "published" else tiled
    function(*data(4, 8, "small"))  # libraries' buffers and thread pools
    inputs = data(b, n, kind)
    with Counted() if variant == "tiled" else nullcontext() as count, Peak() as peak:
        start = time.perf_counter()
        loss = function(*inputs)
        seconds = time.perf_counter() - start
    found = {"memory": peak.most, "loss": loss}
    if variant != "published" and seconds < 20:
        seconds = min(seconds, clock(lambda: function(*inputs), 6.0))
    if count:
        step = dense(b, n)
        found["dense"] = STEPS * 2 * (step["forward 64"] + step["backward 64"])
        found["remaining"] = sum(step[name] * rows / b for name, rows in count.rows.items())
        found["left"] = count.share(b)
    return found | {"seconds": seconds}


def other(checkout: Path, b: int, n: int, kind: str) -> dict[str, float]:
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = str(checkout)
    try:
        return spawn(__file__, "before", b, n, kind)
    finally:
        os.environ.pop("PYTHONPATH")
        if before is not None:
            os.environ["PYTHONPATH"] = before


def figure(found: dict[str, dict[int, dict[str, float]]], batch: int, path: Path) -> None:
    """Seconds over n: a slope of 2 at b = n/8, and of 1 where b stays, is as many as pairs."""
    import matplotlib.pyplot as plt

    axes = plt.subplots(figsize=(6, 4.5), layout="constrained")[1]
    for kind, rows in found.items():
        (line,) = axes.loglog(list(rows), [row["seconds"] for row in rows.values()], "o-", label=kind)
        if all("before" in row for row in rows.values()):
            before = [row["before"] for row in rows.values()]
            axes.loglog(list(rows), before, "x:", color=line.get_color(), label=f"{kind}, before")
    axes.loglog(list(rows), [row["dense"] for row in rows.values()], "k--", label="products of a dense path")
    axes.set(xlabel=f"anchors n (b = {batch or 'n/8'})", ylabel="seconds, forward and backward")
    axes.set_xticks(list(rows), [str(n) for n in rows])
    axes.minorticks_off()
    axes.legend(fontsize=7)
    axes.grid(alpha=0.3)
    axes.figure.savefig(path, dpi=120)


def table(
    sizes: list[int], batch: int, kinds: list[str], checkout: Path | None
) -> tuple[str, dict[str, dict[int, dict[str, float]]]]:
    lines = [
        "# Zones: latents, alignment and their backward", "",
        f"{machine()}.",
        f"D = {DIM}, float32, {STEPS} latent and {STEPS} alignment steps, forward and backward, b = {batch or 'n/8'}.",
        "What the columns mean stands in zones.py. Times are the least of several calls, `published` and those over 20",
        "seconds of one; memory above the inputs, in MB.",
        "",
        "| anchors | n | before s | now s | before/now | growth | MB | published s | published/now | dense s "
        "| now/dense | left | over what is left |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    names = {kind: Path(kind).stem if kind.endswith(".pt") else kind for kind in kinds}
    found: dict[str, dict[int, dict[str, float]]] = {name: {} for name in names.values()}
    for n in sizes:
        b = batch or n // 8
        theirs = None if batch or n > PUBLISHED else spawn(__file__, "published", b, n, "small")["seconds"]
        for kind, name in names.items():
            # in turns, the better of two: other load comes and goes, but for what takes minutes
            pairs: list[tuple[dict[str, float] | None, dict[str, float]]] = []
            while not pairs or (len(pairs) < 2 and pairs[0][1]["seconds"] < 20):
                pairs.append((other(checkout, b, n, kind) if checkout else None, spawn(__file__, "tiled", b, n, kind)))
            ours = min((pair[1] for pair in pairs), key=lambda row: row["seconds"])
            now = ours["seconds"]
            old = min(pair[0]["seconds"] for pair in pairs if pair[0]) if checkout else None
            earlier = [row["seconds"] for row in found[name].values()]
            found[name][n] = ours | ({} if old is None else {"before": old})
            cells = [
                name, n, "" if old is None else f"{old:.3f}", f"{now:.3f}", "" if old is None else f"{old / now:.2f}",
                f"{now / earlier[-1]:.2f}" if earlier else "", f"{ours['memory']:.0f}",
                *(("", "") if theirs is None else (f"{theirs:.1f}", f"{theirs / now:.0f}")),
                f"{ours['dense']:.3f}", f"{now / ours['dense']:.2f}",
                f"{ours['left']:.2f}", f"{now / ours['remaining']:.2f}",
            ]  # fmt: skip
            lines.append("| " + " | ".join(map(str, cells)) + " |")
            print(lines[-1], flush=True)
    return "\n".join(lines) + "\n", found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, metavar="N", help="numbers of anchors")
    parser.add_argument("--batch", type=int, default=0, metavar="B", help="samples (default: an eighth of the anchors)")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS, help="made anchors")
    parser.add_argument("--trained", type=Path, nargs="+", default=[], metavar="RUN", help="runs whose encoders to ask")
    parser.add_argument("--before", type=Path, metavar="CHECKOUT", help="of another state of the project")
    parser.add_argument("--output", type=Path, help="also write the table there, and beside it the figure")
    parser.add_argument("--child", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        variant, b, n, kind = arguments.child
        print(json.dumps(measure(variant, int(b), int(n), kind)))
        return
    with tempfile.TemporaryDirectory() as folder:
        trained = [encode(run, max(arguments.sizes), Path(folder)) for run in arguments.trained]
        text, found = table(arguments.sizes, arguments.batch, [*arguments.kinds, *trained], arguments.before)
    if arguments.output:
        arguments.output.write_text(text)
        figure(found, arguments.batch, arguments.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
