"""A watchdog that names the rank that is behind."""

from __future__ import annotations

import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lzn_dist.distributed.topology import Topology
from lzn_dist.training.stopwatch import Stopwatch


class Watchdog:
    """A thread a rank that publishes how far it is; the main one names who is behind when a step takes too long.

    Ranks pass the same parts of a step in the same order, so that the lowest count is the rank that others wait for.
    """

    def __init__(self, watch: Stopwatch, seconds: float) -> None:
        self.watch, self.seconds = watch, seconds
        self.topology = Topology.current()
        self.step, self.since = 0, float("inf")
        self.warned = -1
        self._ended = threading.Event()
        self._thread: threading.Thread | None = None
        self._store: Any = None
        if seconds > 0:
            if self.topology.world_size > 1:
                self._store = self._meet()
            self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
            self._thread.start()

    def _meet(self) -> Any:
        """A store of its own on the main process: the default one may be blocked by whoever waits for it."""
        host = os.environ.get("MASTER_ADDR", "localhost")
        limit = timedelta(seconds=60)
        server = None
        if self.topology.is_main:
            server = dist.TCPStore(host, 0, is_master=True, wait_for_workers=False, timeout=limit)
        port = [None if server is None else server.port]
        dist.broadcast_object_list(port)
        store = server or dist.TCPStore(host, int(port[0] or 0), is_master=False, timeout=limit)
        dist.barrier()  # a main process with nothing left to do would close it before the others have come
        return store

    def begin(self, step: int) -> None:
        """A step begins."""
        self.step, self.since = step, time.monotonic()

    def idle(self) -> None:
        """Between steps: checkpoints and evaluations may take their time."""
        self.since = float("inf")

    def close(self) -> None:
        self._ended.set()
        if self._thread is not None:
            self._thread.join(timeout=1.0)  # it may be waiting for a store that went with the main process

    def _run(self) -> None:
        while not self._ended.wait(min(self.seconds / 4, 5.0)):
            try:
                self._publish()
                late = time.monotonic() - self.since > self.seconds
                if self.topology.is_main and late and self.warned != self.step:
                    self.warned = self.step
                    print(self.report(), file=sys.stderr, flush=True)
            except (RuntimeError, OSError):  # the store went with the main process: nobody is left to tell
                return

    def _publish(self) -> None:
        watch = self.watch
        row: list[Any] = [watch.progress, watch.part, time.perf_counter() - watch.entered, socket.gethostname()]
        if self._store is not None:
            self._store.set(f"rank{self.topology.rank}", json.dumps(row))
        self._own = row

    def report(self) -> str:
        """Who is behind, from what the ranks published last."""
        rows: list[Any] = [self._own]
        if self._store is not None:
            names = [f"rank{rank}" for rank in range(self.topology.world_size)]
            rows = [json.loads(self._store.get(name)) if self._store.check([name]) else None for name in names]
        least = min(row[0] if row else -1 for row in rows)
        behind = [
            f"rank {rank}" + (f" on {row[3]}, {row[2]:.0f} s in {row[1]!r}" if row else " (never heard of)")
            for rank, row in enumerate(rows)
            if (row[0] if row else -1) == least
        ]
        everyone = " (all alike)" if len(behind) == len(rows) > 1 else ""
        return (
            f"watchdog: step {self.step + 1} has taken over {self.seconds:g} s; behind: {'; '.join(behind)}{everyone}"
        )
