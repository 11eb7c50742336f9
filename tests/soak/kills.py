"""Kill training runs with SIGKILL at random moments, start them again at once, and compare with the undisturbed run.

    python tests/soak/kills.py [--runs 10] [--seed 0] [--engine ddp]

Each disturbed run is killed several times: one rank, all ranks, or the launcher alone (its ranks live on as orphans
beside the run's next incarnation); some kills wait for a checkpoint that is being written. At the end its metrics must
hold every step once, with the reference's values bit for bit (times and memory aside), its last checkpoint the same
weights, averages and moments bit for bit, and every resume must have named the newest checkpoint that was complete.
Without --engine: --runs runs under DDP, then one each under ZeRO-2, ZeRO-3 and FSDP2, and two that change the world:
2 ranks go on as 1, ZeRO-3 goes on under DDP (equal to float rounding).
"""

from __future__ import annotations

import argparse
import contextlib
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

ROOT = Path(__file__).parents[2]
STEPS = 30
SETTINGS = [
    "data.global_batch=24", "encoder.channels=8", "decoder.channels=8", "latent.dim=8", "latent.steps=6",
    "alignment.steps=6", "decoder.attention_resolutions=[]", "encoder.dropout=0.1", "decoder.dropout=0.1",
    "optimizer.warmup_steps=2", "log_every=1", "checkpoint_every=3", "tracking.wandb=disabled", f"max_steps={STEPS}",
]  # fmt: skip
warnings.filterwarnings("ignore", message="torch.distributed is disabled")
TIMES = re.compile("images_per_second|seconds_.*|peak_memory_mb|mfu")


def command(folder: Path, engine: str, processes: int) -> list[str]:
    launch = ["--config_file", f"launch/{engine}.yaml", f"--num_processes={processes}", "--main_process_port", "0"]
    config = ["lzn_dist/train.py", "configs/digits_joint.yaml", f"output_dir={folder}"]
    shards = f"data.shards={folder.parent / 'digits'}"
    return [sys.executable, "-m", "accelerate.commands.launch", *launch, *config, shards, *SETTINGS]


def start(folder: Path, engine: str, processes: int) -> subprocess.Popen[bytes]:
    with (folder.parent / f"{folder.name}.log").open("ab") as log:
        return subprocess.Popen(command(folder, engine, processes), stdout=log, stderr=log, cwd=ROOT)


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


