"""Starts scripts as a user does, with `accelerate launch` and a configuration of launch/; small digits runs."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import subprocess
import sys
import tempfile
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

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


def accelerate(
    engine: str, script: Path, *arguments: object, processes: int = 0, cwd: Path, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """Run a script under launch/ENGINE.yaml; its standard output and error are joined in stdout."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "--main_process_port", "0"]
    command += ["--config_file", str(ROOT / "launch" / f"{engine}.yaml")]
    command += [f"--num_processes={processes}"] if processes else []
    command += [str(script), *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    return subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout, cwd=cwd
    )


def ranks(
    engine: str, script: Path, *arguments: object, processes: int = 2, cwd: Path, timeout: float = 500
) -> subprocess.CompletedProcess[str]:
    """The same ranks without the launcher, whose own start costs as much as half a rank's: each in the environment that
    it would set (tests/cluster compares the two), as the tasks of a job are started."""
    command = [sys.executable, str(script), *map(str, arguments)]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    world = {
        "WORLD_SIZE": processes,
        "LOCAL_WORLD_SIZE": processes,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": free_port(),
    }
    environment = {**os.environ, **launch_environment(ROOT / "launch", engine), "PYTHONPATH": path}
    environment |= {name: str(value) for name, value in world.items()}
    with tempfile.TemporaryFile("w+") as said:
        started = [
            subprocess.Popen(
                command,
                env=environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=said,
                stderr=said,
                cwd=cwd,
            )
            for rank in range(processes)
        ]
        end = time.monotonic() + timeout
        while any(process.poll() is None for process in started):
            late = time.monotonic() > end
            if late or any(process.returncode for process in started):  # the others would wait for it
                for process in started:
                    process.kill()
            time.sleep(0.05)
        said.seek(0)
        status = next((process.returncode for process in started if process.returncode), 0)
        return subprocess.CompletedProcess(command, status, said.read())


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
