"""A training run in progress: its start, where everything that can be refused is refused, and what it writes."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import ExitStack, nullcontext, suppress
from pathlib import Path

import torch
from accelerate import Accelerator

from lzn_dist.config import Config, ConfigError, changed_keys, save_config
from lzn_dist.data import Batch, BatchStream
from lzn_dist.data.storage import RemoteError
from lzn_dist.distributed import Topology
from lzn_dist.distributed.collectives import all_gather_object
from lzn_dist.engines.launch import Launch
from lzn_dist.engines.start import spoken
from lzn_dist.exit_status import FINISHED, PREEMPTED, told
from lzn_dist.objectives import Samples, build_networks
from lzn_dist.training.batches import make_embedded_data, open_stream, prepare_samples
from lzn_dist.training.centres import measure_centres
from lzn_dist.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    config_of,
    find_checkpoint,
    not_counted,
    set_aside,
)
from lzn_dist.training.flops import training_flops_per_image
from lzn_dist.training.profiler import StepProfiler
from lzn_dist.training.resolve import tokenizer_of
from lzn_dist.training.run_folder import RunFolder, SupersededError, read_lines
from lzn_dist.training.setup import build_state, checkpoint_to_resume, describe
from lzn_dist.training.signals import Signals
from lzn_dist.training.step import StepResult, TrainState
from lzn_dist.training.tracking import Tracker

SLOW_TO_SAVE = 2.0  # GB a process: what a slow disk may not take within the launcher's patience


class Run:
    """The state, and what it reads from and writes to."""

    def __init__(self, config: Config, launch: Launch, accelerator: Accelerator) -> None:
        """Everything that can be refused is refused here, before any long work: raises ConfigError, CheckpointError,
        RemoteError (a server that is away)."""
        self.config, self.accelerator, self.topology = config, accelerator, Topology.current()
        self.folder = RunFolder(Path(config.output_dir)) if self.topology.is_main else None
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
        except (CheckpointError, ConfigError, RemoteError):
            raise
        except OSError as error:
            raise ConfigError(told(error, config.output_dir)) from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
        writing = nullcontext if self.folder is None else self.folder.held
        tokenizer = tokenizer_of(config, self.stream.dataset.index)
        self.writer = CheckpointWriter(
            Path(config.output_dir) / "checkpoints", config, int(incarnation or 0), writing,
            None if tokenizer is None else tokenizer.content,
        )  # fmt: skip
        self._centred = -1  # the step at which the objective's centres were measured
        self._announce(checkpoint)
        flops = training_flops_per_image(build_networks(config), config) if torch.cuda.is_available() else 0.0
        self.tracker = Tracker(config, accelerator, self.folder, self.state.counters.step, flops)
        profiles = None if self.folder is None else self.folder.path / "profile"
        self.profiler = StepProfiler(config.profile_steps, profiles, accelerator.device, self.tracker.bar.write)

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
            for change in changed_keys(config_of(checkpoint), self.config):
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
        for advice in state.objective.advice():
            say(advice)
        size = 16 * sum(shapes) / self.topology.world_size / 1e9  # weights, averages and two moments in float32
        if "TORCHELASTIC_RUN_ID" in os.environ and size > SLOW_TO_SAVE:
            say(
                f"a checkpoint is {size:.0f} GB a process: ended by Ctrl-C or SIGTERM, the launcher kills what has not "
                "saved within 30 s; SIGUSR1 to any of the processes gives them the time that they need"
            )

    def status(self, status: str, why: str = "") -> None:
        if self.folder is not None:
            engine = {"engine": self.state.engine.running(), "world_size": self.topology.world_size}
            self.folder.status(status, self.state.counters.step, why, **engine)

    def carry_out(self, train: Callable[[Run, Signals], str]) -> int:
        """Train to the end and say how it ended; returns the exit status. train: returns the signal that ended it."""
        try:
            with Signals(self._stopped_at_once) as signals:
                self.status("running")
                ended = train(self, signals)
                self.writer.close()
                self.profiler.close()
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
        print(f"\nstopped at once: {self.newest()}", file=sys.stderr, flush=True)
        self.status("failed", f"ended at once by a second Ctrl-C; {self.newest()}")

    def prepare(self, batch: Batch) -> Samples:
        """Of the next global batch, what this rank's objective sees."""
        return prepare_samples(
            batch, self.state.counters.batch, self.state.objective, self.accelerator.device, self.topology
        )

    def log(self, result: StepResult) -> None:
        """A step that was taken: the bar, and where it is due a line of metrics. Collective."""
        self.tracker.bar.update()
        step = self.state.counters.step
        if step == self.config.max_steps or step % self.config.log_every == 0:
            rates = {group["name"]: group["lr"] for group in self.state.engine.groups}
            self.tracker.log(self.state.counters, result.scalars, rates, self.state.watch.take())

    def save(self) -> None:
        """A checkpoint, written while training goes on. Collective."""
        self.measure_centres()
        self.writer.save(self.state)
        self.status("running")

    def checkpoint(self) -> None:
        """A checkpoint that is there when this returns. Collective."""
        self.measure_centres()
        self.writer.save(self.state)
        self.writer.wait()

    def measure_centres(self) -> None:
        """Those of the objective, at this step. A checkpoint is more than they are: where the data is away it has those
        of before. Collective."""
        if self._centred == self.state.counters.step:
            return
        try:
            measure_centres(self.state, self.stream.dataset.index)
            self._centred = self.state.counters.step
        except (OSError, ValueError) as error:  # the same on all ranks
            if self.topology.is_main:
                print(f"centres of anchors are those of before: {error}", file=sys.stderr, flush=True)

    def newest(self) -> str:
        """The checkpoint to go on from, in words."""
        try:
            return f"the newest checkpoint is {find_checkpoint(self.config.output_dir)}"
        except CheckpointError:
            return "there is no checkpoint"

    def evaluation_due(self) -> bool:
        """At this step."""
        step, every = self.state.counters.step, self.config.evaluate_every
        return step == self.config.max_steps or bool(every and step % every == 0)

    def evaluated(self) -> bool:
        """Whether this step's evaluation is there: a run may have ended in it. Collective."""
        lines = [] if self.folder is None else read_lines(self.folder.path / "eval.jsonl")
        return all_gather_object(any(line["step"] == self.state.counters.step for line in lines))[0]