def rows(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").is_file() else []
    return [
        {key: value for key, value in json.loads(line).items() if not TIMES.fullmatch(key)}
        for line in lines
        if line.endswith("}")
    ]


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
    problems: list[str] = field(default_factory=list)


def disturb(folder: Path, engine: str, chance: random.Random, outcome: Outcome, kills: int) -> None:
    """Start, kill and start again until the run has ended by itself."""
    orphans: list[int] = []
    while True:
        before = complete(folder)
        process = start(folder, engine, 2)
        kill = len(outcome.kills) < kills
        if not _wait(process, folder, chance if kill else None):
            break
        alive = ranks(process.pid)
        how = chance.choice(["one rank", "all ranks", "launcher alone"])
        if how == "launcher alone":
            os.kill(process.pid, signal.SIGKILL)
            orphans += alive
        else:
            for pid in alive if how == "all ranks" else alive[-1:]:
                _kill(pid)
        process.wait(timeout=120)
        writing = any((folder / "checkpoints").glob(".step_*.tmp"))
        outcome.kills.append(how + (" while writing" if writing else ""))
        _check_resume(folder, before, outcome)
    process.wait()
    _check_resume(folder, before, outcome)
    outcome.orphans = len(orphans)
    time.sleep(1.0)
    for pid in orphans:  # an orphan that has not found out yet would otherwise outlive the scenario
        if b"train.py" in _command_line(pid):
            _kill(pid)


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def _wait(process: subprocess.Popen[bytes], folder: Path, chance: random.Random | None) -> bool:
    """Until it is time to kill; False when the run ended by itself."""
    began, target = len(rows(folder)), 0 if chance is None else chance.randint(1, 9)
    aim = chance is not None and chance.random() < 0.5  # at a checkpoint that is being written
    end = time.monotonic() + 240
    while time.monotonic() < end:
        if process.poll() is not None:
            return False
        if chance is not None and len(ranks(process.pid)) == 2:
            due = len(rows(folder)) >= began + target
            if due and aim and any((folder / "checkpoints").glob(".step_*.tmp")):
                return True
            if due and not aim:
                time.sleep(chance.random() * 0.2)
                return process.poll() is None
        time.sleep(0.01 if aim else 0.05)
    process.kill()
    raise TimeoutError(f"{folder} hung")


def _check_resume(folder: Path, before: list[str], outcome: Outcome) -> None:
    log = (folder.parent / f"{folder.name}.log").read_text(errors="replace")
    named = re.findall(r"resumed from \S*/(step_\d+) at step (\d+)", log)
    if len(named) > outcome.resumes:
        outcome.resumes = len(named)
        if before and named[-1][0] < before[-1]:
            outcome.problems.append(f"resumed from {named[-1][0]} though {before[-1]} was complete")


def compare(folder: Path, reference: Path, outcome: Outcome, exact: bool = True) -> None:
    """The end of a disturbed run against the undisturbed one."""
    status = json.loads((folder / "status.json").read_text())
    if status["state"] != "finished":
        outcome.problems.append(f"status {status}")
    ours, theirs = rows(folder), rows(reference)
    if [row["step"] for row in ours] != list(range(1, STEPS + 1)):
        outcome.problems.append(f"steps {[row['step'] for row in ours]}")
    elif exact and ours != theirs:
        first = next(a["step"] for a, b in zip(ours, theirs, strict=True) if a != b)
        outcome.problems.append(f"metrics differ from step {first}")
    elif not exact:
        worst = max(abs(a["loss"] - b["loss"]) / abs(b["loss"]) for a, b in zip(ours, theirs, strict=True))
        if not worst <= 1e-4:
            outcome.problems.append(f"losses differ by {worst:.1e}")
    if exact:
        a, b = tensors(folder), tensors(reference)
        different = [name for name in b if name not in a or not torch.equal(a[name], b[name])]
        if different or a.keys() != b.keys():
            outcome.problems.append(f"{len(different)} tensors differ, among them {different[:1]}")


def change_world(folder: Path, first: tuple[str, int], then: tuple[str, int], outcome: Outcome) -> None:
    """Kill a run after its second checkpoint and go on under another engine or number of ranks."""
    process = start(folder, *first)
    while len(complete(folder)) < 2 and process.poll() is None:
        time.sleep(0.05)
    for pid in ranks(process.pid):
        _kill(pid)
    process.wait(timeout=120)
    outcome.kills.append("all ranks")
    start(folder, *then).wait(timeout=300)
    _check_resume(folder, [], outcome)
    if not outcome.resumes:
        outcome.problems.append("did not resume")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=10, help="disturbed runs of the main engine (default: 10)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2, help="kills a run (default: 2)")
    parser.add_argument("--engine", help="disturb this engine alone")
    options = parser.parse_args()
    chance, folder = random.Random(options.seed), Path(tempfile.mkdtemp(prefix="soak."))
    engines = [options.engine or "ddp"] * options.runs + ([] if options.engine else ["zero2", "zero3", "fsdp"])
    outcomes: list[Outcome] = []

    def reference(engine: str, processes: int = 2) -> Path:
        path = folder / f"reference_{engine}_{processes}"
        if not path.exists():
            start(path, engine, processes).wait(timeout=300)
        return path

    def report(outcome: Outcome) -> None:
        outcomes.append(outcome)
        verdict = "pass" if not outcome.problems else "FAIL: " + "; ".join(outcome.problems)
        kills = ", ".join(outcome.kills)
        counts = f"resumes {outcome.resumes}  orphans {outcome.orphans}"
        print(f"{outcome.scenario:<12} {counts}  kills: {kills:<60} {verdict}", flush=True)

    for number, engine in enumerate(engines):
        outcome, path = Outcome(f"{engine} {number + 1}"), folder / f"{engine}_{number}"
        undisturbed = reference(engine)
        disturb(path, engine, chance, outcome, options.kills)
        compare(path, undisturbed, outcome)
        report(outcome)
        shutil.rmtree(path / "checkpoints", ignore_errors=True)
    if not options.engine:
        for name, first, then in (
            ("2 to 1 rank", ("ddp", 2), ("ddp", 1)),
            ("zero3 to ddp", ("zero3", 2), ("ddp", 2)),
        ):
            outcome, path = Outcome(name), folder / name.replace(" ", "_")
            change_world(path, first, then, outcome)
            compare(path, reference(first[0]), outcome, exact=False)
            report(outcome)
    failed = [outcome for outcome in outcomes if outcome.problems]
    kills = sum(len(outcome.kills) for outcome in outcomes)
    writing = sum("writing" in kill for outcome in outcomes for kill in outcome.kills)
    print(
        f"{kills} kills ({writing} while a checkpoint was written), {len(failed)} of {len(outcomes)} scenarios failed"
    )
    print(f"logs: {folder}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
