"""Kill training runs with SIGKILL at random moments, start them again at once, and compare with the undisturbed run.

    python -m tests.soak.kills [--runs 20] [--seed 0] [--engine ddp]

Each disturbed run is killed several times: one rank, all ranks, or the launcher alone, whose ranks live on as orphans
beside the run's next incarnation. Orphans either run on (and mostly finish the run before the next incarnation is up)
or are halted until that incarnation has taken the folder, as a node that hung and came back: these must find out and
write nothing. Some kills come while a checkpoint is written, some while the run starts.

After every kill the newest complete checkpoint must be the reference's of that step, bit for bit; every resume must
name the newest that was complete, and what is started again must not begin anew or be refused. At the end the metrics
hold every step once, with the reference's values bit for bit (times and memory aside), the last checkpoint the same
weights, averages and moments bit for bit, the last incarnation wrote the status, and all orphans have ended by
themselves.
Without --engine: --runs runs under DDP, then two each under ZeRO-2, ZeRO-3 and FSDP2, and two that change the world:
2 ranks go on as 1, ZeRO-3 goes on under DDP (equal over the next 20
steps, to 1e-9 in float64 and, as ZeRO has none, to 1e-4 in float32; afterwards rounding has grown).
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from tests.helpers.launching import SMALL, untimed_rows
from tests.helpers.settings import decoder_with

ROOT = Path(__file__).parents[2]
STEPS = 40
SETTINGS = [
    *SMALL, *decoder_with(attention_resolutions=[]), "log_every=1", "checkpoint_every=3", f"max_steps={STEPS}",
]  # fmt: skip
warnings.filterwarnings("ignore", message="torch.distributed is disabled")


def command(folder: Path, engine: str, processes: int) -> list[str]:
    launch = ["--config_file", f"launch/{engine}.yaml", f"--num_processes={processes}", "--main_process_port", "0"]
    config = ["lzn_dist/train.py", "configs/digits_joint.yaml", f"output_dir={folder}"]
    shards = f"data.shards={folder.parent / 'digits'}"
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, *config, shards, *SETTINGS]


def start(folder: Path, engine: str, processes: int, *overrides: str) -> subprocess.Popen[bytes]:
    """Launch the run, or its next incarnation; what it says is added to FOLDER.log."""
    with log_of(folder).open("ab") as log:
        return subprocess.Popen([*command(folder, engine, processes), *overrides], stdout=log, stderr=log, cwd=ROOT)


def log_of(folder: Path) -> Path:
    return folder.parent / f"{folder.name}.log"


def ranks(launcher: int) -> list[int]:
    """Processes of train.py under a launcher, found by their parents."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = path.read_text()
        except OSError:
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(path.parent.name))
    found, waiting = [], [launcher]
    while waiting:
        pid = waiting.pop()
        waiting += children.get(pid, [])
        if pid != launcher and b"train.py" in _command_line(pid):
            found.append(pid)
    return sorted(set(found))


def _command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def complete(folder: Path) -> list[str]:
    """Complete checkpoints, oldest first, judged without the project's own code."""
    found = (folder / "checkpoints").glob("step_*")
    return sorted(p.name for p in found if (p / "run.json").is_file() and (p / ".metadata").is_file())


def tensors(folder: Path, name: str = "") -> dict[str, Tensor]:
    """Everything in a checkpoint, the newest by default."""
    path = folder / "checkpoints" / (name or complete(folder)[-1])
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    state: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype) for name, entry in metadata.items()
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(path), no_dist=True)
    return state


@dataclass
class Outcome:
    scenario: str
    kills: list[str] = field(default_factory=list)
    resumes: int = 0
    orphans: int = 0
    refused: int = 0  # orphans' writes that were refused
    again: int = 0  # steps taken again after a kill
    seconds: float = 0.0  # from the first start to the end
    problems: list[str] = field(default_factory=list)


@dataclass
class Plan:
    """When to kill and how. after: steps of this incarnation, 0 for while it starts; aimed: at a checkpoint's write."""

    after: int
    aimed: bool
    delay: float
    how: str
    halt: bool

    @staticmethod
    def draw(chance: random.Random) -> Plan:
        after = 0 if chance.random() < 0.15 else chance.randint(1, 12)
        return Plan(
            after, after > 0 and chance.random() < 0.5, chance.random() * (8.0 if after == 0 else 0.3),
            chance.choice(["one rank", "all ranks", "launcher alone"]), after > 0 and chance.random() < 0.7,
        )  # fmt: skip


