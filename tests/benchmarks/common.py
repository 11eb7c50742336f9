"""What the benchmarks share: figures from a process of their own, peak memory, the least of several times."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch


def resident() -> float:
    """MB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


class Peak:
    """Largest resident memory over the block, in MB above that at its start, sampled every 2 ms."""

    def __enter__(self) -> Peak:
        self.start, self.most, self.running = resident(), 0.0, True
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def sample(self) -> None:
        while self.running:
            self.most = max(self.most, resident() - self.start)
            time.sleep(0.002)

    def __exit__(self, *_: object) -> None:
        self.running = False
        self.thread.join()


def clock(function: Callable[[], object], seconds: float) -> float:
    """Least seconds of the calls that fit into a span, five at least: what other load does not lengthen."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 5 or time.perf_counter() < end:
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def spawn(script: str, *arguments: object) -> dict[str, Any]:
    """What `script --child ARGUMENTS` prints as JSON in its last line; a line of progress on stderr."""
    command = [sys.executable, script, "--child", *map(str, arguments)]
    result = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, Any] = json.loads(result.stdout.splitlines()[-1])
    print(f"{', '.join(map(str, arguments))}: {found}", file=sys.stderr, flush=True)
    return found


def machine() -> str:
    cpu = platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        names = [line.split(":")[1].strip() for line in information.read_text().splitlines() if "model name" in line]
        cpu = names[0] if names else cpu
    today = time.strftime("%Y-%m-%d")
    return f"{cpu}, {os.cpu_count()} cores, {torch.get_num_threads()} threads, torch {torch.__version__}, {today}"
