"""What watches over a run: signals that end it in good order, and a watchdog that names the rank that is behind."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

from lzn_dist.distributed.collectives import broadcast_object
from lzn_dist.terminal import INTERRUPTED

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
AGAIN = 1.0  # seconds: a second SIGINT sooner is the launcher's, which passes on the one that the terminal sent to all
END = 0  # no signal's number
LAST_WORDS = 3.0  # seconds for what a second Ctrl-C still lets be written


def launched() -> bool:
    """Whether a launcher (accelerate's, torchrun) has started this process and waits for it."""
    return "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ


def end_with_launcher() -> None:
    """Have SIGTERM sent to this process when its launcher ends: accelerate's passes no signal on, and a killed one
    cannot; the process would train on unseen."""
    if launched() and sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG


class Signals:
    """Remembers that the process was asked to end; the ranks agree at the end of the step (`train`).

    What is ignored at the start (SIGHUP under nohup, SIGINT of a job in the background) stays so. A second SIGINT ends
    the process at once, whatever it waits for, with status 130, after `at_once`.
    """

    def __init__(self, at_once: Callable[[], None] = lambda: None) -> None:
        self.received = ""
        self.at_once = at_once
        self._before: dict[signal.Signals, Any] = {}
        self._interrupted = float("inf")

    def __enter__(self) -> Signals:
        # Python's handlers wait until the main thread leaves C++ (a collective, say); this pipe hears at once
        self._heard, told = os.pipe()
        os.set_blocking(told, False)
        self._told = told
        self._wakeup = signal.set_wakeup_fd(told, warn_on_full_buffer=False)
        self._listener = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._listener.start()
        for number in SIGNALS:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._receive)
        return self

    def agreed(self) -> str:
        """The signal's name, as the main process knows it. Collective."""
        return broadcast_object(self.received or None) or "another rank's signal"

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = self.received or signal.Signals(number).name

    def _listen(self) -> None:
        while True:
            for number in os.read(self._heard, 64):
                if number == END:
                    return
                if number != signal.SIGINT or signal.SIGINT not in self._before:
                    continue
                now = time.monotonic()
                if now - self._interrupted > AGAIN:
                    last = threading.Thread(target=self.at_once, daemon=True)
                    last.start()
                    last.join(LAST_WORDS)  # it may need a lock that the main thread has
                    os._exit(INTERRUPTED)
                self._interrupted = min(self._interrupted, now)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.write(self._told, bytes([END]))
        self._listener.join()  # a thread that still runs when Python ends may abort the process
        os.close(self._told)
        os.close(self._heard)