def preempted(folder: Path) -> list[int]:
    """The steps at which a run has said that it checkpointed and ended."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return [event["step"] for event in events if event.get("state") == "preempted"]


def incarnation(folder: Path, name: str = "lock.json") -> int:
    """The incarnation that a file of the run names; 0 where there is none yet."""
    try:
        return int(json.loads((folder / name).read_text())["incarnation"])
    except FileNotFoundError:
        return 0


class Disturbance:
    """A run that is killed and started again until it has ended by itself."""

    def __init__(self, folder: Path, reference: Path, engine: str, chance: random.Random, outcome: Outcome) -> None:
        self.folder, self.reference, self.engine = folder, reference, engine
        self.chance, self.outcome = chance, outcome
        self.orphans: list[int] = []
        self.lost: list[int] = []  # orphans that were still starting: they may never meet
        self.halted: list[int] = []
        self.halted_at = 0  # the incarnation after which halted orphans may go on
        self.seen: set[str] = set()  # checkpoints that were complete at some time
        self.process: subprocess.Popen[bytes] | None = None

    def run(self, kills: int) -> None:
        began = time.monotonic()
        try:
            while self._one_start(Plan.draw(self.chance) if len(self.outcome.kills) < kills else None):
                pass
            self.outcome.seconds = time.monotonic() - began
            self._orphans_end()
        finally:
            for pid in [*self.orphans, *self.lost, *(ranks(self.process.pid) if self.process is not None else [])]:
                if b"train.py" in _command_line(pid):
                    _kill(pid)
        self.outcome.refused = log_of(self.folder).read_text(errors="replace").count("was taken over by incarnation")

    def _one_start(self, plan: Plan | None) -> bool:
        """Start the run and kill it as planned; False when it has ended by itself."""
        outcome, folder = self.outcome, self.folder
        before, reached = complete(folder), len(untimed_rows(folder))
        self.seen.update(before)
        said = log_of(folder).stat().st_size if log_of(folder).exists() else 0
        self.process = start(folder, self.engine, 2)
        kill, up = self._watch(self.process, plan)
        alive = ranks(self.process.pid)
        if kill and plan is not None:
            self._kill(plan, alive)
        status = self.process.wait(timeout=120)
        new = log_of(folder).read_bytes()[said:].decode(errors="replace")  # said is in bytes, bars are not ASCII
        named = re.findall(r"resumed from \S*/(step_\d+) at step (\d+)", new)
        outcome.resumes += len(named)
        if before and not named and (up or not kill):
            outcome.problems.append(f"began anew though {before[-1]} was complete")
        if named:
            outcome.again += max(0, reached - int(named[0][1]))
            if before and named[0][0] < before[-1]:
                outcome.problems.append(f"resumed from {named[0][0]} though {before[-1]} was complete")
            if named[0][0] not in self.seen:
                outcome.problems.append(f"resumed from {named[0][0]}, which never was complete")
        if not kill and status != 0:
            outcome.problems.append(f"a start ended with status {status}, see {log_of(folder)}")
        return kill

    def _kill(self, plan: Plan, alive: list[int]) -> None:
        assert self.process is not None
        halt = plan.how == "launcher alone" and plan.halt
        if plan.how == "launcher alone":
            if halt:  # first of all, as if the machine had stopped
                self.halted += [pid for pid in alive if _signal(pid, signal.SIGSTOP)]
                self.halted_at = incarnation(self.folder)
            self.process.kill()
            # ranks that had not met yet may wait for the launcher's store until the collectives' timeout
            (self.lost if plan.after == 0 else self.orphans).extend(alive)
        else:
            for pid in alive if plan.how == "all ranks" else [self.chance.choice(alive)]:
                _kill(pid)
        writing = any((self.folder / "checkpoints").glob(".step_*.tmp"))
        how = "launcher, ranks halted" if halt else plan.how
        when = " while starting" if plan.after == 0 else " while writing" if writing else ""
        self.outcome.kills.append(how + when)
        self.process.wait(timeout=120)
        if {pid for pid in [*self.orphans, *self.lost] if _alive(pid)} <= set(self.halted):
            self._check_newest()

    def _check_newest(self) -> None:
        """Whatever was going on when the run was killed: what counts as complete is the reference's, bit for bit.

        Where ranks whose launcher was killed have checkpointed by themselves, and said so, it may have none: what goes
        on from there will tell.
        """
        for name in complete(self.folder)[-1:]:
            if name in complete(self.reference):
                self.outcome.problems += [f"{name}: {of}" for of in differences(self.folder, self.reference, name)]
            elif int(name.removeprefix("step_")) not in preempted(self.folder):
                self.outcome.problems.append(f"{name} is complete, of a step at which nobody was to checkpoint")

    def _watch(self, process: subprocess.Popen[bytes], plan: Plan | None) -> tuple[bool, bool]:
        """Until it is time to kill: (whether it is, whether this incarnation has taken a step)."""
        folder, mine, up = self.folder, incarnation(self.folder), False
        base: int | None = None
        end, due = time.monotonic() + 300, float("inf")
        while time.monotonic() < end:
            if process.poll() is not None:
                return False, up
            found = untimed_rows(folder)
            self.seen.update(complete(folder))
            if [row["step"] for row in found] != list(range(1, len(found) + 1)):
                self.outcome.problems.append(f"metrics held steps {[row['step'] for row in found]}")
                return False, up
            taken = incarnation(folder) > mine
            # one that was halted holding the folder's lock keeps the next incarnation waiting until it goes on
            if self.halted and (incarnation(folder) > self.halted_at or time.monotonic() > end - 180):
                time.sleep(self.chance.random() * 0.5)
                self._wake()
            if taken:
                # lines past the checkpoint go a moment after the folder is taken, so that the count may still fall
                base = len(found) if base is None else min(base, len(found))
                up = len(found) > base
            if plan is not None and len(ranks(process.pid)) == 2:
                if plan.after == 0 or (base is not None and len(found) >= base + plan.after and not plan.aimed):
                    due = min(due, time.monotonic() + plan.delay)
                aimed = plan.aimed and base is not None and len(found) >= base + plan.after
                if time.monotonic() >= due or (aimed and any((folder / "checkpoints").glob(".step_*.tmp"))):
                    return process.poll() is None, up
            time.sleep(0.01 if plan is not None and plan.aimed else 0.03)
        process.kill()
        raise TimeoutError(f"{folder} hung")

    def _wake(self) -> None:
        for pid in self.halted:
            _signal(pid, signal.SIGCONT)
        self.halted.clear()

    def _orphans_alive(self) -> list[int]:
        return [pid for pid in self.orphans if _alive(pid)]

    def _orphans_end(self) -> None:
        """Orphans find out by themselves that the run is no longer theirs, or have finished it."""
        self.outcome.orphans = len(self.orphans)
        self._wake()
        end = time.monotonic() + 90
        while self._orphans_alive() and time.monotonic() < end:
            time.sleep(0.2)
        if self._orphans_alive():
            self.outcome.problems.append(f"{len(self._orphans_alive())} orphans were still alive 90 s after the end")


def _signal(pid: int, number: signal.Signals) -> bool:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


def _alive(pid: int) -> bool:
    """Alive and still train.py: a number may have gone to somebody else, a zombie has no command line."""
    return b"train.py" in _command_line(pid)


def _kill(pid: int) -> None:
    _signal(pid, signal.SIGKILL)


def differences(folder: Path, reference: Path, name: str = "") -> list[str]:
    """What differs, bit for bit, between two runs' checkpoints of a step (the newest): nothing, or one line."""
    name = name or complete(reference)[-1]
    if name not in complete(folder):
        return [f"no {name}"]
    a, b = tensors(folder, name), tensors(reference, name)
    different = [key for key in b if key not in a or not torch.equal(a[key], b[key])]
    return [f"{len(different)} tensors differ, among them {different[:1]}"] if different or a.keys() != b.keys() else []


