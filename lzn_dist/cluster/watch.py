"""What runs are doing: state, nodes, step, loss, images per second, requeues, and the last error of the lowest rank."""

from __future__ import annotations

import json
import re
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypeVar

from tabulate import tabulate

from lzn_dist.cluster.job import Job, attempts, read_status, starts_of, wall_seconds

_T = TypeVar("_T")
MARKER = "── start of rank"  # a task's first words on its standard error, at every start of the job
_ERROR = re.compile(r"^(?:\[rank\d+\]:\s*)?((?:error: |[\w.]*(?:Error|Exception|Interrupt)\b).*)", re.MULTILINE)
_SLURM_ERROR = re.compile(r"^(?:srun|slurmstepd\S*): error: (.*)", re.MULTILINE)
TAIL = 200_000  # bytes of a log that are looked at


def _tail(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(0, 2)
        file.seek(max(0, file.tell() - TAIL))
        return file.read().decode(errors="replace").rpartition(MARKER)[2]


def last_error(job: Job) -> str:
    """The last error that the lowest rank with one wrote in the job's newest start; empty where there is none."""
    logs = sorted(job.logs.glob(f"{job.id or '*'}_*_log.err"), key=_rank)
    for pattern in (_ERROR, _SLURM_ERROR):
        for path in logs:
            if found := pattern.findall(_tail(path)):
                return f"rank {_rank(path)}: {found[-1].strip()[:300]}"
    return ""


def _rank(path: Path) -> int:
    match = re.search(r"_(\d+)_log\.err$", path.name)
    return int(match[1]) if match else 0


def queue(job_id: str) -> tuple[str, str, str] | None:
    """State, nodes and reason of a job that SLURM has in its queue; None where it has not, or there is no SLURM."""
    try:
        done = subprocess.run(
            ["squeue", "--noheader", "--jobs", job_id, "--states", "all", "--format", "%T|%N|%r"],
            capture_output=True, text=True, timeout=30,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired):
        return None
    line = done.stdout.strip().splitlines()
    if done.returncode or not line:
        return None
    state, nodes, reason = line[0].split("|")
    return state, nodes, reason


ACTIVE = ("PENDING", "RUNNING", "COMPLETING", "CONFIGURING", "REQUEUED", "SUSPENDED", "REQUEUE_HOLD")


@dataclass(frozen=True)
class Row:
    """One run, as text."""

    run: str
    state: str
    job: str
    nodes: str
    step: str
    loss: str
    images_s: str
    requeues: str
    hours: str
    last_error: str


def look_at(run: Path) -> Row:
    """A run as it stands now, as far as its files can be read. Raises FileNotFoundError where the folder is no run."""
    damaged: list[str] = []
    status = _readable(lambda: read_status(run), damaged) or {}
    job = _readable(lambda: Job.load(run), damaged)
    if not status and job is None and not damaged:
        raise FileNotFoundError(f"{run} is no run: it has neither status.json nor job/job.json")
    found = queue(job.id) if job is not None and job.id and job.cluster == "slurm" else None
    state = status.get("state", "unknown" if damaged else "submitted")
    nodes = ""
    if found is not None and found[0] in ACTIVE:
        waiting = found[0] == "PENDING"
        # what SLURM says counts where the run itself cannot: it does not know that it is queued, or was killed
        state = f"{found[0].lower()} ({found[2]})" if waiting else state if state == "running" else found[0].lower()
        nodes = found[1]
    elif found is not None and state == "running":
        state = found[0].lower()  # cancelled, node_fail, timeout: it had no time to say so
    row = _last_row(run / "metrics.jsonl")
    most, step = _max_steps(run), max(status.get("step", 0), row.get("step", 0))
    seconds = wall_seconds(run)
    starts = starts_of(run, job.id) if job is not None else []
    lines = attempts(run)
    if lines and lines[-1].get("event") == "start" and state == "running":
        seconds += time.time() - lines[-1]["time"]
    error = last_error(job) if job is not None and job.logs.is_dir() else ""
    return Row(
        str(run), state, job.id if job is not None else "", nodes,
        f"{step:,}" + (f" of {most:,}" if most else ""),
        f"{row['loss']:.4g}" if "loss" in row else "", f"{row['images_per_second']:,.0f}" if row else "",
        str(max(0, len(starts) - 1)), f"{seconds / 3600:.2f}" if seconds else "",
        "; ".join(damaged) or error or (status.get("why", "") if state == "failed" else ""),
    )  # fmt: skip


def _readable(read: Callable[[], _T], damaged: list[str]) -> _T | None:
    """What a file says; where it cannot be read, None, and `damaged` is told."""
    try:
        return read()
    except (OSError, ValueError) as error:
        damaged.append(str(error))
        return None


def _last_row(path: Path) -> dict[str, Any]:
    """The last line that can be read and tells what a table shows."""
    with suppress(OSError):
        for line in reversed(_tail(path).split("\n")):
            with suppress(ValueError, RecursionError):
                found = json.loads(line)
                if isinstance(found, dict) and all(
                    isinstance(found.get(key), int | float) for key in ("step", "loss", "images_per_second")
                ):
                    return found
    return {}


def _max_steps(run: Path) -> int:
    try:
        match = re.search(r"^max_steps: (\d+)", (run / "config.yaml").read_text(errors="replace"), re.MULTILINE)
    except OSError:
        return 0
    return int(match[1]) if match else 0


def table(rows: list[Row]) -> str:
    """Aligned columns under their names; an error stands on a line of its own."""
    names = [field.name for field in fields(Row)][:-1]
    cells = [[getattr(row, name) for name in names] for row in rows]
    head, *lines = tabulate(cells, names, "plain", disable_numparse=True).splitlines()
    told = [
        [line, f"    last error: {row.last_error}"][: 1 + bool(row.last_error)]
        for line, row in zip(lines, rows, strict=True)
    ]
    return "\n".join([head, *(line.rstrip() for part in told for line in part)])
