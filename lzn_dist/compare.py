"""Compare models over seeds: python -m lzn_dist.compare configs/compare/digits.yaml

Trains every row of the file for every seed, evaluates the averaged weights, prints a table of mean and standard
deviation over seeds for each group of rows, and writes OUTPUT/comparison.json and OUTPUT/comparison.png. What is
finished is not done again: the same command goes on after a stop. Runs of other settings in OUTPUT are refused.

The file: output_dir, seeds, tables of rows, overrides of all rows, and options of lzn_dist.evaluate. A row has a name
and a config (a path beside the file) with overrides; or `like`: another row's config, trained as long as that of
`time_of` took (equal time instead of equal steps: steps are scaled by the images per second that both rows logged, seed
by seed); or `from`: it reads another row's evaluation, with a prefix or by other names (measures: {shown: name in
evaluation.json}).
"""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import statistics
import subprocess
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, PositiveInt, ValidationError, field_validator
from tabulate import tabulate
from tqdm import tqdm

from lzn_dist.config import ConfigError, changed_keys, load_config, named_file
from lzn_dist.json_files import read_json, write_json
from lzn_dist.networks import trust
from lzn_dist.paths import expand_path, folder_or_url, path_argument
from lzn_dist.terminal import TRUST, command
from lzn_dist.training.resolve import resolve
from lzn_dist.training.run_folder import read_lines
from lzn_dist.yaml_core import read_yaml


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)


class Row(_Part):
    name: str
    config: str = ""
    overrides: dict[str, Any] = {}
    like: str = ""
    time_of: str = ""
    reads: str = Field("", alias="from")
    prefix: str = ""
    measures: dict[str, str] = {}


class Table(_Part):
    title: str
    measures: list[str]
    rows: list[Row]


class Comparison(_Part):
    output_dir: Annotated[str, AfterValidator(expand_path)]
    seeds: list[int] = Field(min_length=1)
    tables: list[Table] = Field(min_length=1)
    jobs: PositiveInt = 1
    overrides: dict[str, Any] = {}
    evaluate: list[str] = []

    @field_validator("seeds")
    @classmethod
    def _different(cls, seeds: list[int]) -> list[int]:
        if len(set(seeds)) != len(seeds):
            raise ValueError("a seed stands there twice")
        return seeds

    @property
    def rows(self) -> dict[str, Row]:
        return {row.name: row for table in self.tables for row in table.rows}


@dataclass
class _Result:
    """What is read of evaluation.json, besides the measures."""

    step: int
    measured_on: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Job:
    """One row with one seed, ready to run."""

    row: Row
    seed: int
    folder: Path
    config: Path
    overrides: list[str]
    max_steps: int
    evaluate: list[str]

    def finished(self) -> bool:
        try:
            return read_json(self.folder / "evaluation.json", _Result).step == self.max_steps
        except (OSError, ValueError):
            return False


