"""From a configuration to a job in the queue; everything that can be refused is refused before."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import stat
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lzn_dist.cluster.job import Job
from lzn_dist.cluster.profile import Profile
from lzn_dist.cluster.task import Task
from lzn_dist.cluster.watch import ACTIVE, queue
from lzn_dist.config import Config, load_config, save_config
from lzn_dist.distributed import Topology
from lzn_dist.prepare.digits import ensure_digits
from lzn_dist.shipped import shipped
from lzn_dist.training.batches import open_stream
from lzn_dist.training.resolve import resolve

PACKAGE = Path(__file__).parents[1]
ENGINES = ("ddp", "zero1", "zero2", "zero3", "zero3_offload", "fsdp")


class SubmissionError(ValueError):
    """A job that cannot be submitted; the message says what to do."""


@dataclass(frozen=True)
class Request:
    """What the command line asks for. minutes: the time limit."""

    config: str
    overrides: tuple[str, ...]
    nodes: int
    gpus_per_node: int
    ranks_per_node: int
    engine: str
    minutes: int
    profile: Profile
    preflight: bool = False
    verify: bool = False
    local: bool = False
    trust: tuple[str, ...] = ()


def parse_minutes(text: str) -> int:
    """90, 90m, 24h, 2d, or SLURM's [days-]hours:minutes[:seconds], in minutes. Raises SubmissionError."""
    units = {"": 1, "m": 1, "h": 60, "d": 24 * 60}
    if match := re.fullmatch(r"(\d+)([mhd]?)", text):
        minutes = int(match[1]) * units[match[2]]
    elif match := re.fullmatch(r"(?:(\d+)-)?(\d+):(\d\d)(?::(\d\d))?", text):
        minutes = (int(match[1] or 0) * 24 + int(match[2])) * 60 + int(match[3])
    else:
        minutes = 0
    if minutes < 1:
        raise SubmissionError(f"time {text!r}: write 90m, 24h, 2d or 1-12:00:00")
    return minutes


def check(request: Request) -> Config:
    """The resolved configuration with absolute paths. Raises ConfigError, SubmissionError, ValueError, OSError."""
    if request.nodes < 1 or request.gpus_per_node < 0 or request.ranks_per_node < 1:
        raise SubmissionError("nodes and ranks per node must be at least 1")
    if request.engine not in ENGINES:
        raise SubmissionError(f"no engine {request.engine!r}; launch/ has {', '.join(ENGINES)}")
    if request.local and request.nodes > 1:
        raise SubmissionError("--local is this machine alone: use --nodes 1 and --ranks-per-node N")
    given = load_config(request.config, list(request.overrides))
    absolute = [f"output_dir={Path(given.output_dir).resolve()}"]
    if "://" not in given.data.shards:
        absolute.append(f"data.shards={Path(given.data.shards).resolve()}")
    if given.resume not in ("auto", "none"):
        absolute.append(f"resume={Path(given.resume).resolve()}")
    if request.profile.scratch and not given.data.cache:
        absolute.append(f"data.cache={request.profile.scratch}")
    config = load_config(request.config, [*request.overrides, *absolute])
    run = Path(config.output_dir)
    if not str(run).isprintable():
        raise SubmissionError(f"output_dir {str(run)!r} has characters that a batch script cannot: choose another")
    if not request.local and re.search(r"[%\\]", str(run)):
        raise SubmissionError(
            f"output_dir {run}: SLURM reads % and \\ in the names of logs as patterns: choose another"
        )
    there = next(folder for folder in (run, *run.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):  # permissions alone do not say it: quotas, read-only file systems
            pass
    except OSError as error:
        raise SubmissionError(f"output_dir {run} cannot be written: {error}") from error
    if config.data.embedded == "digits":
        ensure_digits(config.data.shards)
    config = resolve(config)
    # whether the shards are there, and batch and streams can be shared by that many ranks
    data = config.data.model_copy(update={"cache_decoded": False, "retry_seconds": 30.0})
    open_stream(config.model_copy(update={"data": data}), Topology(0, request.nodes * request.ranks_per_node))
    before = Job.load(run)
    if before is not None and before.id and before.cluster == "slurm":
        found = queue(before.id)
        if found is not None and found[0] in ACTIVE:
            raise SubmissionError(
                f"{run} has job {before.id} in the queue ({found[0].lower()}): scancel {before.id} first, or choose "
                "another output_dir"
            )
    return config


def parameters(request: Request, job: Job) -> dict[str, Any]:
    """What submitit writes into the batch script."""
    profile = request.profile
    python = shlex.quote(profile.python or sys.executable)
    exports = [f"export {name}={shlex.quote(value)}" for name, value in profile.environment.items()]
    path = _code_first(job)
    container = [f"--container-image={profile.container}"] if profile.container else []
    # srun has not taken it from the job since SLURM 22.05
    cores = [f"--cpus-per-task={profile.cpus_per_rank}"] if profile.cpus_per_rank else []
    wanted = {
        "job_name": Path(job.run).name,
        "time": request.minutes,
        "nodes": request.nodes,
        "ntasks_per_node": request.ranks_per_node,
        "gpus_per_node": request.gpus_per_node or None,
        "cpus_per_task": profile.cpus_per_rank,
        "mem": f"{profile.memory_gb:g}G" if profile.memory_gb else None,
        "partition": profile.partition,
        "account": profile.account,
        "qos": profile.qos,
        "constraint": profile.constraint,
        "exclude": profile.exclude,
        "signal_delay_s": profile.signal_seconds,
        "setup": [*profile.setup, *exports, path],
        # one rank that dies ends all, at once; then the epilogue decides
        "srun_args": ["--kill-on-bad-exit=1", *cores, *container, *profile.srun],
        "teardown": [f'{python} -m lzn_dist.cluster.epilogue {shlex.quote(job.run)} "$?"'],
        "additional_parameters": {"requeue" if job.requeue else "no-requeue": True, **profile.sbatch},
    }
    return {key: value for key, value in wanted.items() if value is not None}


def _code_first(job: Job) -> str:
    """A shell line: Python finds the job's own copy of the package before any that is installed."""
    return f"export PYTHONPATH={shlex.quote(str(job.code))}${{PYTHONPATH:+:$PYTHONPATH}}"


def script(request: Request, job: Job) -> str:
    """The batch script that is submitted."""
    from submitit.slurm.slurm import _make_sbatch_string

    python = shlex.quote(request.profile.python or sys.executable)
    command = f"{python} -u -m submitit.core._submit {shlex.quote(str(job.logs))}"
    return _make_sbatch_string(command=command, folder=job.logs, **parameters(request, job))


def make_job(request: Request, config: Config, stamp: str) -> Job:
    run = Path(config.output_dir)
    phases = [name for name, wanted in (("preflight", request.preflight), ("verify", request.verify)) if wanted]
    return Job(
        str(run), str(run / "job" / stamp), request.engine, request.nodes, request.ranks_per_node,
        request.gpus_per_node, (*phases, "train"), request.profile.requeue, "local" if request.local else "slurm",
        time.time(), trust=request.trust,
    )  # fmt: skip


def freeze(job: Job, config: Config, command: list[str]) -> None:
    """Copy the package and the configuration into the job's folder, and what is known of where they come from."""
    folder = Path(job.folder)
    job.logs.mkdir(parents=True)
    ignored = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, job.code / "lzn_dist", ignore=ignored)
    shutil.copytree(shipped("launch"), job.code / "launch", ignore=shutil.ignore_patterns("pictures", "*.sh"))
    for package in job.trust:
        _copy_package(package, job.code)
    save_config(config, job.config)
    packages = {found.metadata["Name"]: found.version for found in importlib.metadata.distributions()}
    commit, diff = _git("rev-parse", "HEAD").strip(), _git("diff", "HEAD")
    (folder / "diff.patch").write_text(diff)
    origin = {
        "command": command, "commit": commit, "changed": bool(diff), "python": sys.version, "packages": packages,
        "submitted": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }  # fmt: skip
    (folder / "provenance.json").write_text(json.dumps(origin, indent=1, sort_keys=True) + "\n")


