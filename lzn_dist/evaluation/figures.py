"""Figures: samples by class, reconstructions, interpolations, training curves. The zones are in `zone_figure`.

Every function writes one PNG and returns its path.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from lzn_dist.terminal import printable
from lzn_dist.training.run_folder import read_lines

INK = "#22262e"
# Ten hues of similar weight, ordered so that neighbours differ.
PALETTE = (
    "#3f78b5", "#e8873a", "#4fa36b", "#c9525b", "#8a68b8", "#9a6f55", "#db82b6", "#7d8591", "#b5a93c", "#3fb0bd",
)  # fmt: skip


def class_colour(label: int) -> str:
    """One colour a class, the same in every figure."""
    return PALETTE[label % len(PALETTE)]


def literal(name: str) -> str:
    """A name from outside, of a class say, as the text that it is: dollars begin no formula."""
    return printable(name).replace("$", r"\$")


def save(figure: Figure, path: Path, dpi: int = 100) -> Path:
    """Write a figure as PNG (Agg: no display is needed)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=dpi, facecolor="white", pil_kwargs={"optimize": True})
    return path


def mosaic(images: Tensor, columns: int, gap: int = 1) -> np.ndarray:
    """Images [n, c, h, w] in [−1, 1] in rows of ``columns``: float [H, W, 3] in [0, 1], white between them."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = np.ones((rows * (h + gap) - gap, columns * (w + gap) - gap, 3))
    values = (images.float().cpu().clamp(-1, 1) + 1) / 2
    for i, image in enumerate(values.expand(n, 3, h, w) if c == 1 else values):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image.permute(1, 2, 0).numpy()
    return canvas


def _image_figure(canvas: np.ndarray, title: str, width: float, rows: Sequence[str], path: Path) -> Path:
    """One mosaic with a name for each of its equally high rows."""
    height = width * canvas.shape[0] / canvas.shape[1]
    lines = [[literal(line) for line in textwrap.wrap(name, 44)] for name in rows]
    longest = max((len(line) for name in lines for line in name), default=0)
    left, top = max(0.9, 0.2 + 0.08 * longest) if any(rows) else 0.1, 0.4
    figure = Figure(figsize=(width + left + 0.1, height + top + 0.1))
    total_w, total_h = figure.get_size_inches()
    axes = figure.add_axes((left / total_w, 0.1 / total_h, width / total_w, height / total_h))
    axes.imshow(canvas, interpolation="nearest", aspect="auto")
    axes.axis("off")
    place = left if width > 2 else 0.1
    figure.text(place / total_w, 1 - 0.27 / total_h, title, color=INK, fontsize=11)
    for i, name in enumerate(lines):
        y = (0.1 + height * (1 - (i + 0.5) / len(rows))) / total_h
        figure.text((left - 0.1) / total_w, y, "\n".join(name), ha="right", va="center", color=INK, fontsize=10)
    return save(figure, path)


def sample_grid(
    images: Tensor, columns: int, path: Path, row_names: Sequence[str] = (), title: str = "Samples"
) -> Path:
    """Samples [n, c, h, w] in rows of ``columns``; row_names, for example the classes, stand before the rows."""
    return _image_figure(mosaic(images, columns), title, 7.0, row_names, path)


def reconstruction_grid(originals: Tensor, reconstructions: Tensor, path: Path, columns: int = 16) -> Path:
    """Originals [n, c, h, w] above their reconstructions, in pairs of rows."""
    rows, names = [], []
    for start in range(0, len(originals), columns):
        for name, images in (("original", originals), ("rebuilt", reconstructions)):
            part = images[start : start + columns].cpu()
            padding = torch.ones(columns - len(part), *part.shape[1:], dtype=part.dtype)
            rows.append(torch.cat((part, padding)))
            names.append(name)
    title = "Reconstruction: inverted to noise under the image's latent, decoded again"
    return _image_figure(mosaic(torch.cat(rows), columns), title, 8.0, names, path)


def interpolation_grid(paths: Sequence[Tensor], path: Path) -> Path:
    """One row an interpolation [count, c, h, w]."""
    title = "Between two images, through their latents"
    return _image_figure(mosaic(torch.cat(list(paths)), len(paths[0])), title, 7.0, [""] * len(paths), path)


def caption_grid(images: Tensor, captions: Sequence[str], path: Path) -> Path:
    """Images [n, c, h, w], each behind the caption that was written for it."""
    return _image_figure(mosaic(images, 1), "Captions of held-out images", 0.6, captions, path)


_FRACTIONS = (
    "accuracy_centre", "recognised", "recognised_prior", "linear_probe", "knn", "probe_10_labels",
    "zero_shot_accuracy", "image_to_text_recall_at_1", "text_to_image_recall_at_1", "caption_attributes_right",
    "generated_attributes_right",
)  # fmt: skip


def training_curves(run: Path, path: Path) -> Path | None:
    """Losses of metrics.jsonl, fractions and effective rank of eval.jsonl by step; None where nothing is there."""
    metrics, evaluations = read_lines(run / "metrics.jsonl"), read_lines(run / "eval.jsonl")
    if not metrics:
        return None
    losses = sorted({key for row in metrics for key in row if key == "loss" or key.startswith("loss_")})
    if len(losses) == 2:
        losses = losses[1:]  # a single part is the loss itself
    panels: list[tuple[str, list[dict[str, Any]], list[str], bool]] = [("loss", metrics, losses, False)]
    if any("aligned" in row for row in metrics):
        panels.append(("fraction of latents aligned", metrics, ["aligned"], True))
    seen = [key for key in _FRACTIONS if any(key in row for row in evaluations)]
    if seen:
        panels.append(("evaluation (averaged weights)", evaluations, seen, True))
    if any("effective_rank" in row for row in evaluations):
        panels.append(("effective rank of features", evaluations, ["effective_rank"], False))
    figure = Figure(figsize=(3.6 * len(panels), 3.0), layout="constrained")
    for axes, (title, rows, keys, fraction) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels,
                                                   strict=True):  # fmt: skip
        for number, key in enumerate(keys):
            points = [(row["step"], row[key]) for row in rows if isinstance(row.get(key), int | float)]
            steps, values = zip(*points, strict=True) if points else ((), ())
            marker = "o" if rows is evaluations else None
            axes.plot(steps, values, color=class_colour(number), lw=1.6, marker=marker, ms=4, label=key)
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("step", fontsize=9, color=INK)
        axes.tick_params(labelsize=8, colors=INK)
        axes.grid(alpha=0.25, lw=0.6)
        axes.spines[["top", "right"]].set_visible(False)
        if fraction:
            axes.set_ylim(top=1.02)
        if len(keys) > 1 or fraction:
            axes.legend(frameon=False, fontsize=8)
    return save(figure, path)


def comparison_figure(
    results: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]],
    measures: Mapping[str, Sequence[str]],
    path: Path,
) -> Path:
    """One row of panels a table, one panel a measure: a dot a seed, a line at their mean.

    results: table → row → measure → values over seeds. measures: of each table, in their order.
    """
    columns = max(map(len, measures.values()))
    heights = [len(results[title]) + 1.4 for title in results]
    figure = Figure(figsize=(3.0 * columns + 1.6, 0.28 * sum(heights) + 0.3), layout="constrained")
    grid = figure.subplots(len(results), columns, squeeze=False, height_ratios=heights)
    for panels, (title, rows) in zip(grid, results.items(), strict=True):
        names = list(rows)
        for axes in panels[len(measures[title]) :]:
            axes.axis("off")
        for column, (axes, measure) in enumerate(zip(panels, measures[title], strict=False)):
            for y, name in enumerate(names):
                values = list(rows[name].get(measure, ()))
                colour = class_colour(y)
                axes.plot(values, [y] * len(values), "o", color=colour, ms=4, alpha=0.75)
                if values:
                    mean = sum(values) / len(values)
                    axes.plot([mean, mean], [y - 0.32, y + 0.32], color=colour, lw=2)
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if column == 0 else [""] * len(names))
            axes.set_title(measure.replace("_", " "), fontsize=9, color=INK)
            axes.tick_params(labelsize=8, colors=INK)
            axes.grid(alpha=0.25, lw=0.6)
            axes.spines[["top", "right"]].set_visible(False)
        panels[0].set_ylabel("\n".join(textwrap.wrap(title, 18)), fontsize=9, color=INK)
    return save(figure, path)
