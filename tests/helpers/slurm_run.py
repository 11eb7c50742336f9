"""Small digits runs on the cluster of cluster.py, and waiting for them; what the tests and the soak share."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.helpers.launching import SMALL, python, untimed_rows
from tests.helpers.settings import decoder_with
from tests.helpers.slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
STEPS = 60
SETTINGS = [
    *SMALL, *decoder_with(attention_resolutions=[]), "log_every=1", "checkpoint_every=10", f"max_steps={STEPS}",
]  # fmt: skip
ENDED = ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "PREEMPTED")


class Run:
    """A run on the cluster."""

    def __init__(self, cluster: Cluster, folder: Path) -> None:
        self.cluster, self.folder, self.job = cluster, folder, ""

    def submit(self, *arguments: str, nodes: int = 2, settings: list[str] | None = None) -> Run:
        """slurm/submit.py as a user calls it."""
        done = python(
            ROOT / "slurm" / "submit.py", ROOT / "configs" / "digits_joint.yaml",
            f"output_dir={self.folder}", f"data.shards={self.folder.parent / 'digits'}",
            *(SETTINGS if settings is None else settings), "--nodes", nodes, *arguments,
            environment=self.cluster.environment, cwd=self.folder.parent, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout
        match = re.search(r"^job (\d+): ", done.stdout, re.MULTILINE)
        assert match, done.stdout
        self.job = match[1]
        return self

    def until(self, condition: Callable[[], bool], seconds: float = 280) -> None:
        end = time.monotonic() + seconds
        while not condition():
            if time.monotonic() > end:
                raise TimeoutError(f"{self.folder}: {self.cluster.state(self.job)}\n{self.story()}")
            time.sleep(0.1)

    def until_step(self, step: int) -> None:
        self.until(lambda: bool(self.rows()) and self.rows()[-1]["step"] >= step)

    def until_ended(self) -> str:
        self.until(lambda: self.cluster.state(self.job) in ENDED, 500)
        return self.cluster.state(self.job)

    def told(self) -> str:
        """What slurm/status.py says."""
        command = ROOT / "slurm" / "status.py", self.folder
        return python(*command, environment=self.cluster.environment, cwd=self.folder).stdout

    def rows(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl, without times."""
        return untimed_rows(self.folder)

    def evaluations(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "eval.jsonl").read_text().splitlines()]

    def status(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.folder / "status.json").read_text())
        return found

    def attempts(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "job" / "attempts.jsonl").read_text().splitlines()]

    def story(self) -> str:
        """What a test shows of a run that went another way: its starts and ends, its logs, the controller's."""
        path = self.folder / "job" / "attempts.jsonl"
        told = path.read_text() if path.exists() else "never started"
        return f"{told}\n{self.logs()}\n{(self.cluster.folder / 'slurmctld.log').read_text()[-4000:]}"

    def logs(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("job/*/logs/*_log.*")))
