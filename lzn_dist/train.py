"""Train: accelerate launch lzn_dist/train.py CONFIG [key=value ...]

Every task, on one process or many, goes through this loop. CONFIG is a YAML file of configs/; key=value overrides
any of its keys (max_steps=100 modalities.image.encoder.lr=1e-4). The engine (DDP, ZeRO, FSDP2) is the one of the launch
configuration (--config_file launch/zero2.yaml). Results, metrics and checkpoints go to output_dir; running the same
command again resumes from the newest complete checkpoint. Ctrl-C, a closed terminal (SIGHUP), SIGTERM, SIGUSR1 and
SIGUSR2 end the run at the next step with a checkpoint and exit status 75: run it again to go on. A second Ctrl-C ends
it at once, without one (130). Launchers have an exit status of their own, 1 for any of these.
"""

from __future__ import annotations

import argparse
import sys
from contextlib import closing

import lzn_dist  # noqa: F401  # isort: skip  (before torch: how threads wait)
import torch
from torch.distributed.checkpoint.api import CheckpointException

from lzn_dist.config import load_config
from lzn_dist.data import CorruptSampleError
from lzn_dist.data.storage import is_remote
from lzn_dist.distributed.collectives import sum_over_ranks
from lzn_dist.engines.flags import obey
from lzn_dist.engines.launch import Launch, build_accelerator
from lzn_dist.exit_status import status_of
from lzn_dist.inference import LZN
from lzn_dist.networks import trust
from lzn_dist.objectives import needs
from lzn_dist.terminal import TRUST, command
from lzn_dist.training import failures
from lzn_dist.training.centres import averaged_networks
from lzn_dist.training.resolve import resolve
from lzn_dist.training.run import Run
from lzn_dist.training.signals import Signals, end_with_launcher
from lzn_dist.training.step import train_step
from lzn_dist.training.tracking import BadSamples
from lzn_dist.training.watchdog import Watchdog


def train(run: Run, signals: Signals) -> str:
    """Steps up to max_steps, or to a signal, whose name is returned. Every rank takes the same turns."""
    config, state, counters, watch = run.config, run.state, run.state.counters, run.state.watch
    bad = BadSamples(run.folder, counters.batch // run.stream.batches_per_epoch)
    batches = run.stream.iterate(counters.batch, 2**62, lambda: bool(signals.received))
    with closing(batches), closing(Watchdog(watch, config.watchdog)) as watchdog:
        if counters.step and run.evaluation_due() and not run.evaluated():
            evaluate(run)
        while counters.step < config.max_steps:
            watchdog.begin(counters.step)
            samples, damaged, lost = None, 0, None
            with watch("data"):
                try:
                    batch = next(batches)
                    damaged = bad.count(batch)
                    samples = run.prepare(batch)
                except (OSError, ValueError) as error:
                    lost = error
            with watch("agree"):
                votes = bool(signals.received), samples is None, damaged
                stop, without_data, damaged_everywhere = sum_over_ranks(votes, run.accelerator.device)
            if without_data or samples is None:
                watchdog.idle()
                bad.report(damaged_everywhere, counters.step)
                if stop:  # the wait for data was given up for a signal
                    run.checkpoint()
                    return signals.agreed()
                failures.no_more_data(run, f"rank {run.topology.rank}: {lost}" if lost else "", status_of(lost))
            result = train_step(state, samples)
            watchdog.idle()
            run.profiler.step()
            new_damage = bad.report(damaged_everywhere, counters.step)
            step, last = counters.step, counters.step == config.max_steps
            if result.applied:
                run.log(result)
                # also before an evaluation that may lose its server
                unsure = run.evaluation_due() and is_remote(config.data.shards)
                if last or stop or unsure or step % config.checkpoint_every == 0:
                    run.save()
                if run.evaluation_due():
                    evaluate(run)
            else:
                failures.skipped(run, samples)
            if new_damage and damaged_everywhere > config.data.max_bad_samples:
                failures.too_much_damage(run, damaged_everywhere)
            if stop and not last:
                if not result.applied:
                    run.writer.save(state)
                return signals.agreed()
    return ""


def evaluate(run: Run) -> None:
    """Measure the EMA weights in seconds, on all ranks; evaluate.py does it in full. Collective. Raises NoDataError."""
    from lzn_dist.evaluation import EvaluationData, evaluate_model  # two seconds: not before they are needed

    state, config = run.state, run.config
    run.measure_centres()
    model = LZN(averaged_networks(state), config, centres=state.objective.centres)
    left_out: dict[str, str] = {}
    try:
        data = EvaluationData(config)
        with torch.no_grad():
            values = evaluate_model(model, figures=False, quick=True, data=data, left_out=left_out)
    except (OSError, CorruptSampleError) as error:
        failures.unreadable_in_evaluation(run, error)
    if run.folder is not None:
        run.tracker.evaluation(state.counters.step, values, data.measured_on, left_out)
    run.tracker.resume_clock(state.counters.step)


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 75 after a signal, 74 where the data is away, 2 for what the user must
    mend; said in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, for example configs/digits_joint.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its keys")
    parser.add_argument("--trust", action="append", default=[], metavar="PACKAGE", help=TRUST)
    options = parser.parse_intermixed_args(arguments)
    trust(options.trust)
    end_with_launcher()
    output_dir = ""
    try:
        config = load_config(options.config, options.overrides)
        output_dir = config.output_dir
        launch = Launch.asked()
        config = resolve(obey(config, launch.deepspeed))
        accelerator = build_accelerator(config, launch)
        if config.evaluation.inception and needs(config).decodes:
            from lzn_dist.evaluation.report import inception_network  # what it needs must be there before a long run

            inception_network(config, accelerator.device)
        status = Run(config, launch, accelerator).carry_out(train)
        accelerator.end_training()
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch
        explained = failures.explained(error, output_dir)
        if explained is None:
            raise
        return explained
    return status


if __name__ == "__main__":
    sys.exit(command(main))
