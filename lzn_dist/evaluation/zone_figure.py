"""A picture of the zones: the prior's plane, coloured by where the flow carries each of its points.

A point of the plane is a prior draw; `lzn_dist.zones` carries it along the anchors' flow from σ = 1 to 0, and the
nearest anchor at the end says in whose zone it lies. For anchors of more than two dimensions the plane is a slice
through the origin; trajectories leave it and are drawn in projection.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from torch import Tensor

from lzn_dist.evaluation.figures import class_colour, literal, save
from lzn_dist.keyed_random import make_key, normal, uniform
from lzn_dist.zones import align, nearest_anchor

_CHUNK = 16_384  # points that are flowed at once
_PIXELS = 896  # width and height; the colouring starts at 1/8 of it and is refined at the boundaries


@torch.no_grad()
def zone_of(points: Tensor, anchors: Tensor, steps: int) -> Tensor:
    """The anchor int64 [m] in whose zone each prior point [m, D] lies, over anchors [n, D], by Euler's ``steps``."""
    found = []
    for part in points.split(_CHUNK):
        end = align(part, anchors, torch.zeros(len(part), dtype=torch.int64), steps=steps).endpoint
        found.append(nearest_anchor(end, anchors))
    return torch.cat(found)


@torch.no_grad()
def trajectories(points: Tensor, anchors: Tensor, steps: int = 200) -> Tensor:
    """The flow's states [steps + 1, m, D] from prior points [m, D] to the anchors [n, D]: Euler in σ, from its
    definition (paper, section 2); for a few points."""
    x = points.double()
    a = anchors.double()
    states = [x]
    for k in range(steps):
        sigma = 1.0 - k / steps
        logits = -0.5 * ((x[:, None] - (1 - sigma) * a) / sigma).square().sum(-1)
        x = x - (x - torch.softmax(logits, 1) @ a) / sigma / steps
        states.append(x)
    return torch.stack(states).to(points.dtype)


def _zone_map(anchors: Tensor, plane: Tensor, extent: float, pixels: int, steps: int) -> np.ndarray:
    """int16 [pixels, pixels]: the zone at each pixel's centre, row 0 at the bottom.

    Only pixels near a boundary of the coarser level are computed again at the next one: a level costs its boundaries.
    """

    def compute(rows: np.ndarray, columns: np.ndarray, size: int) -> np.ndarray:
        at = (np.stack((columns, rows), 1) + 0.5) / size * 2 * extent - extent
        points = torch.from_numpy(at).to(anchors.dtype) @ plane
        return zone_of(points, anchors, steps).numpy().astype(np.int16)

    size = pixels // 16
    rows, columns = np.indices((size, size)).reshape(2, -1)
    zones = compute(rows, columns, size).reshape(size, size)
    while size < pixels:
        size *= 2
        zones = zones.repeat(2, 0).repeat(2, 1)
        rows, columns = np.nonzero(_boundary(zones))
        zones[rows, columns] = compute(rows, columns, size)
    return zones


def _boundary(zones: np.ndarray) -> np.ndarray:
    """bool like zones: whether one of the 8 neighbours is of another zone."""
    vertical = zones[1:] != zones[:-1]
    horizontal = zones[:, 1:] != zones[:, :-1]
    diagonals = zones[1:, 1:] != zones[:-1, :-1], zones[1:, :-1] != zones[:-1, 1:]
    different = np.zeros(zones.shape, dtype=bool)
    different[1:] |= vertical
    different[:-1] |= vertical
    different[:, 1:] |= horizontal
    different[:, :-1] |= horizontal
    different[1:, 1:] |= diagonals[0]
    different[:-1, :-1] |= diagonals[0]
    different[1:, :-1] |= diagonals[1]
    different[:-1, 1:] |= diagonals[1]
    return different


def _colours(labels: Sequence[int], shades: bool) -> np.ndarray:
    """float [n, 3]: each anchor's zone in a light tone of its class's colour; with ``shades`` tones differ a little."""
    rank = [list(labels[:i]).count(label) for i, label in enumerate(labels)]
    tint = [0.50 + (0.075 * ((r * 2) % 5 - 2) if shades else 0.0) for r in rank]
    return np.array([[1 - (1 - t) * (1 - c) for c in to_rgb(class_colour(label))]
                     for label, t in zip(labels, tint, strict=True)])  # fmt: skip


