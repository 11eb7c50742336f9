"""The folder of a run: who may write to it, and what state the run is in.

A run that is started again while an older process of it still lives (a lost node, a hung rank) would otherwise have
two writers. Every start takes the folder's next incarnation number; a process that finds a higher one than its own
stops. Checks and writes happen under one file lock, so that there is no moment between them; a start holds it from
choosing its checkpoint to taking the folder, so that nobody removes that checkpoint meanwhile.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

from lzn_dist.json_files import read_json, write_json

LOCK = "lock.json"
PATIENCE = 5.0  # seconds without the lock before a process says what it waits for


class SupersededError(RuntimeError):
    """Another, newer process has taken over the run: this one must not write any more."""


def read_lines(path: Path, needs: Collection[str] = ("step",)) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have numbers for the keys in `needs`; a missing file is empty.

    Lines that are damaged are told once, and left where they are; a half-written last line is left out.
    """
    return [row for _, row in _lines(path, needs) if row is not None]


def _lines(path: Path, needs: Collection[str]) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Each line with what it says, None where that cannot be read."""
    # as bytes: a carriage return is damage, and no end of a line
    text = path.read_bytes().decode(errors="surrogateescape") if path.is_file() else ""
    for number, line in enumerate(text.split("\n")[:-1], start=1):
        row = None
        with suppress(ValueError, RecursionError):
            row = json.loads(line)
        if not isinstance(row, dict) or any(
            isinstance(row.get(key), bool) or not isinstance(row.get(key), int | float) for key in needs
        ):
            if (str(path), number) not in _told:
                _told.add((str(path), number))
                print(
                    f"{path}, line {number} cannot be read: it stays, and is passed over", file=sys.stderr, flush=True
                )
            row = None
        yield line, row


_told: set[tuple[str, int]] = set()


def _myself() -> dict[str, Any]:
    return {"host": socket.gethostname(), "pid": os.getpid()}


def _wait_for(handle: TextIO, folder: Path) -> None:
    """Lock the file; while another process has it (one that hangs, or was halted), say every few seconds which."""
    said = time.monotonic()
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            pass
        time.sleep(0.01)
        if time.monotonic() - said > PATIENCE:
            said = time.monotonic()
            handle.seek(0)
            holder = handle.read() or "unknown"
            message = f"waiting for the lock of {folder}, which another process of this run has ({holder})"
            print(f"{message}; if that process hangs, end it", file=sys.stderr, flush=True)


@dataclass
class _Taken:
    """lock.json."""

    incarnation: int


class RunFolder:
    """A run's folder on the main process: take it, then write under `held`.

    Threads of one process may share it; the lock may be entered again by the thread that has it.
    """

    def __init__(self, path: Path) -> None:
        """The folder as it is: nothing is made or taken yet."""
        self.path = path
        self.incarnation = 0
        self.started = time.time()
        self._told: tuple[str, int] | None = None
        self._own, self._depth = threading.RLock(), 0

    def take(self) -> RunFolder:
        """Make the folder where it is missing and take its next incarnation number; older ones can write no more."""
        self.path.mkdir(parents=True, exist_ok=True)
        with self._lock():
            self.incarnation = self._current() + 1
            write_json(self.path / LOCK, {"incarnation": self.incarnation, **_myself()})
        return self

    @contextmanager
    def unchanging(self) -> Iterator[None]:
        """Within this context nobody else writes to the folder; where it is not there yet, there is nothing to hold."""
        with self._lock() if self.path.is_dir() else nullcontext():
            yield

    @contextmanager
    def _lock(self) -> Iterator[None]:
        with self._own:
            if self._depth:
                yield
                return
            with (self.path / f".{LOCK}").open("a+") as handle:
                _wait_for(handle, self.path)
                handle.truncate(0)
                json.dump(_myself(), handle)
                handle.flush()
                self._depth += 1
                try:
                    yield
                finally:
                    self._depth -= 1

    def _current(self) -> int:
        try:
            return read_json(self.path / LOCK, _Taken).incarnation
        except (OSError, ValueError):
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
        """Drop the lines past a step: those steps are about to be taken again. Lines that cannot be read stay."""
        with self.held():
            for name in ("metrics.jsonl", "eval.jsonl", "bad_samples.jsonl"):
                if not (self.path / name).is_file():
                    continue
                kept = [line for line, row in _lines(self.path / name, ["step"]) if row is None or row["step"] <= step]
                temporary = self.path / f"{name}.tmp"
                temporary.write_bytes("".join(f"{line}\n" for line in kept).encode(errors="surrogateescape"))
                temporary.replace(self.path / name)

    def append(self, name: str, row: dict[str, Any]) -> None:
        """One line of a JSON-lines file."""
        with self.held(), (self.path / name).open("a") as file:
            file.write(json.dumps(row) + "\n")

    def status(self, state: str, step: int, why: str = "", **more: Any) -> None:
        """status.json: running, finished, preempted or failed; the step, why, and who says so. Each change is also a
        line of events.jsonl, with the time, which later starts of the run add to."""
        with self.held():
            now = {"state": state, "step": step, "why": why, "incarnation": self.incarnation, **more}
            write_json(self.path / "status.json", {**now, **self._job()})
            if self._told != (state, self.incarnation):
                self._told = (state, self.incarnation)
                self.append("events.jsonl", {"time": round(time.time(), 1), **now})

    def _job(self) -> dict[str, Any]:
        """Of a cluster's job, whose task tells it: its number, nodes, requeues, and seconds over all its starts."""
        told = json.loads(os.environ.get("LZN_DIST_JOB", "{}"))
        if told:
            told["wall_seconds"] = round(told.pop("wall_before") + time.time() - self.started, 1)
        return dict(told)
