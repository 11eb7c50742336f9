"""The files of a run's job, RUN/job: what was submitted, and each time that it ran.

RUN/job/job.json names the newest submission's folder RUN/job/STAMP, which holds the package's copy (code/), the
resolved configuration, what is known of its origin, and the logs. RUN/job/attempts.jsonl has a line for each start and
each end of a job. This module imports neither torch nor anything slow: it runs before and after every job.
"""

from __future__ import annotations

import json
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pydantic import ConfigDict
from typing_extensions import TypedDict  # typing's own tells pydantic less before Python 3.12

from lzn_dist.exit_status import FINISHED, PREEMPTED
from lzn_dist.json_files import read_json
from lzn_dist.training.run_folder import read_lines

FAILURES = 3  # so many failed starts in a row without a single new step, and the job is not requeued


@dataclass(frozen=True)
class Job:
    """What was submitted. id: empty until SLURM has given one. phases: what each rank runs, one after the
    other. trust: packages of network classes that the configuration may name."""

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
    trust: tuple[str, ...] = ()

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
        """The newest submission of a run; None where there is none. Raises ValueError where job.json is damaged."""
        try:
            return read_json(Path(run) / "job" / "job.json", Job)
        except FileNotFoundError:
            return None


class Status(TypedDict, total=False):
    """What status.json says of a run, of what others read, and more."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]

    state: str
    step: int
    why: str
    job: str


def read_status(run: str | Path) -> Status:
    """status.json; empty where there is none yet. Raises ValueError where it is damaged."""
    try:
        return read_json(Path(run) / "status.json", Status)
    except FileNotFoundError:
        return {}


def readable_status(run: str | Path) -> Status:
    """The same; empty where it is damaged too: the run writes it anew."""
    with suppress(OSError, ValueError):
        return read_status(run)
    return {}


def note(run: str | Path, event: str, **facts: Any) -> None:
    """Add a line to attempts.jsonl."""
    row = {"event": event, "time": time.time(), "step": readable_status(run).get("step", 0), **facts}
    with (Path(run) / "job" / "attempts.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")


def attempts(run: str | Path) -> list[dict[str, Any]]:
    """The lines of attempts.jsonl, oldest first."""
    return read_lines(Path(run) / "job" / "attempts.jsonl", ["time", "step"])


def starts_of(run: str | Path, job_id: str) -> list[dict[str, Any]]:
    """The starts of one job."""
    return [line for line in attempts(run) if line.get("event") == "start" and line.get("job") == job_id]


def wall_seconds(run: str | Path) -> float:
    """Seconds that the run's jobs have run, ended ones alone; a start without an end (a lost node) counts to the next
    line."""
    total, began = 0.0, None
    for line in attempts(run):
        if began is not None:
            total += line["time"] - began
        began = line["time"] if line.get("event") == "start" else None
    return total


def failures_at_once(run: str | Path) -> int:
    """How many of the newest ends in a row were failures whose start had made no step."""
    count, step = 0, None
    for line in reversed(attempts(run)):
        if line.get("event") == "end":
            if line.get("status") in (FINISHED, PREEMPTED):
                break
            step = line["step"]
        elif step is not None:
            if line["step"] != step:
                break
            count, step = count + 1, None
    return count