def _copy_package(name: str, code: Path) -> None:
    """A package of the user's into the job's own code, unless it is installed. It has been imported already."""
    spec = importlib.util.find_spec(name)
    origin = Path(spec.origin) if spec is not None and spec.origin else None
    if origin is None or any(origin.is_relative_to(sysconfig.get_path(kind)) for kind in ("purelib", "platlib")):
        return
    if origin.name == "__init__.py":
        shutil.copytree(origin.parent, code / name, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    else:
        shutil.copy(origin, code / origin.name)


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(PACKAGE.parent), *arguments], capture_output=True, text=True)
    except OSError:
        return ""
    return done.stdout if done.returncode == 0 else ""


def submit(request: Request, config: Config, command: list[str]) -> Job:
    """Put the job in the queue. Raises SubmissionError for what SLURM refuses, before anything is queued."""
    import submitit

    job = make_job(request, config, time.strftime("%Y%m%d-%H%M%S"))
    if not request.local:
        if shutil.which("sbatch") is None:
            raise SubmissionError("there is no sbatch here: submit on a login node, or use --local or --dry-run")
        _ask_slurm(script(request, job))
    if Path(job.folder).exists():
        raise SubmissionError(f"{job.folder} was submitted within this second: wait and repeat")
    freeze(job, config, command)
    job.save()
    if request.local:
        executor: Any = submitit.LocalExecutor(job.logs, python=request.profile.python)
        executor.update_parameters(
            timeout_min=request.minutes, nodes=1, tasks_per_node=request.ranks_per_node,
            gpus_per_node=request.gpus_per_node, signal_delay_s=request.profile.signal_seconds,
            setup=[_code_first(job)],
        )  # fmt: skip
    else:
        executor = submitit.SlurmExecutor(job.logs, python=request.profile.python)
        executor.update_parameters(**parameters(request, job))
    with _private(job.logs):
        job = replace(job, id=str(executor.submit(Task(job.run)).job_id))
    job.save()
    return job


@contextmanager
def _private(folder: Path) -> Iterator[None]:
    """Batch scripts that are written into a folder are the user's alone from the first moment: a profile may export
    keys."""
    mode = stat.S_IMODE(folder.stat().st_mode)
    folder.chmod(0o700)
    try:
        yield
    finally:
        for path in folder.glob("*.sh"):
            path.chmod(0o600)
        folder.chmod(mode)


def _ask_slurm(text: str) -> None:
    """Let SLURM look at the script without queueing it."""
    with tempfile.NamedTemporaryFile("w", suffix=".sh") as file:
        file.write(text)
        file.flush()
        done = subprocess.run(["sbatch", "--test-only", file.name], capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if "error" in line or "failure" in line]
        reason = " ".join(lines or done.stderr.split("\n"))
        partitions = subprocess.run(["sinfo", "--noheader", "--format", "%P"], capture_output=True, text=True).stdout
        raise SubmissionError(
            f"SLURM refuses the job: {reason.strip()} (partitions here: {', '.join(sorted(set(partitions.split())))})"
        )
