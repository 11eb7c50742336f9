"""Line charts as inline SVG, whose colours and words are the page's own; the page's script shows values at the pointer.

A chart carries its points as data beside the drawing, thinned to what a screen can show: of each column of pixels the
first, lowest, highest and last point, so that no spike is lost.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.ticker import MaxNLocator

WIDTH, HEIGHT = 560, 240
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 10, 26
COLOURS = 8  # that the page has; more lines take turns


@dataclass(frozen=True)
class Line:
    """name for the legend; colour: 0 … COLOURS − 1; points (x, y), finite, by increasing x; dots: draw each point."""

    name: str
    colour: int
    points: Sequence[tuple[float, float]]
    dots: bool = False


def chart(title: str, lines: Sequence[Line], x_name: str = "step", low: float | None = None) -> str:
    """An SVG figure with legend. low: where the y axis begins at least (0 for shares and times)."""
    drawn = [line for line in lines if line.points]
    if not drawn:
        return ""
    xs = [x for line in drawn for x, _ in line.points]
    ys = [y for line in drawn for _, y in line.points]
    x_low, x_high = _span(min(xs), max(xs))
    y_low, y_high = _span(min(ys) if low is None else min(low, min(ys)), max(ys))
    x_ticks, y_ticks = _ticks(x_low, x_high, 6), _ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT) + LEFT
        return across, TOP + (y_high - y) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = []
    for tick in y_ticks:
        _, y = place(x_low, tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>')
    for tick in x_ticks:
        x, _ = place(tick, y_low)
        if LEFT - 1 <= x <= WIDTH - RIGHT + 1:
            parts.append(f'<text class="tick" x="{x:.1f}" y="{HEIGHT - 8}" text-anchor="middle">{_number(tick)}</text>')
    data = []
    for line in drawn:
        kept = thin(line.points, WIDTH - LEFT - RIGHT)
        places = [place(*point) for point in kept]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(f'<polyline class="line c{line.colour}" points="{path}"/>')
        if line.dots or len(places) == 1:
            parts += [f'<circle class="dot c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
        data.append(
            {"name": line.name, "colour": line.colour, "x": [p[0] for p in kept], "y": [_short(p[1]) for p in kept]}
        )
    parts.append(f'<line class="cursor" x1="0" x2="0" y1="{TOP}" y2="{HEIGHT - BOTTOM}" visibility="hidden"/>')
    axes = {"x": [x_low, x_high], "left": LEFT, "right": WIDTH - RIGHT, "width": WIDTH, "x_name": x_name, "lines": data}
    legend = "".join(
        f'<span class="key"><i class="swatch c{line.colour}"></i>{escape(line.name)}</span>' for line in drawn
    )
    if len(drawn) == 1 and drawn[0].name.replace("_", " ").casefold().endswith(title.casefold()):
        legend = ""
    told = json.dumps(axes).replace("</", "<\\/")
    return (
        f'<figure class="chart"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">{"".join(parts)}</svg>'
        f'<div class="legend">{legend}</div><div class="tip" hidden></div>'
        f'<script type="application/json">{told}</script></figure>'
    )


def thin(points: Sequence[tuple[float, float]], columns: int) -> list[tuple[float, float]]:
    """Of each of so many columns the first, lowest, highest and last point, in order."""
    if len(points) <= 2 * columns:
        return list(points)
    low, high = points[0][0], points[-1][0]
    buckets: dict[int, list[tuple[float, float]]] = {}
    for point in points:
        buckets.setdefault(int((point[0] - low) / ((high - low) or 1) * (columns - 1)), []).append(point)
    kept: list[tuple[float, float]] = []
    for bucket in buckets.values():
        chosen = {bucket[0], bucket[-1], min(bucket, key=lambda p: p[1]), max(bucket, key=lambda p: p[1])}
        kept += sorted(chosen)
    return kept


def _span(low: float, high: float) -> tuple[float, float]:
    if high > low:
        return low, high
    room = abs(low) * 0.1 or 1.0
    return low - room, high + room


def _ticks(low: float, high: float, count: int) -> list[float]:
    return [float(tick) for tick in MaxNLocator(count).tick_values(low, high)]


def _number(value: float) -> str:
    """As an axis shows it."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    return f"{value:.6g}" if size >= 1e-3 or not value else f"{value:.1e}"


def _short(value: float) -> float:
    """Six digits: what is read at the pointer."""
    return float(f"{value:.6g}") if math.isfinite(value) else value