def compare(
    folder: Path, reference: Path, outcome: Outcome, resumed_at: int | None = None, bound: float = 0.0,
    steps: int = STEPS,
) -> None:  # fmt: skip
    """The end of a disturbed run against the undisturbed one: bit for bit, or, where it was resumed on another world,
    to a bound over the next 20 steps."""
    exact = resumed_at is None
    status = json.loads((folder / "status.json").read_text())
    if (status["state"], status["step"]) != ("finished", steps):
        outcome.problems.append(f"status {status}")
    text = (folder / "metrics.jsonl").read_text()
    if text.count("\n") != steps or not text.endswith("\n"):
        outcome.problems.append(f"metrics.jsonl has {text.count(chr(10))} lines and ends in {text[-20:]!r}")
    written = json.loads((folder / "checkpoints" / complete(folder)[-1] / "run.json").read_text())["written_by"]
    if not written["incarnation"] <= status["incarnation"] == incarnation(folder):
        outcome.problems.append(f"incarnation {incarnation(folder)} ended, but {status} and {written} were written")
    ours, theirs = untimed_rows(folder), untimed_rows(reference)
    if [row["step"] for row in ours] != list(range(1, steps + 1)):
        outcome.problems.append(f"steps {[row['step'] for row in ours]}")
    elif exact and ours != theirs:
        first = next(a["step"] for a, b in zip(ours, theirs, strict=True) if a != b)
        outcome.problems.append(f"metrics differ from step {first}")
    elif resumed_at is not None:
        # the training itself makes of a rounding ten times as much every five steps, in undisturbed runs too
        until = min(steps, resumed_at + 20)
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours[:until], theirs, strict=False))
        if not worst <= bound:
            outcome.problems.append(f"losses differ by {worst:.1e} up to step {until}")
    if exact:
        outcome.problems += differences(folder, reference)


