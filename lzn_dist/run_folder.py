"""The folder of a run: who may write to it, and what state the run is in.

A run that is started again while an older process of it still lives (a lost node, a hung rank) would otherwise have
two writers. Every start takes the folder's next incarnation number; a process that finds a higher one than its own
stops. Checks and writes happen under one file lock, so that there is no moment between them.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

LOCK = "lock.json"


class SupersededError(RuntimeError):
    """Another, newer process has taken over the run: this one must not write any more."""


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that a reader sees the old file or the new one, never half."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    temporary.replace(path)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file; a half-written last line is left out, a missing file is empty."""
    rows = []
    for line in path.read_text().splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows


class RunFolder:
    """A run's folder on the main process: take it, then write under `held`."""

    def __init__(self, path: Path) -> None:
        """Makes the folder and takes its next incarnation number; older incarnations can write no more."""
        self.path = path
        path.mkdir(parents=True, exist_ok=True)
        self.started = time.time()
        with self._lock():
            self.incarnation = self._current() + 1
            write_json(path / LOCK, {"incarnation": self.incarnation, "host": socket.gethostname(), "pid": os.getpid()})

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.path / f".{LOCK}").open("a") as handle:
            fcntl.flock(handle, fcntl.LOCK_EX)
            yield

    def _current(self) -> int:
        try:
            return int(json.loads((self.path / LOCK).read_text())["incarnation"])
        except (OSError, ValueError, KeyError):
            return 0

    @contextmanager
    def held(self) -> Iterator[None]:
        """Write within this context. Raises SupersededError where a newer incarnation has the folder."""
        with self._lock():
            if self._current() != self.incarnation:
                raise SupersededError(
                    f"{self.path} was taken over by incarnation {self._current()} of the run (see {LOCK}); "
                    f"this process, incarnation {self.incarnation}, stops and writes nothing more"
                )
            yield

    def trim(self, step: int) -> None:
        """Drop the lines of metrics.jsonl and eval.jsonl past a step: those steps are about to be taken again."""
        with self.held():
            for name in ("metrics.jsonl", "eval.jsonl"):
                kept = [row for row in read_lines(self.path / name) if row["step"] <= step]
                temporary = self.path / f"{name}.tmp"
                temporary.write_text("".join(json.dumps(row) + "\n" for row in kept))
                temporary.replace(self.path / name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One line of a JSON-lines file."""
        with self.held(), (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def status(self, state: str, step: int, why: str = "", **more: Any) -> None:
        """status.json: running, finished, preempted or failed; the step, why, and who says so."""
        with self.held():
            write_json(
                self.path / "status.json",
                {"state": state, "step": step, "why": why, "incarnation": self.incarnation, **more},
            )
