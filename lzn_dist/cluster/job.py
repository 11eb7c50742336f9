"""The files of a run's job, RUN/job: what was submitted, and each time that it ran.

RUN/job/job.json names the newest submission's folder RUN/job/STAMP, which holds the package's copy (code/), the
resolved configuration, what is known of its origin, and the logs. RUN/job/attempts.jsonl has a line for each start and
each end of a job. This module imports neither torch nor anything slow: it runs before and after every job.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from lzn_dist.exit_status import FINISHED, PREEMPTED
from lzn_dist.run_folder import read_lines

FAILURES = 3  # so many failed starts in a row without a single new step, and the job is not requeued


@dataclass(frozen=True)
class Job:
    """What was submitted. id: empty until SLURM has given one. phases: what each rank runs, one after the other."""

    run: str
    folder: str
    engine: str
    nodes: int
    ranks_per_node: int
    gpus_per_node: int
    phases: tuple[str, ...]
    requeue: bool
    cluster: str
    submitted: float
    id: str = ""

    @property
    def code(self) -> Path:
        return Path(self.folder) / "code"

    @property
    def config(self) -> Path:
        return Path(self.folder) / "config.yaml"

    @property
    def logs(self) -> Path:
        return Path(self.folder) / "logs"

    @property
    def ranks(self) -> int:
        return self.nodes * self.ranks_per_node

    def save(self) -> None:
        path = Path(self.run) / "job" / "job.json"
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(asdict(self), indent=1) + "\n")
        temporary.replace(path)

    @staticmethod
    def load(run: str | Path) -> Job | None:
        """The newest submission of a run; None where there is none."""
        try:
            found = json.loads((Path(run) / "job" / "job.json").read_text())
        except OSError:
            return None
        return Job(**{**found, "phases": tuple(found["phases"])})


def step_of(run: str | Path) -> int:
    """The step that status.json names; 0 where there is none."""
    return int(read_status(run).get("step", 0))


def read_status(run: str | Path) -> dict[str, Any]:
    """status.json; empty where there is none yet."""
    try:
        found: dict[str, Any] = json.loads((Path(run) / "status.json").read_text())
        return found
    except (OSError, json.JSONDecodeError):
        return {}


def note(run: str | Path, event: str, **facts: Any) -> None:
    """Add a line to attempts.jsonl."""
    with (Path(run) / "job" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"event": event, "time": time.time(), "step": step_of(run), **facts}) + "\n")


def attempts(run: str | Path) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl, oldest first."""
    return [row for row in read_lines(Path(run) / "job" / "attempts.jsonl", ["time"]) if "event" in row]


def starts_of(run: str | Path, job_id: str) -> list[dict[str, Any]]:
    """The starts of one job."""
    return [line for line in attempts(run) if line["event"] == "start" and line.get("job") == job_id]


def wall_seconds(run: str | Path) -> float:
    """Seconds that the run's jobs have run, ended ones alone; a start without an end (a lost node) counts to the next
    line."""
    total, began = 0.0, None
    for line in attempts(run):
        if began is not None:
            total += line["time"] - began
        began = line["time"] if line["event"] == "start" else None
    return total


def failures_at_once(run: str | Path) -> int:
    """How many of the newest ends in a row were failures whose start had made no step."""
    count, step = 0, None
    for line in reversed(attempts(run)):
        if line["event"] == "end":
            if line["status"] in (FINISHED, PREEMPTED):
                break
            step = line["step"]
        elif step is not None:
            if line["step"] != step:
                break
            count, step = count + 1, None
    return count
