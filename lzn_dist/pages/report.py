"""What runs have done, read from their folders, and the page that shows it."""

from __future__ import annotations

import base64
import json
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from lzn_dist import __version__
from lzn_dist.config import Config, ConfigError, flat, load_config
from lzn_dist.pages.charts import COLOURS, Line, chart
from lzn_dist.training.run_folder import read_lines

PICTURES = {
    "training": "Training", "samples": "Samples by class", "samples_prior": "Samples of the prior",
    "from_captions": "Images of captions", "captions": "Captions of images", "between_captions": "Between two captions",
    "reconstructions": "Reconstructions", "interpolation": "Interpolation", "zones": "Zones",
}  # fmt: skip
PICTURE_BYTES = 4 << 20  # a larger one is named instead
ABOUT = ("step", "seed", "task", "measured_on", "left_out", "settings")
TIMES = {
    "data": "data", "agree": "agreement", "encode": "encoders", "flow": "zones' flow", "decode": "decoders",
    "backward": "backward", "optimise": "optimiser",
}  # fmt: skip


@dataclass
class RunFacts:
    """A run as its folder tells it. name: short, of its own among those of a report."""

    path: Path
    name: str
    metrics: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    measures: dict[str, float]
    measured_on: dict[str, Any]
    left_out: dict[str, str]
    measured_at: int
    status: dict[str, Any]
    events: list[dict[str, Any]]
    damaged: list[dict[str, Any]]
    config: Config | None
    problems: list[str] = field(default_factory=list)

    @cached_property
    def pictures(self) -> list[tuple[str, str]]:
        """(title, data URL) of its figures."""
        found = []
        for name, title in PICTURES.items():
            file = self.path / "figures" / f"{name}.png"
            if name != "training" and file.is_file() and file.stat().st_size <= PICTURE_BYTES:
                found.append((title, "data:image/png;base64," + base64.b64encode(file.read_bytes()).decode()))
        return found

    @property
    def step(self) -> int:
        last = self.metrics[-1]["step"] if self.metrics else 0
        return max(int(self.status.get("step", 0)), int(last))


def _json(path: Path, problems: list[str]) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
        if isinstance(found, dict):
            return found
        problems.append(f"{path.name} holds no table")
    except FileNotFoundError:
        pass
    except (OSError, ValueError) as error:
        problems.append(f"{path.name} cannot be read ({error})")
    return {}


def read_run(path: Path, name: str = "") -> RunFacts:
    """A run's folder, also while it is going; what of it is missing or damaged is left out, and said in `problems`.

    Raises FileNotFoundError, one line, for a folder that is no run's.
    """
    if not any((path / file).is_file() for file in ("metrics.jsonl", "status.json", "config.yaml")):
        raise FileNotFoundError(f"no run in {path}: give the output_dir of a training run, or a comparison's")
    problems: list[str] = []
    evaluation = _json(path / "evaluation.json", problems)
    config = None
    try:
        config = load_config(path / "config.yaml")
    except ConfigError as error:
        problems.append(str(error).splitlines()[0])
    evaluations = read_lines(path / "eval.jsonl")
    last = evaluation or (evaluations[-1] if evaluations else {})
    return RunFacts(
        path, name or path.name, read_lines(path / "metrics.jsonl"), evaluations, numbers(last),
        last.get("measured_on") or {}, last.get("left_out") or {}, int(last.get("step", 0)),
        _json(path / "status.json", problems), _events(path),
        read_lines(path / "bad_samples.jsonl"), config, problems,
    )  # fmt: skip


def _events(path: Path) -> list[dict[str, Any]]:
    rows = read_lines(path / "events.jsonl", ("time", "step", "incarnation"))
    return [row for row in rows if isinstance(row.get("state"), str)]


def numbers(row: dict[str, Any]) -> dict[str, float]:
    """The measures of an evaluation, without what it says about them."""
    return {
        key: float(value) for key, value in row.items()
        if key not in ABOUT and isinstance(value, int | float) and not isinstance(value, bool)
    }  # fmt: skip


def _points(rows: Sequence[dict[str, Any]], key: str, factor: float = 1.0) -> list[tuple[float, float]]:
    found = (
        (float(row["step"]), float(row[key]) * factor)
        for row in rows
        if isinstance(row.get(key), int | float) and isfinite(row[key])
    )
    return sorted(dict(found).items())  # a step that is written twice counts once, as it was last