def _paint(zones: np.ndarray, labels: np.ndarray, extent: float, radius: float) -> np.ndarray:
    """float32 [H/2, W/2, 3]: a disc of the zones' colours with white boundaries, those between classes stronger;
    averaged over 2×2 pixels against jagged edges."""
    colours = _colours(labels.tolist(), len(set(labels.tolist())) < len(labels)).astype(np.float32)
    canvas = colours[zones]
    size = len(zones)
    between_classes = _boundary(labels[zones])
    wide = between_classes | _boundary(between_classes)
    for mask, strength in ((_boundary(zones), 0.6), (wide, 1.0)):
        canvas[mask] += strength * (1 - canvas[mask])
    at = (np.arange(size, dtype=np.float32) + 0.5) / size * 2 * extent - extent
    canvas[np.hypot(at[:, None], at[None]) > radius] = 1.0
    averaged: np.ndarray = canvas.reshape(size // 2, 2, size // 2, 2, 3).mean((1, 3))
    return averaged


def zone_figure(
    anchors: Tensor, labels: Tensor, path: Path, *, extent: float | None = None, lines: int = 60, steps: int = 60,
    seed: int = 0, class_names: Sequence[str] | None = None,
) -> Path:  # fmt: skip
    """Draw the zones of anchors [n, D] with classes labels [n] (D ≥ 2) and some trajectories to the anchors.

    extent: half the width of the plane that is shown; by default 3.4 where D = 2, else √D + 1, the norm of a typical
    prior draw and a little more; wide enough for every anchor in any case. class_names, by label, are
    written at the anchors. Writes a PNG of 896 pixels and returns its path.
    """
    if anchors.ndim != 2 or anchors.shape[1] < 2 or labels.shape != anchors.shape[:1]:
        raise ValueError(f"need anchors [n, D ≥ 2] and labels [n], got {[*anchors.shape]} and {[*labels.shape]}")
    anchors, labels = anchors.detach().float().cpu(), labels.cpu()
    plane, widest = zone_plane(anchors)
    shown = anchors @ plane.T
    extent = widest if extent is None else max(extent, 1.1 * float(shown.norm(dim=1).max()))
    radius = extent * 0.99
    canvas = zone_picture(anchors, labels, plane, extent, _PIXELS, steps)

    figure = Figure(figsize=(_PIXELS / 100, _PIXELS / 100))
    axes = figure.add_axes((0.0, 0.0, 1.0, 1.0))
    axes.imshow(canvas, origin="lower", extent=(-extent, extent, -extent, extent), interpolation="nearest")
    axes.set_xlim(-extent, extent)
    axes.set_ylim(-extent, extent)
    axes.axis("off")
    _draw_trajectories(axes, anchors, labels, plane, lines, radius, seed)
    for i, label in enumerate(labels.tolist()):
        x, y = shown[i].tolist()
        short = class_names is not None and len(class_names[label]) <= 2
        axes.scatter([x], [y], s=320 if short else 70, color=class_colour(label), edgecolor="white", linewidth=1.6,
                     zorder=6)  # fmt: skip
        if class_names is not None:
            place: dict[str, Any] = (
                {"color": "white", "va": "center"} if short else {"color": class_colour(label), "va": "bottom"}
            )
            axes.text(x, y if short else y + 0.025 * extent, literal(class_names[label]), ha="center", zorder=7,
                      fontsize=12, fontweight="bold", **place)  # fmt: skip
    return save(figure, path)


def zone_plane(anchors: Tensor) -> tuple[Tensor, float]:
    """Orthonormal [2, D], the plane through the origin that holds most of the squared norm of anchors [n, D ≥ 2] (with
    two of them at least, or D = 2); and half the width to show of it: every anchor, and where prior draws lie."""
    anchors, dimension = anchors.detach(), anchors.shape[1]
    plane = torch.eye(2)
    if dimension > 2:
        plane = torch.linalg.svd(anchors.double(), full_matrices=len(anchors) < 2).Vh[:2].float()
    extent = 3.4 if dimension == 2 else math.sqrt(dimension) + 1.0
    return plane, max(extent, 1.1 * float((anchors @ plane.T).norm(dim=1).max()))


def zone_picture(
    anchors: Tensor, labels: Tensor, plane: Tensor, extent: float, pixels: int, steps: int = 60
) -> np.ndarray:
    """float32 [pixels, pixels, 3], row 0 at the bottom: a disc of the plane [2, D], each point in the colour of the
    class labels [n] of the anchor [n, D] that it flows to. pixels: a multiple of 8."""
    zones = _zone_map(anchors, plane, extent, 2 * pixels, steps)
    return _paint(zones, labels.numpy(), extent, extent * 0.99)


def _draw_trajectories(
    axes: Axes, anchors: Tensor, labels: Tensor, plane: Tensor, lines: int, radius: float, seed: int
) -> None:
    keys = make_key(seed, "figure/trajectories", torch.arange(lines))
    # golden-angle spiral with a little jitter: spreads the starting points evenly over the disc
    i = torch.arange(lines)
    r = radius * 0.93 * torch.sqrt((i + 0.5) / max(lines, 1))
    angle = i * math.pi * (3 - math.sqrt(5)) + 0.5 * uniform(keys)
    starts = torch.stack((r * torch.cos(angle), r * torch.sin(angle)), 1) @ plane
    states = trajectories(starts, anchors)
    ends = nearest_anchor(states[-1], anchors)
    flat = (states @ plane.T).numpy()
    for line in range(lines):
        tone = 0.55 * np.array(to_rgb(class_colour(int(labels[ends[line]]))))
        segments = np.stack((flat[:-1, line], flat[1:, line]), 1)
        fade = np.linspace(0.35, 0.9, len(segments))
        colours = np.concatenate((np.broadcast_to(tone, (len(segments), 3)), fade[:, None]), 1)
        axes.add_collection(LineCollection(list(segments), colors=colours, linewidths=1.0, zorder=4))
        axes.scatter(flat[0, line, 0], flat[0, line, 1], s=9, color=[tone], alpha=0.75, linewidth=0, zorder=5)


def toy_anchors(classes: int = 5, each: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Two-dimensional anchors [classes · each, 2] scattered around a centre a class, and their labels."""
    labels = torch.arange(classes).repeat_interleave(each)
    angle = 2 * math.pi * (labels + 0.2) / classes
    centres = 1.75 * torch.stack((torch.cos(angle), torch.sin(angle)), 1)
    return centres + 0.55 * normal(make_key(seed, "figure/toy", torch.arange(len(labels))), (2,)), labels


def toy_zone_figure(path: Path, classes: int = 5, each: int = 5, seed: int = 0) -> Path:
    """The method in one picture: the zones of a few anchors in two dimensions, each class one colour."""
    anchors, labels = toy_anchors(classes, each, seed)
    return zone_figure(anchors, labels, path, seed=seed)
