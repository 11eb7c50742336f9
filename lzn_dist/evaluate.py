"""Evaluate a trained run: python -m lzn_dist.evaluate RUN

On several GPUs: accelerate launch --config_file launch/ddp.yaml lzn_dist/evaluate.py RUN; the values are the same.
Prints one table, writes RUN/evaluation.json and figures to RUN/figures/. What is measured depends on the task: for a
joint model classification accuracy over noise scales, recognised samples, Fréchet distances, reconstruction and
probes; for a generation model the same without labels; for a representation model linear probe, nearest neighbours
and a probe from 10 labels a class, beside raw pixels and an untrained encoder. Averaged (EMA) weights are used.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from tabulate import tabulate

from lzn_dist.config import ConfigError, override
from lzn_dist.data import CorruptSampleError
from lzn_dist.distributed import Topology
from lzn_dist.distributed.spread import once
from lzn_dist.engines.start import join_world, leave_world
from lzn_dist.evaluation import EvaluationData, evaluate_model, write_figures
from lzn_dist.evaluation.data import Unmeasurable
from lzn_dist.evaluation.linear_probe import ProbeSettings, published_probe
from lzn_dist.exchange import ExportError
from lzn_dist.exit_status import REFUSED, status_of
from lzn_dist.inference import LZN, MissingCapability
from lzn_dist.inference.loading import load_everywhere
from lzn_dist.json_files import write_json
from lzn_dist.paths import path_argument
from lzn_dist.terminal import TRUST, command
from lzn_dist.training.checkpoint import CheckpointError


def table(values: dict[str, float], title: str) -> str:
    """Two aligned columns between rules, under the title."""
    lines = tabulate(list(values.items()), tablefmt="plain", floatfmt=".4f")
    rule = "─" * max([len(title), *map(len, lines.splitlines())])
    return "\n".join([title, rule, lines, rule])


def show_probe(epoch: int, loss: float) -> None:
    """A line an epoch of the published probe."""
    print(f"linear probe: epoch {epoch}, loss {loss:.4f}", file=sys.stderr, flush=True)


def write_results(path: Path, model: LZN, values: dict[str, float], seed: int, **more: Any) -> None:
    """The values as JSON, with the step, the seed and the settings they belong to, and what more there is to say of
    them; a reader sees the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    config = model.config.model_dump(mode="json")
    settings = {section: config[section] for section in ("data", "flow", "evaluation")}
    write_json(
        path, {"step": model.step, "task": model.config.task, "seed": seed, **values, **more, "settings": settings}
    )


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="lzn_dist.evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=path_argument, metavar="RUN", help="folder of a run, as output_dir names it")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="of evaluation., flow. or data., as evaluation.inception=hub"
    )
    parser.add_argument(
        "--checkpoint", type=path_argument, metavar="PATH", help="one checkpoint instead of RUN's newest"
    )
    parser.add_argument("--output", type=path_argument, metavar="DIR", help="where results go (default: RUN)")
    parser.add_argument("--quick", action="store_true", help="fewer samples, no sweep, no comparisons: seconds")
    parser.add_argument("--no-comparisons", action="store_true", help="without pixels and an untrained encoder beside")
    parser.add_argument("--no-figures", action="store_true", help="numbers only")
    parser.add_argument("--seed", type=int, default=0, help="seed of the evaluation's random numbers (default: 0)")
    parser.add_argument(
        "--probe-epochs", type=int, default=0, metavar="N", help="also the published linear probe (paper: 300; long)"
    )
    parser.add_argument("--probe-batch", type=int, default=8192, metavar="N", help="its batch (default: 8192)")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    parser.add_argument(
        "--probe-views", choices=("simclr", "digits", "none"), default="",
        help="its augmentations (default: simclr in colour, digits in grey)",
    )  # fmt: skip
    options = parser.parse_intermixed_args(arguments)
    for item in options.overrides:
        if not item.startswith(("evaluation.", "flow.", "data.")):
            parser.error(f"{item}: overrides are of evaluation., flow. or data.; the rest is the checkpoint's")
    return options


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 74 where the data is away, 2 for what the user must mend; said in one
    line."""
    options = parse(arguments)
    start = time.perf_counter()
    main_process = True
    try:
        join_world()
        main_process = Topology.current().is_main
        if (precision := os.environ.get("ACCELERATE_MIXED_PRECISION", "no")) != "no":
            raise ConfigError(f"mixed_precision {precision} of the launcher: measures are in float32, leave it out")
        model = load_everywhere(options.run, options.trust, checkpoint=options.checkpoint)
        model.config = override(model.config, options.overrides)
        output = options.output or options.run
        unwritable = once(lambda: why_unwritable(output))
        if unwritable and main_process:
            print(f"{unwritable}: measures are printed alone; --output DIR keeps them", file=sys.stderr)
        data = EvaluationData(model.config)
        values: dict[str, float] = {}
        left_out: dict[str, str] = {}
        if options.probe_epochs:  # first: what it refuses is told before anything else is measured
            try:
                data.need_held_out()
            except Unmeasurable as error:
                raise ConfigError(f"--probe-epochs: {error}") from error
            settings = ProbeSettings(options.probe_epochs, options.probe_batch, views=options.probe_views)
            found = published_probe(model, data, settings, output, show_probe if main_process else lambda *_: None)
            values |= found if data.held_out else {f"train.{key}": value for key, value in found.items()}
        values |= evaluate_model(model, figures=False, quick=options.quick, data=data, seed=options.seed,
                                 left_out=left_out, comparisons=not options.no_comparisons)  # fmt: skip
        if main_process:  # first of all: whatever fails after this does not lose them
            seconds = time.perf_counter() - start
            print(table(values, f"{options.run} · {model.config.task} · step {model.step} · {seconds:.1f} s"))
            print(describe(data.measured_on, left_out), flush=True)
        if not unwritable:
            written = once(lambda: write_all(model, data, values, left_out, output, options))
            if main_process and written:
                print(f"written: {', '.join(written)}")
    except (CheckpointError, ConfigError, CorruptSampleError, ExportError, MissingCapability, OSError) as error:
        if main_process:
            print(f"error: {error}", file=sys.stderr)
        return REFUSED if isinstance(error, FileNotFoundError) else status_of(error)
    leave_world()
    return 0


def why_unwritable(folder: Path) -> str:
    """Why results cannot be written to a folder; "" where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return ""
    except OSError as error:
        return f"{folder} cannot be written to ({error.strerror})"