def change_world(folder: Path, first: tuple[str, int], then: tuple[str, int], outcome: Outcome, *overrides: str) -> int:
    """Kill a run after its second checkpoint and go on under another engine or number of ranks; from which step."""
    began = time.monotonic()
    process = start(folder, *first, *overrides)
    while len(complete(folder)) < 2 and process.poll() is None:
        time.sleep(0.05)
    for pid in ranks(process.pid):
        _kill(pid)
    process.wait(timeout=120)
    outcome.kills.append("all ranks")
    reached, newest = len(untimed_rows(folder)), complete(folder)[-1]
    status = start(folder, *then, *overrides).wait(timeout=300)
    outcome.seconds = time.monotonic() - began
    named = re.findall(r"resumed from \S*/(step_\d+) at step (\d+)", log_of(folder).read_text())
    outcome.resumes = len(named)
    if status or [name for name, _ in named] != [newest]:
        outcome.problems.append(f"status {status}, resumed from {named}, {newest} was complete")
        return 0
    outcome.again = reached - int(named[0][1])
    return int(named[0][1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=20, help="disturbed runs of the main engine (default: 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2, help="kills a run (default: 2)")
    parser.add_argument("--engine", help="disturb this engine alone")
    options = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="soak."))
    engines = [options.engine or "ddp"] * options.runs
    engines += [] if options.engine else [engine for engine in ("zero2", "zero3", "fsdp") for _ in range(2)]
    outcomes: list[Outcome] = []
    undisturbed: dict[str, float] = {}  # seconds of the undisturbed runs

    def reference(engine: str, *overrides: str) -> Path:
        path = folder / "_".join(("reference", engine, *overrides))
        if not path.exists():
            began = time.monotonic()
            # the same run, of which all checkpoints stay, to compare with
            if (
                start(path, engine, 2, "keep_last=100", *overrides).wait(timeout=300)
                or len(untimed_rows(path)) != STEPS
            ):
                sys.exit(f"the undisturbed run of {engine} failed, see {log_of(path)}")
            undisturbed[engine] = time.monotonic() - began
        return path

    def report(outcome: Outcome, engine: str) -> None:
        outcomes.append(outcome)
        verdict = "pass" if not outcome.problems else "FAIL: " + "; ".join(outcome.problems)
        lost = outcome.seconds - undisturbed[engine]
        print(
            f"{outcome.scenario:<12} {outcome.resumes:>7} {outcome.again:>5} {lost:>6.0f} {outcome.orphans:>7} "
            f"{outcome.refused:>7}  {', '.join(outcome.kills):<62} {verdict}",
            flush=True,
        )

    print(f"{'scenario':<12} resumes again lost,s orphans refused  kills")
    for number, engine in enumerate(engines):
        outcome, path = Outcome(f"{engine} {number + 1}"), folder / f"{engine}_{number + 1}"
        whole = reference(engine)
        # each run's luck is its own, whatever the runs before it met
        chance = random.Random(f"{options.seed} {number}")
        try:
            Disturbance(path, whole, engine, chance, outcome).run(options.kills)
            compare(path, whole, outcome)
        except (OSError, ValueError, TimeoutError, subprocess.TimeoutExpired) as error:
            outcome.problems.append(repr(error))
        report(outcome, engine)
        if not outcome.problems:
            shutil.rmtree(path / "checkpoints", ignore_errors=True)
    if not options.engine:
        for name, first, then, overrides, bound in (
            ("2 to 1 rank", ("ddp", 2), ("ddp", 1), ("precision=float64",), 1e-9),
            ("zero3 to ddp", ("zero3", 2), ("ddp", 2), (), 1e-4),
        ):
            outcome, path = Outcome(name), folder / name.replace(" ", "_")
            whole = reference(first[0], *overrides)
            compare(path, whole, outcome, change_world(path, first, then, outcome, *overrides), bound)
            report(outcome, first[0])
    failed = [outcome for outcome in outcomes if outcome.problems]
    kills = [kill for outcome in outcomes for kill in outcome.kills]
    print(
        f"{len(kills)} kills ({sum('writing' in kill for kill in kills)} while a checkpoint was written, "
        f"{sum('starting' in kill for kill in kills)} while starting), "
        f"{sum(outcome.refused for outcome in outcomes)} orphans' writes refused, "
        f"{len(failed)} of {len(outcomes)} scenarios failed"
    )
    print(f"logs: {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