def read_comparison(path: Path, given: dict[str, Any] | None = None) -> Comparison:
    """Read a comparison and check that its rows fit together. given: values instead of the file's. Raises ConfigError,
    naming file and row."""
    try:
        found = Comparison.model_validate({**read_yaml(path), **(given or {})})
    except ValidationError as error:
        problems = (f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())
        raise ConfigError("\n".join(f"{path}: {problem}" for problem in problems)) from None
    except (OSError, TypeError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    rows = [row for table in found.tables for row in table.rows]
    trained = {row.name for row in rows if row.config}
    if len({_slug(row.name) for row in rows}) != len(rows):
        raise ConfigError(f"{path}: two rows have the same name")
    for row in rows:
        if sum(map(bool, (row.config, row.like, row.reads))) != 1 or bool(row.like) != bool(row.time_of):
            raise ConfigError(f"{path}: row {row.name!r} needs one of config, from, or like with time_of")
        for other in (row.like, row.time_of, row.reads):
            if other and other not in trained:
                raise ConfigError(f"{path}: row {row.name!r} names {other!r}, which is no row with a config")
    return found


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")


def make_job(comparison: Comparison, base: Path, row: Row, seed: int, more: list[str]) -> Job:
    """A trained row's job; one with time_of needs the runs of the rows that it names. Raises ConfigError, also where
    the folder holds a run of other settings."""
    source = comparison.rows[row.like] if row.like else row
    folder = _folder(comparison, row.name, seed)
    overrides = [f"{key}={json.dumps(value) if not isinstance(value, str) else value}"
                 for key, value in {**comparison.overrides, **source.overrides, **row.overrides}.items()]  # fmt: skip
    overrides += [*more, f"seed={seed}", f"output_dir={folder}"]
    path = base / source.config
    config = resolve(load_config(path, overrides))
    if (folder / "config.yaml").is_file():
        changed = changed_keys(load_config(folder / "config.yaml"), config)
        if changed:
            raise ConfigError(f"{folder} was trained with other settings ({changed[0]}): remove it, or set --output")
    steps = config.max_steps
    if row.time_of:
        mine, theirs = (_cost(_folder(comparison, name, seed)) for name in (row.like, row.time_of))
        steps = max(1, round(theirs.steps * theirs.seconds_per_step / mine.seconds_per_step))
        overrides.append(f"max_steps={steps}")
    read = {other.reads for other in comparison.rows.values() if other.prefix}
    alone = [] if row.name in read else ["--no-comparisons"]  # probes of pixels take longer than some trainings
    return Job(row, seed, folder, path, overrides, steps, [*comparison.evaluate, *alone])


def _folder(comparison: Comparison, row: str, seed: int) -> Path:
    return Path(comparison.output_dir) / _slug(row) / f"seed_{seed}"


class Cost(NamedTuple):
    """What a run took. seconds_per_step: the median over the log's lines, loading included, evaluation and the first
    line (start-up) not."""

    steps: int
    seconds_per_step: float


def _cost(run: Path) -> Cost:
    config = load_config(run / "config.yaml")
    rates = [row["images_per_second"] for row in read_lines(run / "metrics.jsonl", ("step", "images_per_second"))]
    return Cost(config.max_steps, config.data.global_batch / statistics.median(rates[1:] or rates))


_running: set[subprocess.Popen[bytes]] = set()


def run_job(job: Job, launch: str, threads: int, trusted: Sequence[str] = ()) -> None:
    """Train and evaluate; the output goes to the run's log.txt. Raises RuntimeError with its last lines."""
    if job.finished():
        return
    job.folder.mkdir(parents=True, exist_ok=True)

    def start(module: str) -> list[str]:
        if not launch:
            return [sys.executable, "-m", f"lzn_dist.{module}"]
        accelerate = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]  # a free one: several may start
        return [sys.executable, *accelerate, "--config_file", launch, str(Path(__file__).with_name(f"{module}.py"))]

    own = [word for package in trusted for word in ("--trust", package)]
    commands = [
        [*start("train"), str(job.config), f"cpu_threads={threads}", *job.overrides, *own],
        [*start("evaluate"), str(job.folder), *job.evaluate, *own],
    ]
    environment = {"OMP_WAIT_POLICY": "passive", "OMP_NUM_THREADS": str(threads), **os.environ}
    with (job.folder / "log.txt").open("w") as log:
        for command in commands:
            with subprocess.Popen(command, stdout=log, stderr=log, env=environment) as process:
                _running.add(process)
                status = process.wait()
                _running.discard(process)
            if status:
                last = (job.folder / "log.txt").read_text(errors="replace").strip().splitlines()[-3:]
                raise RuntimeError(f"{job.row.name}, seed {job.seed}, failed: {' '.join(last)} ({job.folder}/log.txt)")


