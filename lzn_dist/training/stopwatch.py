"""Seconds of a step's parts, without waiting for the device inside the step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from time import perf_counter
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")


class Stopwatch:
    """Adds up the seconds of named parts; `progress` and `part` say how far this process is (for the watchdog).

    On CUDA a part is timed between two events on the current stream, which are read when the seconds are asked for,
    at a point that waits for the device anyway. On the CPU it is the host's time.
    """

    def __init__(self) -> None:
        self.progress = 0  # parts entered so far: the same number at the same place on every rank
        self.part = "start"
        self.entered = perf_counter()
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        self.progress += 1
        self.part = part
        start = self.entered = perf_counter()
        if torch.cuda.is_available():
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((part, begin, end))
        else:
            yield
            self._seconds[part] = self._seconds.get(part, 0.0) + perf_counter() - start

    def around(self, target: object, **parts: str) -> None:
        """From now on these methods of an object are timed, as parts of these names."""
        for method, part in parts.items():
            setattr(target, method, self._timed(part, getattr(target, method)))

    def _timed(self, part: str, method: Callable[P, T]) -> Callable[P, T]:
        def timed(*args: P.args, **more: P.kwargs) -> T:
            with self(part):
                return method(*args, **more)

        return timed

    def take(self) -> dict[str, float]:
        """Seconds of each part since the last call; waits for the device where parts were timed on it."""
        if self._events:
            torch.cuda.synchronize()
            for part, begin, end in self._events:
                seconds = begin.elapsed_time(end) / 1e3
                self._seconds[part] = self._seconds.get(part, 0.0) + seconds
        self._events, found, self._seconds = [], self._seconds, {}
        return found