def _keys(rows: Iterable[dict[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for row in rows for key, value in row.items() if isinstance(value, int | float)))


def charts(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Sections of charts: of one run, related measures together; of several, a chart a measure, a line a run."""
    if len(runs) == 1:
        return _charts_of_one(runs[0])
    sections: list[tuple[str, list[str]]] = []

    def each(keys: Sequence[str], of: str, dots: bool, title: str, low: float | None = None) -> None:
        drawn = [
            chart(key.removeprefix("seconds_"), [
                Line(run.name, number % COLOURS, _points(getattr(run, of), key), dots)
                for number, run in enumerate(runs)
            ], low=low)
            for key in keys
        ]  # fmt: skip
        if any(drawn):
            sections.append((title, [one for one in drawn if one]))

    metrics = _keys(row for run in runs for row in run.metrics[-1:])
    losses = [key for key in metrics if key == "loss" or key.startswith("loss_")]
    each(losses, "metrics", False, "Losses")
    each([key for key in _watched(metrics) if key not in losses], "metrics", False, "Watched in training")
    evaluated = _keys(row for run in runs for row in run.evaluations if len(run.evaluations) > 1)
    each([key for key in evaluated if _worth(key)], "evaluations", True, "Evaluations (averaged weights)")
    speed = [key for key in ("images_per_second", "peak_memory_mb") if key in metrics]
    each([*speed, *(key for key in metrics if key.startswith("seconds_"))], "metrics", False, "Speed and memory", 0.0)
    return sections


def _watched(keys: Sequence[str]) -> list[str]:
    """Metrics that say how training goes."""
    aside = ("step", "images", "skipped", "images_per_second", "peak_memory_mb", "mfu")
    return [key for key in keys if key not in aside and not key.startswith(("lr", "seconds_"))]


def _worth(key: str) -> bool:
    """Whether an evaluation's number is worth a curve."""
    return key not in ("step", "seed", "nfe") and not key.endswith(("_low", "_high")) and not key.startswith("zones.")


def _charts_of_one(run: RunFacts) -> list[tuple[str, list[str]]]:
    metrics, evaluations = run.metrics, run.evaluations
    # of a single evaluation the table says all
    keys, measured = _keys(metrics[-1:]), _keys(evaluations) if len(evaluations) > 1 else []

    def lines(rows: Sequence[dict[str, Any]], names: Sequence[str], dots: bool = False) -> list[Line]:
        return [Line(name, number % COLOURS, _points(rows, name), dots) for number, name in enumerate(names)]

    losses = [key for key in keys if key.startswith("loss")]
    losses = losses[1:] if len(losses) == 2 else losses  # a single part is the loss itself
    training = [chart("Losses", lines(metrics, losses))]
    for key in _watched(keys):
        if key not in losses and not key.startswith("loss"):
            training.append(chart(key.replace("_", " "), lines(metrics, [key]), low=0.0 if key == "aligned" else None))
    rates = [key for key in keys if key.startswith("lr_")] or [key for key in keys if key == "lr"]
    training.append(chart("Learning rates", lines(metrics, rates), low=0.0))
    shares = [key for key in measured if _worth(key) and _is_share(evaluations, key)]
    others = [key for key in measured if _worth(key) and key not in shares]
    evaluated = [
        chart("Shares of held-out images", lines(evaluations, shares[start : start + COLOURS], True), low=0.0)
        for start in range(0, len(shares), COLOURS)
    ]
    evaluated += [chart(key.replace("_", " "), lines(evaluations, [key], True)) for key in others]
    zones = [key for key in measured if key.startswith("zones.")]
    health = [chart(key.removeprefix("zones.").replace("_", " "), lines(evaluations, [key], True)) for key in zones]
    times = [
        Line(TIMES.get(key.removeprefix("seconds_"), key), number % COLOURS, _points(metrics, key, 1000.0))
        for number, key in enumerate(key for key in keys if key.startswith("seconds_"))
    ]
    speed = [
        chart("Time by part, ms a step", times, low=0.0),
        chart("Images a second", lines(metrics, ["images_per_second"]), low=0.0),
        chart("Peak memory, MB", lines(metrics, ["peak_memory_mb"]), low=0.0),
    ]
    if "mfu" in keys:
        speed.append(chart("Model FLOPs utilisation", lines(metrics, ["mfu"]), low=0.0))
    found = [("Training", training), ("Evaluations (averaged weights)", evaluated), ("Speed and memory", speed),
             ("Health of the zones", health)]  # fmt: skip
    return [(title, [one for one in drawn if one]) for title, drawn in found if any(drawn)]


def _is_share(rows: Sequence[dict[str, Any]], key: str) -> bool:
    return all(0.0 <= value <= 1.0 for _, value in _points(rows, key)) and not key.endswith("_error")


@dataclass(frozen=True)
class Start:
    """A time that a run was going: its incarnation, from when to when, its steps, how it ended."""

    number: int
    began: float
    ended: float | None
    first: int
    last: int
    state: str
    why: str
    where: str


def timeline(run: RunFacts) -> list[Start]:
    """Starts and ends, as events.jsonl tells them; a start without an end was killed, or is still going."""
    found: dict[int, list[dict[str, Any]]] = {}
    for event in run.events:
        found.setdefault(int(event.get("incarnation", 0)), []).append(event)
    starts, numbers = [], sorted(found)
    for place, number in enumerate(numbers):
        events = found[number]
        first, last = events[0], events[-1]
        newest = number == max(found)
        over = last["state"] != "running"
        state = last["state"] if over else ("running" if newest and run.status.get("state") == "running" else "killed")
        # of one that was killed only where the next began is known
        reached = int(last["step"]) if over else run.step if newest else int(found[numbers[place + 1]][0]["step"])
        where = f"{first.get('engine', '')} on {first.get('world_size', '?')}".strip()
        starts.append(
            Start(
                number, float(first["time"]), float(last["time"]) if over else None, int(first["step"]), reached,
                state, str(last.get("why", "")), where,
            )
        )  # fmt: skip
    return starts


def skipped(run: RunFacts) -> list[tuple[int, int]]:
    """(step, how many since the line before) where steps were skipped for gradients that were not finite."""
    found, before = [], 0
    for row in run.metrics:
        now = int(row.get("skipped", 0))
        if now > before:
            found.append((int(row["step"]), now - before))
        before = now
    return found


def differences(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Keys that the runs' configurations do not agree on, with each run's value."""
    tables = [{} if run.config is None else flat(run.config.model_dump(mode="json")) for run in runs]
    keys = dict.fromkeys(key for table in tables for key in table)
    rows = [(key, [_shown(table.get(key)) for table in tables]) for key in keys if key != "output_dir"]
    return [(key, values) for key, values in rows if len(set(values)) > 1]


def _shown(value: Any) -> str:
    return "" if value is None else value if isinstance(value, str) else json.dumps(value)


def measures(runs: Sequence[RunFacts]) -> list[tuple[str, list[str]]]:
    """Each measure with each run's value, or a dash."""
    keys = dict.fromkeys(key for run in runs for key in run.measures)
    return [(key, [f"{run.measures[key]:.4g}" if key in run.measures else "–" for run in runs]) for key in keys]


@dataclass(frozen=True)
class ComparisonFacts:
    """A folder of `lzn_dist compare`: its tables with mean and deviation over seeds."""

    path: Path
    seeds: int
    tables: list[tuple[str, list[str], list[tuple[str, list[str]]]]]
    picture: str


def read_comparison(path: Path) -> ComparisonFacts:
    """Raises OSError and ValueError, naming the file."""
    found = json.loads((path / "comparison.json").read_text())
    tables = []
    for title, rows in found["tables"].items():
        names = list(dict.fromkeys(name for values in rows.values() for name in values))
        tables.append((title, names, [(row, [_over_seeds(values.get(name, [])) for name in names])
                                      for row, values in rows.items()]))  # fmt: skip
    picture = path / "comparison.png"
    url = "data:image/png;base64," + base64.b64encode(picture.read_bytes()).decode() if picture.is_file() else ""
    return ComparisonFacts(path, len(found["seeds"]), tables, url)


def _over_seeds(values: Sequence[float]) -> str:
    if not values:
        return "–"
    mean = statistics.mean(values)
    return f"{mean:.3f} ± {statistics.stdev(values):.3f}" if len(values) > 1 else f"{mean:.3f}"


def names_of(paths: Sequence[Path]) -> list[str]:
    """A short name for each folder, each its own."""
    names = [path.resolve().name for path in paths]
    if len(set(names)) == len(names):
        return names
    longer = ["/".join(path.resolve().parts[-2:]) for path in paths]
    return longer if len(set(longer)) == len(longer) else [str(path) for path in paths]


def report(paths: Sequence[Path], *, watch: bool = False) -> str:
    """The page, of runs' folders and comparisons'. watch: it looks for news by itself. Raises FileNotFoundError for a
    folder that is neither, ValueError for a comparison that is damaged."""
    comparisons, folders = [], []
    for path in paths:
        if (path / "comparison.json").is_file():
            try:
                comparisons.append(read_comparison(path))
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ValueError(f"{path / 'comparison.json'} is damaged ({error})") from error
        else:
            folders.append(path)
    runs = [read_run(path, name) for path, name in zip(folders, names_of(folders), strict=True)]
    environment = Environment(loader=PackageLoader("lzn_dist.pages", ""), autoescape=True)
    environment.filters["when"] = lambda seconds: time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))
    environment.filters["long"] = _long
    title = ", ".join([run.name for run in runs] + [each.path.name for each in comparisons])
    return environment.get_template("report.html.j2").render(
        title=title, runs=runs, comparisons=comparisons, sections=charts(runs) if runs else [], measures=measures(runs),
        differences=differences(runs) if len(runs) > 1 else [], timelines=[timeline(run) for run in runs],
        skipped=[skipped(run) for run in runs], version=__version__, now=time.time(), watch=watch,
    )  # fmt: skip


def _long(seconds: float) -> str:
    """A stretch of time for people."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s" if minutes else f"{rest} s"