def run_all(jobs: list[Job], launch: str, at_once: int, bar: tqdm[Any], trusted: Sequence[str] = ()) -> None:
    """Run the jobs, some at once; the first that fails ends it after those that run."""
    threads = max(1, (os.cpu_count() or 1) // at_once)
    with ThreadPoolExecutor(at_once) as pool:
        futures = [pool.submit(run_job, job, launch, threads, trusted) for job in jobs]
        try:
            for job, future in zip(jobs, futures, strict=True):
                future.result()
                bar.set_postfix_str(f"{job.row.name}, seed {job.seed}")
                bar.update()
        except BaseException:
            for process in tuple(_running):  # training leaves a checkpoint: the same command goes on from it
                process.terminate()
            pool.shutdown(cancel_futures=True)
            raise


def values_of(comparison: Comparison, table: Table, row: Row) -> dict[str, list[float]]:
    """A row's measures, each a list over seeds; what does not apply to it is left out."""
    values: dict[str, list[float]] = {}
    for seed in comparison.seeds:
        run = _folder(comparison, row.reads or row.name, seed)
        result = json.loads((run / "evaluation.json").read_text())
        for measure in table.measures:
            name = row.measures.get(measure, row.prefix + measure)
            if (not row.reads or row.prefix or measure in row.measures) and name in result:
                if not isinstance(result[name], int | float):
                    raise ConfigError(f"{run}/evaluation.json is damaged ({name} is no number): evaluate {run} again")
                values.setdefault(measure, []).append(result[name])
        if not row.reads:
            cost = _cost(run)
            values.setdefault("steps", []).append(cost.steps)
            values.setdefault("seconds", []).append(cost.steps * cost.seconds_per_step)
    return values


def same_images(comparison: Comparison) -> str:
    """On which images all rows were measured. Raises ConfigError where they differ."""
    found: dict[str, str] = {}
    for row in comparison.rows.values():
        for seed in comparison.seeds:
            run = _folder(comparison, row.reads or row.name, seed)
            told = read_json(run / "evaluation.json", _Result).measured_on
            found[f"split {told.get('split', 'test')}, {told.get('images', '?')} images"] = str(run)
    if len(found) > 1:
        places = "; ".join(f"{run}: {images}" for images, run in found.items())
        raise ConfigError(f"rows are measured on different images ({places}): evaluate them on the same")
    return next(iter(found))


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation (0 for a single value)."""
    found = list(values)
    return statistics.fmean(found), statistics.stdev(found) if len(found) > 1 else 0.0


def lines(table: Table, values: dict[str, dict[str, list[float]]]) -> Iterator[str]:
    """The table as text: mean ± standard deviation over seeds; steps and seconds of training as means."""
    columns = [*table.measures, "steps", "seconds"]
    cells = []
    for name, row in values.items():
        shown = []
        for column in columns:
            if column not in row:
                shown.append("")
                continue
            mean, deviation = mean_and_deviation(row[column])
            shown.append(f"{mean:.0f}" if column in ("steps", "seconds") else f"{mean:.4f} ± {deviation:.4f}")
        cells.append([name, *shown])
    head, *rows = tabulate(cells, [table.title, *columns], "plain", disable_numparse=True).splitlines()
    yield from [head.rstrip(), "─" * max(map(len, [head, *rows])), *map(str.rstrip, rows)]


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 2 for a file that cannot be run, 1 where a run failed."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist.compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("comparison", type=path_argument, help="a YAML file, or the name of a shipped one (digits)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of all rows' configurations")
    parser.add_argument("--output", type=folder_or_url, metavar="DIR", help="instead of the file's output_dir")
    parser.add_argument("--seeds", type=int, nargs="+", metavar="N", help="instead of the file's seeds")
    parser.add_argument("--jobs", type=int, default=0, metavar="N", help="runs at once (default: the file's, or 1)")
    parser.add_argument(
        "--launch", type=folder_or_url, default="", metavar="NAME", help="a launch configuration (ddp), or its file"
    )
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    options = parser.parse_intermixed_args(arguments)
    trust(options.trust)
    for number in (signal.SIGTERM, signal.SIGHUP):  # as Ctrl-C: its jobs must not run on without it
        if signal.getsignal(number) is signal.SIG_DFL:
            signal.signal(number, signal.default_int_handler)
    try:
        given = {"output_dir": options.output, "seeds": options.seeds, "jobs": options.jobs}
        given = {key: value for key, value in given.items() if value}
        file = named_file(options.comparison, "configs/compare", "comparison")
        launch = str(named_file(options.launch, "launch", "launch configuration")) if options.launch else ""
        comparison, base, more = read_comparison(file, given), file.parent, options.overrides

        def jobs(timed: bool) -> list[Job]:
            rows = [row for row in comparison.rows.values() if not row.reads and bool(row.time_of) == timed]
            return [make_job(comparison, base, row, seed, more) for seed in comparison.seeds for row in rows]

        first = jobs(timed=False)
        timed = sum(bool(row.time_of) for row in comparison.rows.values()) * len(comparison.seeds)
        with tqdm(total=len(first) + timed, unit="run", mininterval=0.5) as bar:
            run_all(first, launch, comparison.jobs, bar, options.trust)
            run_all(jobs(timed=True), launch, comparison.jobs, bar, options.trust)
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    output = Path(comparison.output_dir)
    try:
        measured_on = same_images(comparison)
        results = {
            table.title: {row.name: values_of(comparison, table, row) for row in table.rows}
            for table in comparison.tables
        }
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    write_json(output / "comparison.json", {"seeds": comparison.seeds, "tables": results})
    for table in comparison.tables:
        print("\n".join(["", *lines(table, results[table.title])]))
    from lzn_dist.evaluation.figures import comparison_figure

    columns = {table.title: table.measures for table in comparison.tables}
    figure = comparison_figure(results, columns, output / "comparison.png")
    print(f"\n{len(comparison.seeds)} seeds; mean ± standard deviation over them; measured on {measured_on}")
    print(f"written: {output}/comparison.json, {figure}")
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
