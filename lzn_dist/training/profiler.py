"""Where a step's time goes: a trace, a snapshot of the device's memory, and the largest items as a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from tabulate import tabulate
from torch.profiler import ProfilerActivity, profile, schedule

WARM_UP = 2  # steps before the first that counts: kernels are chosen and compiled in them
ITEMS = 10
FLOW = ("_Trajectory", "_TrajectoryBackward")  # autograd's names of the zones' flow


class StepProfiler:
    """Profiles `steps` steps of this process, after two that warm up, into a folder: trace.json.gz (for Perfetto or
    chrome://tracing) and, on CUDA, memory.pickle (for pytorch.org/memory_viz). steps = 0 or folder None: nothing.

    say: what prints the table.
    """

    def __init__(self, steps: int, folder: Path | None, device: torch.device, say: Callable[[str], object]) -> None:
        self.steps, self.folder, self.cuda, self.say = steps, folder, device.type == "cuda", say
        self._profile: Any = None
        if not steps or folder is None:
            return
        folder.mkdir(exist_ok=True)
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if self.cuda else [])]
        self._profile = profile(
            activities=activities, schedule=schedule(wait=0, warmup=WARM_UP, active=steps),
            on_trace_ready=self._ready, acc_events=True,
        )  # fmt: skip
        if self.cuda:
            torch.cuda.memory._record_memory_history(max_entries=200_000)
        self._profile.start()

    def step(self) -> None:
        """A step has ended."""
        if self._profile is not None:
            self._profile.step()

    def close(self) -> None:
        """The run has ended, perhaps before the profile."""
        if self._profile is not None:
            self._end()
            self.say(f"profile: the run ended before {WARM_UP} + {self.steps} steps")

    def _end(self) -> None:
        found, self._profile = self._profile, None
        with suppress(RuntimeError):  # of a profile that has been handed over already
            found.stop()

    def _ready(self, found: Any) -> None:
        assert self.folder is not None
        if self._profile is None:
            return  # closed before its time
        self._profile = None
        found.export_chrome_trace(str(self.folder / "trace.json.gz"))
        written = [self.folder / "trace.json.gz"]
        if self.cuda:
            written.append(self.folder / "memory.pickle")
            torch.cuda.memory._dump_snapshot(str(written[-1]))
            torch.cuda.memory._record_memory_history(enabled=None)
        self.say(table(found.key_averages(), self.steps, self.cuda))
        self.say(f"profile: {' and '.join(map(str, written))}" + ("" if self.cuda else " (memory is CUDA's)"))


def table(rows: Sequence[Any], steps: int, cuda: bool) -> str:
    """The operators that take most time by themselves, and the zones' flow with all that it calls, in ms a step."""
    kind = "device" if cuda else "cpu"
    alone, inside = f"self_{kind}_time_total", f"{kind}_time_total"
    whole = sum(getattr(row, alone) for row in rows) or 1.0
    cells = []
    for row in sorted(rows, key=lambda row: -getattr(row, alone))[:ITEMS]:
        microseconds = getattr(row, alone)
        cells.append([row.key[:60], row.count / steps, microseconds / 1e3 / steps, microseconds])
    flow = sum(getattr(row, inside) for row in rows if row.key in FLOW)
    calls = sum(row.count for row in rows if row.key in FLOW)
    cells.append(["flow of the zones, with all it calls", calls / steps, flow / 1e3 / steps, flow])
    lines = [[name, f"{count:g}", f"{ms:.2f}", f"{100 * part / whole:.1f} %"] for name, count, ms, part in cells]
    head = [f"profile of {steps} step{'s' * (steps > 1)}", "calls/step", f"{'GPU' if cuda else 'CPU'} ms/step", "share"]
    return tabulate(lines, head, "simple", colalign=("left", "right", "right", "right"), disable_numparse=True)
