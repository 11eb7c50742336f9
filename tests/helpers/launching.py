"""Starts scripts as a user does, with `accelerate launch` and a configuration of launch/; small digits runs."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import runpy
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from typing import Any
from unittest.mock import patch

import torch

from lzn_dist.cluster.task import launch_environment
from tests.helpers.range_server import free_port
from tests.helpers.settings import decoder_with, encoder_with

ROOT = Path(__file__).parents[2]
DROPOUT = encoder_with(dropout=0.1)  # beside SMALL, for what is no ResNet
SMALL = [
    "evaluation.samples_per_class=2", "evaluation.alignment_steps=5", "flow.sampler_steps=2",
    "data.global_batch=24", *encoder_with(channels=8),
    *decoder_with(channels=8, attention_resolutions=[4], dropout=0.1),
    "latent.dim=8", "latent.steps=6", "alignment.steps=6", "optimizer.warmup_steps=2", "tracking.wandb=disabled",
]  # fmt: skip
_TIMES = re.compile("images_per_second|seconds_.*|peak_memory_mb|mfu")


def untimed_rows(folder: Path) -> list[dict[str, Any]]:
    """The whole lines of a run's metrics.jsonl, without what differs from one time to the next."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.is_file() else []
    found = [json.loads(line) for line in lines if line.endswith("}")]
    return [{key: value for key, value in row.items() if not _TIMES.fullmatch(key)} for row in found]


# Processes that are forked from one that has imported everything: seconds less for each than a Python of its own. Not
# where there is a GPU: what looks for it as it is imported leaves children that cannot use it.
_WARM = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
_WARM.set_forkserver_preload(["tests.helpers.warm"])


def _path() -> str:
    return os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))


def forked(
    command: Sequence[object], *, cwd: Path, said: Path, environment: Mapping[str, str] | None = None
) -> BaseProcess:
    """Start what `python COMMAND …` would, with everything imported already. command: a script's path, -m and a
    module's name, or -c and a text, and arguments. Standard output and error are added to a file."""
    given = dict(os.environ if environment is None else environment)
    process = _WARM.Process(target=_main, args=([str(word) for word in command], given, str(cwd), str(said)))
    process.start()
    return process


def _main(command: list[str], environment: dict[str, str], cwd: str, said: str) -> None:
    multiprocessing.set_start_method(None, force=True)  # as in a Python of its own, not by the server of this one
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    output = os.open(said, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    if command[0] == "-m":
        sys.argv = command[1:]
        sys.path.insert(0, cwd)
        runpy.run_module(command[1], run_name="__main__", alter_sys=True)
    elif command[0] == "-c":
        sys.argv = ["-c", *command[2:]]
        exec(compile(command[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = command
        sys.path.insert(0, str(Path(cwd, command[0]).parent))
        runpy.run_path(command[0], run_name="__main__")


def _wait(started: list[BaseProcess], command: list[str], said: Path, timeout: float) -> CompletedProcess[str]:
    """Until all have ended; when one fails, the others, which would wait for it, are ended."""
    end = time.monotonic() + timeout
    while any(process.exitcode is None for process in started):
        late = time.monotonic() > end
        if late or any(process.exitcode for process in started):
            for process in started:
                process.kill()
        time.sleep(0.02)
    status = next((process.exitcode for process in started if process.exitcode), 0)
    return CompletedProcess(command, status, said.read_text())


def python(
    *command: object, cwd: Path, timeout: float = 500, environment: Mapping[str, str] | None = None
) -> CompletedProcess[str]:
    """`python COMMAND …` (see `forked`) to its end; its standard output and error are joined in stdout."""
    with tempfile.NamedTemporaryFile() as file:
        said = Path(file.name)
        started = forked(command, cwd=cwd, said=said, environment=environment)
        return _wait([started], [str(word) for word in command], said, timeout)


def launcher(engine: str, script: Path, *arguments: object, processes: int = 0) -> list[str]:
    """The words after `python` that start a script under launch/ENGINE.yaml, as a user does."""
    command = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "launch" / f"{engine}.yaml")]
    command += [f"--num_processes={processes}"] if processes else []
    return [*command, str(script), *map(str, arguments)]


def accelerate(
    engine: str, script: Path, *arguments: object, processes: int = 0, cwd: Path, timeout: float = 500
) -> CompletedProcess[str]:
    """Run a script under launch/ENGINE.yaml; its standard output and error are joined in stdout."""
    command = launcher(engine, script, *arguments, processes=processes)
    environment = {**os.environ, "PYTHONPATH": _path(), "OMP_WAIT_POLICY": "passive"}
    return python(*command, cwd=cwd, timeout=timeout, environment=environment)


def ranks(
    engine: str, script: Path, *arguments: object, processes: int = 2, cwd: Path, timeout: float = 500
) -> CompletedProcess[str]:
    """The same ranks without the launcher: each in the environment that it would set (tests/cluster compares the two),
    as the tasks of a job are started."""
    world = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    environment = {**os.environ, **launch_environment(ROOT / "launch", engine), "PYTHONPATH": _path()}
    environment |= {name: str(value) for name, value in world.items()}
    command = [str(script), *map(str, arguments)]
    with tempfile.NamedTemporaryFile() as file:
        said = Path(file.name)
        started = [
            forked(command, cwd=cwd, said=said, environment=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(processes)
        ]
        return _wait(started, command, said, timeout)


def data_prep(name: str, *arguments: object, status: int = 0) -> str:
    """A script of data_prep/, in this process; what it said."""
    out, err = io.StringIO(), io.StringIO()
    with patch.object(sys, "argv", [name, *map(str, arguments)]), redirect_stdout(out), redirect_stderr(err):
        try:
            runpy.run_path(str(ROOT / "data_prep" / f"{name}.py"), run_name="__main__")
        except SystemExit as end:
            assert (end.code or 0) == status, out.getvalue() + err.getvalue()
        else:
            assert status == 0, out.getvalue() + err.getvalue()
    return out.getvalue() + err.getvalue()
