"""What every task of a job runs: one rank of the launch, as a process of its own that hears the job's signals.

submitit starts a `Task` on each task of the job. Its own signal handler would requeue the job from rank 0 at once, too
early for a checkpoint of all ranks; here signals go on to the rank's process, where training remembers them, agrees on
them at the end of the step and checkpoints (exit status 75). Whether the job then comes back is decided after all ranks
have ended, by epilogue.py.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from lzn_dist.cluster.job import Job, note, readable_status, wall_seconds
from lzn_dist.cluster.watch import MARKER
from lzn_dist.exit_status import PREEMPTED
from lzn_dist.yaml_core import read_yaml

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)


def launch_environment(launch: Path, engine: str) -> dict[str, str]:
    """What `accelerate launch --config_file launch/ENGINE.yaml` would set for each rank."""
    settings = read_yaml(launch / f"{engine}.yaml")
    found = {"ACCELERATE_MIXED_PRECISION": "no", "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "passive")}
    kind = settings["distributed_type"]
    if kind == "DEEPSPEED":
        found |= {
            "ACCELERATE_USE_DEEPSPEED": "true",
            "ACCELERATE_DEEPSPEED_CONFIG_FILE": settings["deepspeed_config"]["deepspeed_config_file"],
        }
    elif kind == "FSDP":
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": str(settings["fsdp_config"]["fsdp_version"])}
    return found


@dataclass(frozen=True)
class Place:
    """Where this task stands in the job."""

    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    job: str
    hosts: tuple[str, ...]
    restart: int

    @staticmethod
    def current() -> Place:
        """From submitit's environment, on SLURM or local."""
        from submitit import JobEnvironment

        found = JobEnvironment()
        return Place(
            found.global_rank, found.num_tasks, found.local_rank, found.num_tasks // found.num_nodes, found.node,
            found.job_id, tuple(found.hostnames), int(os.environ.get("SLURM_RESTART_COUNT", "0")),
        )  # fmt: skip

    def environment(self, phase: int) -> dict[str, str]:
        """Rendezvous at the job's first node, at a port of this job, start and phase: the rank that is first in the
        next phase must not find the server of the one before, which is about to end. Below 32768, where Linux begins
        to hand out ports by itself."""
        number = int("".join(c for c in self.job if c.isdigit()) or "0")
        port = 20_000 + (16 * number + 3 * self.restart + phase) % 12_000
        host = self.hosts[0] if self.world_size > self.local_world_size else "127.0.0.1"
        # where the cluster binds a GPU to each task (--gpus-per-task, --gpu-bind=single) it is the only one to be seen
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        device = 0 if visible and "," not in visible else self.local_rank
        return {
            "RANK": str(self.rank), "WORLD_SIZE": str(self.world_size), "LOCAL_RANK": str(device),
            "LOCAL_WORLD_SIZE": str(self.local_world_size), "MASTER_ADDR": host, "MASTER_PORT": str(port),
        }  # fmt: skip


def has_trained(run: str, job_id: str) -> bool:
    """Whether an earlier start of this job has left a checkpoint to go on from.

    All ranks of a start find the same: training writes the job's number to status.json once all ranks are in it.
    """
    return readable_status(run).get("job") == job_id and (Path(run) / "checkpoints" / "latest").exists()


@dataclass(frozen=True)
class Task:
    """The callable that submitit pickles. run: the run's folder."""

    run: str

    def __call__(self) -> None:
        """Raises SystemExit with the status of the phase that failed."""
        received: list[int] = []
        child: list[subprocess.Popen[bytes]] = []

        def forward(number: int, _: FrameType | None) -> None:
            received.append(number)
            for process in child:
                process.send_signal(number)

        print(f"{MARKER} {os.environ.get('SLURM_PROCID', '')}", file=sys.stderr, flush=True)
        for number in SIGNALS:  # submitit's handlers are replaced before anything else is done
            signal.signal(number, forward)
        job = Job.load(self.run)
        assert job is not None, f"{self.run}/job/job.json is gone"
        place = Place.current()
        again = has_trained(self.run, place.job)
        if place.rank == 0:
            note(self.run, "start", job=place.job, restart=place.restart, hosts=list(place.hosts),
                 host=socket.gethostname())  # fmt: skip
        status, agreed = 0, False
        # a job that comes back has been checked, and goes on from its own newest checkpoint whatever it began with
        phases = job.phases[-1:] if again else job.phases
        for order, phase in enumerate(phases):
            if received:
                status = PREEMPTED
                break
            child[:] = [self._start(job, place, phase, order, again)]
            if received:
                child[0].send_signal(received[-1])
            status = child[0].wait()
            agreed = status == PREEMPTED  # training ends so once all ranks have checkpointed
            child.clear()
            if status < 0:  # ended by a signal; by one of ours before it could listen, if we have had one
                status = PREEMPTED if -status in received else 128 - status
            if status:
                break
        if place.rank == 0 and job.cluster == "local":
            note(self.run, "end", job=place.job, status=status)
        if agreed:
            if place.rank:
                return  # the first one says so for all
            time.sleep(1.0)  # when it has ended, srun ends the others
        # A signal that came too early may have reached this rank alone: its status then makes srun end the others,
        # which would wait for it
        if status:
            sys.exit(status)

    def _start(self, job: Job, place: Place, phase: str, order: int, again: bool) -> subprocess.Popen[bytes]:
        facts = {
            "job": place.job,
            "nodes": len(place.hosts),
            "requeues": place.restart,
            "wall_before": wall_seconds(self.run),
        }
        path = os.pathsep.join(filter(None, (str(job.code), os.environ.get("PYTHONPATH"))))
        environment = {**os.environ, **launch_environment(job.code / "launch", job.engine), **place.environment(order)}
        environment |= {"PYTHONPATH": path, "LZN_DIST_JOB": json.dumps(facts)}
        command = [sys.executable, "-u", "-m", *PHASES[phase], str(job.config)]
        if phase != "preflight":
            command += [word for package in job.trust for word in ("--trust", package)]
        if phase == "train" and again:
            command.append("resume=auto")
        return subprocess.Popen(command, env=environment)


PHASES: dict[str, list[Any]] = {
    "preflight": ["lzn_dist.cluster.preflight"],
    "verify": ["lzn_dist.verify"],
    "train": ["lzn_dist.train"],
}
