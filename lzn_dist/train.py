"""Train: accelerate launch lzn_dist/train.py CONFIG [key=value ...]

Every task, on one process or many, goes through this loop. CONFIG is a YAML file of configs/; key=value overrides
any of its keys (max_steps=100 optimizer.encoder_lr=1e-4). The engine (DDP, ZeRO, FSDP2) is the one of the launch
configuration (--config_file launch/zero2.yaml). Results, metrics and checkpoints go to output_dir; running the same
command again resumes from the newest complete checkpoint. Ctrl-C, a closed terminal (SIGHUP), SIGTERM, SIGUSR1 and
SIGUSR2 end the run at the next step with a checkpoint and exit status 75: run it again to go on. A second Ctrl-C ends
it at once, without one (130). Launchers have an exit status of their own, 1 for any of these.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path
from typing import NoReturn

import torch
from accelerate import Accelerator
from torch.distributed.checkpoint.api import CheckpointException

from lzn_dist.config import Config, ConfigError, load_config, save_config
from lzn_dist.data import BatchStream, CorruptSampleError
from lzn_dist.data.storage import RemoteError, is_remote
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import all_gather_object, broadcast_object
from lzn_dist.distributed.pieces import gather_pieces
from lzn_dist.engines.flags import obey
from lzn_dist.engines.launch import Launch, build_accelerator
from lzn_dist.engines.start import spoken
from lzn_dist.exit_status import FINISHED, PREEMPTED, REFUSED, UNREADABLE, disk_is_full, status_of, told
from lzn_dist.inference import LZN
from lzn_dist.networks import build_networks
from lzn_dist.objectives import Samples
from lzn_dist.terminal import command
from lzn_dist.training.batches import make_embedded_data, no_samples, open_stream, prepare_samples
from lzn_dist.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    average_pieces,
    find_checkpoint,
    not_counted,
    set_aside,
    unwrapped,
)
from lzn_dist.training.flops import training_flops_per_image
from lzn_dist.training.resolve import resolve
from lzn_dist.training.run_folder import RunFolder, SupersededError, read_lines
from lzn_dist.training.setup import build_state, changed_keys, checkpoint_to_resume, describe
from lzn_dist.training.signals import Signals, end_with_launcher
from lzn_dist.training.step import TrainState, train_step
from lzn_dist.training.tracking import BadSamples, Tracker
from lzn_dist.training.watchdog import Watchdog

SLOW_TO_SAVE = 2.0  # GB a process: what a slow disk may not take within the launcher's patience


class NonfiniteError(RuntimeError):
    """Too many steps in a row had gradients that are not finite."""


class NoDataError(RuntimeError):
    """The training data cannot be read any more, or too much of it is damaged. status: the exit status."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Run:
    """A training run in progress: the state, and what it reads from and writes to."""

    def __init__(self, config: Config, launch: Launch, accelerator: Accelerator) -> None:
        """Everything that can be refused is refused here, before any long work: raises ConfigError, CheckpointError,
        NoDataError (a server that is away)."""
        self.config, self.accelerator, self.topology = config, accelerator, Topology.current()
        self.folder = RunFolder(Path(config.output_dir)) if self.topology.is_main else None
        if config.evaluation.inception and config.task != "representation":
            from lzn_dist.evaluation.report import inception_network  # what it needs must be there before a long run

            inception_network(config, accelerator.device)
        try:
            # from choosing the checkpoint to taking the folder nobody else may remove it
            with ExitStack() as held:
                held.enter_context(spoken(lambda: f"rank {self.topology.rank} is still {doing}"))
                doing = f"waiting for {config.output_dir}"
                if self.folder is not None:
                    held.enter_context(self.folder.unchanging())
                checkpoint = checkpoint_to_resume(config, None if self.folder is None else held)
                doing = f"reading what {config.data.shards} holds"
                make_embedded_data(config, accelerator)
                self.stream: BatchStream = open_stream(config, self.topology)
                doing = "building networks and engine" + (f", from {checkpoint}" if checkpoint else "")
                self.state: TrainState = build_state(config, launch, accelerator, checkpoint)
                doing = "waiting for the other ranks to be ready"
                # taken last: a start that is refused must not stop a run that works
                incarnation = all_gather_object(self._take(checkpoint) if self.folder is not None else None)[0]
        except (CheckpointError, ConfigError):
            raise
        except RemoteError as error:
            raise NoDataError(str(error), UNREADABLE) from error
        except OSError as error:
            raise ConfigError(told(error, config.output_dir)) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        writing = nullcontext if self.folder is None else self.folder.held
        self.writer = CheckpointWriter(Path(config.output_dir) / "checkpoints", config, int(incarnation or 0), writing)
        self._announce(checkpoint)
        flops = training_flops_per_image(build_networks(config), config) if torch.cuda.is_available() else 0.0
        self.tracker = Tracker(config, accelerator, self.folder, self.state.counters.step, flops)

    def _take(self, checkpoint: Path | None) -> str:
        """Take the folder; what it holds past the checkpoint is of a course that the run leaves now."""
        assert self.folder is not None
        self.folder.take()
        aside = set_aside(self.folder.path / "checkpoints", checkpoint, self.folder.incarnation)
        if aside is not None:
            self.accelerator.print(f"checkpoints that this run does not go on from are in {aside} now")
        own = checkpoint is not None and checkpoint.parent.resolve() == (self.folder.path / "checkpoints").resolve()
        self.folder.trim(self.state.counters.step if own else 0)
        return str(self.folder.incarnation)

    def _announce(self, checkpoint: Path | None) -> None:
        say, state = self.accelerator.print, self.state
        if checkpoint is not None:
            say(f"resumed from {checkpoint} at step {state.counters.step}")
            for change in changed_keys(load_config(checkpoint / "config.yaml"), self.config):
                say(f"changed since that checkpoint: {change}")
        if self.folder is not None:
            for other in not_counted(self.folder.path / "checkpoints"):
                say(f"no checkpoint of this run, left as it is: {other}")
            with self.folder.held():
                save_config(self.config, self.folder.path / "config.yaml")
        say(self.stream)
        shapes = [piece.numel for piece in state.engine.weights().values()]
        say(
            f"{self.config.task}: {sum(shapes):,} parameters, {describe(state)}, "
            f"step {state.counters.step} to {self.config.max_steps}"
        )
        size = 16 * sum(shapes) / self.topology.world_size / 1e9  # weights, averages and two moments in float32
        if "TORCHELASTIC_RUN_ID" in os.environ and size > SLOW_TO_SAVE:
            say(
                f"a checkpoint is {size:.0f} GB a process: ended by Ctrl-C or SIGTERM, the launcher kills what has not "
                "saved within 30 s; SIGUSR1 to any of the processes gives them the time that they need"
            )

    def status(self, status: str, why: str = "") -> None:
        if self.folder is not None:
            engine = {"engine": self.state.engine.name, "world_size": self.topology.world_size}
            self.folder.status(status, self.state.counters.step, why, **engine)

    def train(self) -> int:
        """Run to the end; returns the exit status."""
        try:
            with Signals(self._stopped_at_once) as signals:
                self.status("running")
                ended = self._loop(signals)
                self.writer.close()
                if ended:
                    self.status("preempted", f"{ended}: checkpointed; start it again to go on")
                else:
                    self.status("finished")
                # before any rank leaves: when one has ended, the launcher may end the others
                self.accelerator.wait_for_everyone()
        except SupersededError:
            raise
        except BaseException as error:
            with suppress(OSError):  # on a full disk: it must not hide the reason
                self.status("failed", f"{type(error).__name__}: {error}")
            self.tracker.bar.close()  # what is said next begins a line
            raise
        self.tracker.close()
        return PREEMPTED if ended else FINISHED

    def _stopped_at_once(self) -> None:
        """A second Ctrl-C: the last words."""
        print(f"\nstopped at once: {self._newest()}", file=sys.stderr, flush=True)
        self.status("failed", f"ended at once by a second Ctrl-C; {self._newest()}")

    def _loop(self, signals: Signals) -> str:
        """Steps up to max_steps, or to a signal, whose name is returned."""
        config, state, counters, watch = self.config, self.state, self.state.counters, self.state.objective.watch
        watchdog = Watchdog(watch, config.watchdog)
        bad = BadSamples(self.folder, counters.batch // self.stream.batches_per_epoch)
        batches = self.stream.iterate(counters.batch, 2**62, lambda: bool(signals.received))
        lost: Exception | None = None  # why this rank has no data
        try:
            if counters.step and self._evaluation_due() and not self._evaluated():
                self._evaluate_or_stop()
            while counters.step < config.max_steps:
                watchdog.begin(counters.step)
                damaged = 0
                with watch("data"):
                    place = counters.batch, config, self.accelerator.device, self.topology
                    try:
                        batch = next(batches)
                        damaged = bad.count(batch)
                        samples = prepare_samples(batch, *place)
                    except (OSError, ValueError) as error:
                        lost, samples = error, no_samples(*place)
                result = train_step(state, samples, (bool(signals.received), lost is not None, damaged))
                watchdog.idle()
                stop, without_data, damaged_everywhere = result.votes
                new_damage = bad.report(damaged_everywhere, counters.step)
                if without_data:
                    counters.batch, counters.nonfinite = counters.batch - 1, counters.nonfinite - 1  # not consumed
                    if stop:  # the wait for data was given up for a signal
                        self._checkpoint()
                        return broadcast_object(signals.received or None) or "another rank's signal"
                    self._no_more_data("" if lost is None else f"rank {self.topology.rank}: {lost}", status_of(lost))
                if not result.applied:
                    self._skipped(samples)
                step, last = counters.step, counters.step == config.max_steps
                if result.applied:
                    self.tracker.bar.update()
                    if last or step % config.log_every == 0:
                        rates = {group["name"]: group["lr"] for group in state.engine.groups}
                        self.tracker.log(counters, result.scalars, rates, watch.take())
                    # also before an evaluation that may lose its server
                    unsure = self._evaluation_due() and is_remote(config.data.shards)
                    if last or stop or unsure or step % config.checkpoint_every == 0:
                        self.writer.save(state)
                        self.status("running")
                    if self._evaluation_due():
                        self._evaluate_or_stop()
                if new_damage and damaged_everywhere > config.data.max_bad_samples:
                    self._no_more_data(
                        f"{damaged_everywhere:.0f} samples of this epoch are damaged, data.max_bad_samples is "
                        f"{config.data.max_bad_samples}: see bad_samples.jsonl, mend the shards or raise it",
                        REFUSED,
                    )
                if stop and not last:
                    if not result.applied:
                        self.writer.save(state)
                    return broadcast_object(signals.received or None) or "another rank's signal"
        finally:
            watchdog.close()
            batches.close()  # type: ignore[attr-defined]
        return ""

    def _no_more_data(self, why: str, status: int) -> NoReturn:
        """All ranks stop here, with a checkpoint to go on from when the data is back. why: as this rank knows it, ""
        where it knows of nothing; status: what that means."""
        failed: list[str] = []
        for write in (self.writer.wait, self._checkpoint):  # a rank whose earlier one failed must not miss this one
            failed = sorted(set(all_gather_object(_problem(write))) - {""})
        kept = f"without a new checkpoint, {self._newest()} ({'; '.join(failed)})" if failed else "with a checkpoint"
        told = {(reason, code) for reason, code in all_gather_object((why, status)) if reason}
        reasons = "; ".join(sorted({reason for reason, _ in told}))
        # what only a person can mend outweighs what may come back by itself
        code = REFUSED if any(code == REFUSED for _, code in told) else UNREADABLE
        raise NoDataError(f"stopped at step {self.state.counters.step} {kept}: {reasons}", code)

    def _checkpoint(self) -> None:
        self.writer.save(self.state)
        self.writer.wait()

    def _newest(self) -> str:
        try:
            return f"the newest checkpoint is {find_checkpoint(self.config.output_dir)}"
        except CheckpointError:
            return "there is no checkpoint"

    def _evaluate_or_stop(self) -> None:
        """Evaluate; NoDataError where images cannot be read. That may be so on this rank alone, the others being still
        in the evaluation: nothing here needs them."""
        try:
            self._evaluate()
        except (OSError, CorruptSampleError) as error:
            _problem(self.writer.wait)  # the checkpoint of this step may be under way
            step, rank = self.state.counters.step, self.topology.rank
            raise NoDataError(
                f"stopped in the evaluation at step {step}, {self._newest()}: rank {rank}: {error}", status_of(error)
            ) from error

    def _evaluation_due(self) -> bool:
        step, every = self.state.counters.step, self.config.evaluate_every
        return step == self.config.max_steps or bool(every and step % every == 0)

    def _evaluated(self) -> bool:
        """Whether this step's evaluation is there: a run may have ended in it. Collective."""
        lines = [] if self.folder is None else read_lines(self.folder.path / "eval.jsonl")
        return all_gather_object(any(line["step"] == self.state.counters.step for line in lines))[0]

    def _skipped(self, samples: Samples) -> None:
        """A step's gradients were not finite: count it, and stop the run when it has no end."""
        count, limit = self.state.counters.nonfinite, self.config.max_nonfinite
        self.accelerator.print(
            f"skipped global batch {samples.batch}: its gradients are not finite ({count} of {limit} in a row)",
            file=sys.stderr,
        )
        if count >= limit:
            folder = Path(self.config.output_dir) / "nonfinite"
            folder.mkdir(exist_ok=True)
            torch.save(vars(samples), folder / f"batch_{samples.batch}_rank_{self.topology.rank}.pt")
            _problem(self.writer.wait)  # one may be under way
            raise NonfiniteError(
                f"{count} steps in a row had gradients that are not finite; the last batch is in {folder}, "
                f"{self._newest()}: lower the learning rate or look at the data"
            )

    def _evaluate(self) -> None:
        """Measure the EMA weights in seconds, on all ranks; evaluate.py does it in full. Collective."""
        from lzn_dist.evaluation import (  # two seconds of imports: not before they are needed
            EvaluationData,
            evaluate_model,
        )

        state, config = self.state, self.config
        averages = gather_pieces(average_pieces(state.ema, state.engine), everywhere=True)
        networks = build_networks(config)
        networks.load_state_dict(averages | state.engine.constants)  # type: ignore[operator]
        model = LZN(networks.to(self.accelerator.device), config)
        data, left_out = EvaluationData(config), dict[str, str]()
        with torch.no_grad():
            values = evaluate_model(model, figures=False, quick=True, data=data, left_out=left_out)
        if self.folder is not None:
            self.tracker.evaluation(state.counters.step, values, data.measured_on, left_out)
        self.tracker.resume_clock(state.counters.step)


def _full_disk(error: BaseException | None) -> OSError | None:
    """The full disk (or quota) that is behind an error, if there is one."""
    while error is not None:
        error = unwrapped(error)
        if isinstance(error, OSError):
            return error if disk_is_full(error) else None
        error = error.__cause__ or error.__context__
    return None


def _problem(action: Callable[[], None]) -> str:
    """What went wrong with writing, in a line; "" if nothing did."""
    try:
        action()
    except (Exception, CheckpointException) as error:  # the latter is no Exception in torch
        return repr(_full_disk(error) or unwrapped(error)).splitlines()[0]
    return ""


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 75 after a signal, 74 where the data is away, 2 for what the user must
    mend; said in one line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", help="a YAML file, for example configs/digits_joint.yaml")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="overrides of its keys")
    options = parser.parse_args(arguments)
    end_with_launcher()
    try:
        config = load_config(options.config, options.overrides)
        launch = Launch.asked()
        config = resolve(obey(config, launch.deepspeed))
        accelerator = build_accelerator(config, launch)
        status = Run(config, launch, accelerator).train()
        accelerator.end_training()
    except (ConfigError, CheckpointError, NonfiniteError, NoDataError, SupersededError) as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status if isinstance(error, NoDataError) else REFUSED
    except RemoteError as error:
        print(f"error: {error}", file=sys.stderr)
        return UNREADABLE
    except (OSError, RuntimeError, CheckpointException) as error:
        full = _full_disk(error)
        if full is None:
            raise
        where = full.filename or config.output_dir
        print(f"error: {full.strerror}: {where}; free some and start again from the newest checkpoint", file=sys.stderr)
        return REFUSED
    return status


if __name__ == "__main__":
    sys.exit(command(main))
