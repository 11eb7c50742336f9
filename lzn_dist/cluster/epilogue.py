"""After all ranks of a SLURM job have ended: python -m lzn_dist.cluster.epilogue RUN STATUS

The batch script calls it on the job's first node with srun's exit status. It requeues the job after a checkpoint on a
signal (75) and after failures, unless the failure is one that only a person can mend (2) or the third in a row without
a new step; why the job ends is written to status.json. Jobs that lose a node never get here: SLURM requeues them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from lzn_dist.cluster.job import FAILURES, Job, failures_at_once, note, readable_status
from lzn_dist.cluster.watch import last_error
from lzn_dist.exit_status import FINISHED, PREEMPTED, REFUSED


def decide(run: Path, job: Job, status: int) -> tuple[bool, str]:
    """Whether the job comes back, and why."""
    if status == FINISHED:
        return False, "it has ended"
    if status == PREEMPTED:
        return job.requeue, "it was told to end and has checkpointed"
    error = last_error(job) or f"exit status {status}"
    if status == REFUSED:
        return False, error
    failures = failures_at_once(run)
    if failures >= FAILURES:
        return False, f"it failed {failures} times in a row without a step: {error}"
    return job.requeue, error


def main(run: Path, status: int) -> int:
    job = Job.load(run)
    assert job is not None
    number = os.environ["SLURM_JOB_ID"]
    note(run, "end", job=number, status=status)
    requeue, why = decide(run, job, status)
    print(f"job {number} ended with status {status}: {why}{'; requeued' if requeue else ''}", flush=True)
    if requeue:
        return subprocess.run(["scontrol", "requeue", number]).returncode
    if status:
        found: dict[str, Any] = {"state": "failed", "step": 0, **readable_status(run)}
        # preempted and without a requeue is as the run says; a failure keeps its own words, and the decision is added
        if status != PREEMPTED:
            found |= {"state": "failed", "why": why}
        path = run / "status.json"
        path.with_suffix(".epilogue.tmp").write_text(json.dumps(found, indent=1) + "\n")
        path.with_suffix(".epilogue.tmp").replace(path)
    return status


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