def describe(measured_on: dict[str, Any], left_out: dict[str, str]) -> str:
    """Lines for people: on which images, and what is missing, by reason."""
    kind = "held-out" if measured_on["held_out"] else "TRAINING"
    lines = [f"measured on split {measured_on['split']}: {measured_on['images']:,} {kind} images"]
    for reason in dict.fromkeys(left_out.values()):
        names = [name for name, why in left_out.items() if why == reason]
        lines.append(f"left out: {', '.join(names)}: {reason}")
    return "\n".join(lines)


def write_all(
    model: LZN, data: EvaluationData, values: dict[str, float], left_out: dict[str, str], output: Path,
    options: argparse.Namespace,
) -> list[str]:  # fmt: skip
    """Write evaluation.json and the figures, where these are wanted; a figure that cannot be drawn is told. Returns
    what was written. Raises OSError, with the folder in it."""
    try:
        write_results(output / "evaluation.json", model, values, options.seed, measured_on=data.measured_on,
                      left_out=left_out)  # fmt: skip
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}: {output / 'evaluation.json'}") from error
    written = [str(output / "evaluation.json")]
    if not options.no_figures:
        try:
            write_figures(model, data, output, options.seed, options.run)
            written.append(f"{output / 'figures'}/")
        except Exception as error:  # fonts, a backend, a full disk: the measures are there
            print(f"not all figures could be drawn: {type(error).__name__}: {error}", file=sys.stderr)
    return written


if __name__ == "__main__":
    sys.exit(command(main))
