"""Faults on a real SLURM: each run must end as the undisturbed one, bit for bit, and by itself.

    python -m tests.soak.cluster_faults [--only NAME ...]

time limit: a job of two minutes that needs more. preemption: a job of a higher partition takes the nodes. rank: one
rank is killed with SIGKILL. zero2: a ZeRO-2 run over two nodes is signalled. several: a killed rank, a signal, a lost
node and a preemption in one run. Prints for each how often it started, with which exit statuses its starts ended (a
start whose node was lost has none), and the seconds from submitting to the first step and from each fault to the first
step beyond where the run stood.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tests.helpers.slurm_cluster import Cluster, missing
from tests.helpers.slurm_run import SETTINGS, Run
from tests.soak.kills import differences

STEPS = 240
LONG = [*(s for s in SETTINGS if not s.startswith(("max_steps", "checkpoint_every", "log_every"))),
        f"max_steps={STEPS}", "checkpoint_every=25", "log_every=1", "keep_last=2"]  # fmt: skip


class Scenario:
    """A run that meets faults."""

    def __init__(self, cluster: Cluster, folder: Path, name: str, engine: str = "ddp") -> None:
        self.cluster, self.name, self.engine = cluster, name, engine
        self.run = Run(cluster, folder / name.replace(" ", "_"))
        self.first_step = 0.0
        self.pauses: list[tuple[str, float]] = []

    def submit(self, *arguments: str) -> None:
        began = time.monotonic()
        self.run.submit(*arguments, "--engine", self.engine, settings=LONG)
        self.run.until_step(1)
        self.first_step = time.monotonic() - began

    def fault(self, name: str, do: Callable[[], None], after: int = 30) -> None:
        """Some steps later do it, and wait until the run is beyond where it stood."""
        self.run.until_step(self._step() + after)
        starts = self._starts()
        began, step = time.monotonic(), self._step()
        do()
        self.run.until(lambda: self._starts() > starts and self._step() > step)
        self.pauses.append((name, time.monotonic() - began))

    def _step(self) -> int:
        rows = self.run.rows()
        return int(rows[-1]["step"]) if rows else 0

    def _starts(self) -> int:
        return sum(line["event"] == "start" for line in self.run.attempts())

    # ── faults ──

    def signal(self) -> None:
        self.cluster.call("scancel", "--signal=USR2", self.run.job)

    def kill_rank(self) -> None:
        for path in Path("/proc").glob("[0-9]*"):
            try:
                words, variables = ((path / name).read_bytes().split(b"\0") for name in ("cmdline", "environ"))
            except OSError:
                continue
            of_this_run = any(word.startswith(f"{self.run.folder}/".encode()) for word in words)
            if of_this_run and b"lzn_dist.train" in words and b"RANK=1" in variables:
                os.kill(int(path.name), signal.SIGKILL)
                return
        raise LookupError("rank 1 is not running")

    def lose_node(self) -> None:
        self.cluster.kill_node(2)
        time.sleep(30)  # longer than SlurmdTimeout
        self.cluster.start_node(2)

    def preempt(self) -> None:
        self.cluster.call(
            "sbatch", "-p", "high", "-N", "3", "--exclusive", "--output", "/dev/null", "--wrap", "sleep 5"
        )

    def report(self, reference: Run) -> bool:
        state = self.run.until_ended()
        found = [] if state == "COMPLETED" else [state]
        if self.run.rows() != reference.rows():
            found.append("metrics differ")
        if self.run.evaluations() != reference.evaluations():
            found.append("evaluations differ")
        found += differences(self.run.folder, reference.folder)
        ends = [str(line["status"]) for line in self.run.attempts() if line["event"] == "end"]
        pauses = ", ".join(f"{name} {seconds:.0f} s" for name, seconds in self.pauses)
        print(
            f"{self.name:<11} starts {self._starts()}  ends {' '.join(ends):<18} first step {self.first_step:>3.0f} s  "
            f"{pauses:<60} {'pass' if not found else 'FAIL: ' + '; '.join(found)}",
            flush=True,
        )
        return not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = ("time limit", "preemption", "rank", "zero2", "several")
    parser.add_argument("--only", nargs="*", choices=names, default=names)
    given = parser.parse_args()
    if why := missing():
        print(f"skipped: {why}")
        return 0
    folder = Path(tempfile.mkdtemp(prefix="soak-slurm."))
    cluster = Cluster(folder / "cluster").up(nodes=3)
    references: dict[str, Run] = {}
    passed = True

    def reference(engine: str) -> Run:
        if engine not in references:
            run = Run(cluster, folder / f"reference_{engine}").submit("--engine", engine, settings=LONG)
            assert run.until_ended() == "COMPLETED", run.logs()[-4000:]
            references[engine] = run
        return references[engine]

    short = folder / "short.yaml"
    # SLURM may send the signal up to a minute early: between 20 and 80 s after the start
    short.write_text("signal_seconds: 40\n")
    try:
        for name in given.only:
            whole = reference("zero2" if name == "zero2" else "ddp")
            scenario = Scenario(cluster, folder, name, "zero2" if name == "zero2" else "ddp")
            if name == "time limit":
                scenario.submit("--time", "2m", "--profile", str(short))
            else:
                scenario.submit()
            if name == "preemption":
                scenario.fault("preempted", scenario.preempt)
            elif name == "rank":
                scenario.fault("rank killed", scenario.kill_rank)
            elif name == "zero2":
                scenario.fault("signalled", scenario.signal)
            elif name == "several":
                scenario.fault("rank killed", scenario.kill_rank)
                scenario.fault("signalled", scenario.signal)
                scenario.fault("node lost", scenario.lose_node)
                scenario.fault("preempted", scenario.preempt)
            passed &= scenario.report(whole)
            cluster.wait_idle(3)
    finally:
        cluster.down()
    print(f"runs and logs: {folder}")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
