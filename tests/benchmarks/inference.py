"""Using a trained model: python tests/benchmarks/inference.py RUN [--text RUN] [--out DIR]

What a model makes of an image depends on the anchors that it is seen among: accuracy, variations that are recognised
and retrieval by latents against the number of reference anchors, as a table and a curve. And images a second of
`embed`, `classify` and `generate` beside the bare networks, in the same run. RUN: of digits with labels; --text: with
captions.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tabulate import tabulate
from torch import Tensor

from lzn_dist import load
from lzn_dist.evaluation import EvaluationData
from lzn_dist.evaluation.figures import INK, class_colour, save
from lzn_dist.inference import LZN
from tests.benchmarks.common import machine

COUNTS = (3, 10, 30, 100, 300, 1000, 10_000, 10**9)
SCALES = (0.0, 0.5, 1.0)


def accuracy(model: LZN, images: Tensor, labels: Tensor, scale: float) -> float:
    found = [model.classify(images, scale, seed=seed).cpu() == labels for seed in range(1 if scale == 0 else 3)]
    return float(torch.stack(found).float().mean())


def recall(model: LZN, images: Tensor, texts: list[str]) -> float:
    """Of images, how often the own text is the nearest, by the cosine of latents at the zones' centres; texts that are
    equal count alike."""
    first = torch.nn.functional.normalize(model.latents(images, 0.0), dim=1)
    second = torch.nn.functional.normalize(model.latents(None, 0.0, texts=texts), dim=1)
    nearest = (first @ second.T).argmax(1).tolist()
    return float(np.mean([texts[found] == text for found, text in zip(nearest, texts, strict=True)]))


def rate(function: Callable[[], object], count: int, seconds: float = 3.0) -> float:
    """Images a second, the best of a few tries: other work on the machine only slows."""
    function()
    best, end = float("inf"), time.perf_counter() + seconds
    while time.perf_counter() < end:
        start = time.perf_counter()
        function()
        best = min(best, time.perf_counter() - start)
    return count / best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--text", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks"))
    options = parser.parse_args()
    model = load(options.run, anchors="all")
    data = EvaluationData(model.config)
    whole, test = model.reference_anchors("image"), data.test
    text = load(options.text, anchors="all") if options.text else None
    if text is not None:
        batches = EvaluationData(text.config).batches("test")
        batch = batches[0]
        rows = batch.valid.nonzero()[:, 0]
        texts = [own[0] for own in batches.dataset.captions(batch.index[rows].numpy())]
        references = {name: text.reference_anchors(name) for name in ("image", "text")}
    rows_found, counts = [], [n for n in COUNTS if n < len(whole)] + [len(whole)]
    judge = data.digit_classifier
    for count in counts:
        model.reference["image"] = whole[:count]
        found = [accuracy(model, test.images, test.labels, scale) for scale in SCALES]
        made = model.generate(images=test.images, seed=1)
        assert judge is not None, "of digits"
        recognised = judge.predict(made.flatten(1).double().numpy()) == test.labels.numpy()
        found.append(float(recognised.mean()))
        if text is not None:
            text.reference = {name: anchors[:count] for name, anchors in references.items()}
            found.append(recall(text, batch.images[rows], texts))
        rows_found.append(found)
    names = [f"accuracy, noise {scale:g}" for scale in SCALES] + ["variations recognised"]
    names += ["image → text by latents, R@1"] if text is not None else []
    lines = [[f"{n:,}", *(f"{value:.3f}" for value in row)] for n, row in zip(counts, rows_found, strict=True)]
    print(f"{len(test):,} held-out images. {machine()}\n")
    print(tabulate(lines, ["anchors", *names], tablefmt="github", disable_numparse=True))
    figure = Figure(figsize=(5.4, 3.4), layout="constrained")
    axes = figure.subplots()
    for number, name in enumerate(names):
        axes.plot(counts, [row[number] for row in rows_found], "o-", ms=4, color=class_colour(number), label=name)
    axes.set_xscale("log")
    axes.set_xlabel("anchors of the reference", color=INK)
    axes.set_ylim(0, 1.02)
    axes.grid(alpha=0.25)
    axes.legend(frameon=False, fontsize=8)
    print(f"\n{save(figure, options.out / 'reference_anchors.png')}\n")

    images = test.images[:256]
    encoder, decoder = model.networks["image"]["encoder"], model.networks["image"]["decoder"]  # type: ignore[index]
    latents = model.prior_latents(len(images))
    labels, t, noise = model.read_class(latents), torch.full((len(images),), 0.5), model.noise(len(images))
    steps = model.config.flow.sampler_steps

    def bare() -> None:
        with torch.no_grad():
            for _ in range(steps):
                decoder(noise, t, latents, labels=labels)

    with torch.no_grad():
        encode = rate(lambda: encoder(images), len(images))
        sample = rate(bare, len(images))
    chosen = torch.arange(len(images)) % model.config.data.num_classes
    rates = [
        ("encoder alone", encode, encode), ("embed", rate(lambda: model.embed(images), len(images)), encode),
        (f"classify, {len(whole):,} anchors", rate(lambda: model.classify(images), len(images)), encode),
        (f"decoder alone, {steps} steps", sample, sample),
        ("generate by class", rate(lambda: model.generate(len(images), chosen), len(images)), sample),
        ("generate from the prior", rate(lambda: model.generate(len(images)), len(images)), sample),
    ]  # fmt: skip
    lines = [[name, f"{found:,.0f}", f"{found / of:.2f}"] for name, found, of in rates]
    print(tabulate(lines, ["", "images/s", "of the bare network's"], tablefmt="github", disable_numparse=True))


if __name__ == "__main__":
    main()
