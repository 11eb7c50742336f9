"""Signals, the watchdog, the stopwatch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lzn_dist.distributed.guard import Signals, Watchdog
from lzn_dist.stopwatch import Stopwatch

WORKER = Path(__file__).with_name("watchdog_worker.py")


def test_signals_are_remembered_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        assert signals.received == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_a_long_step_is_reported_once_and_time_between_steps_is_not(capfd: pytest.CaptureFixture[str]) -> None:
    watch = Stopwatch()
    watchdog = Watchdog(watch, 0.2)
    time.sleep(0.5)  # no step yet
    watchdog.begin(6)
    with watch("decode"):
        time.sleep(0.8)
    watchdog.idle()
    time.sleep(0.5)
    watchdog.close()
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("watchdog")]
    assert len(said) == 1
    assert "step 7 has taken over 0.2 s" in said[0] and "rank 0" in said[0] and "'decode'" in said[0]


def test_the_rank_that_is_behind_is_named(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=3", str(WORKER)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    said = [line for line in done.stderr.splitlines() if "watchdog:" in line]
    assert len(said) == 1
    assert "behind: rank 1 on " in said[0] and "'data'" in said[0] and "rank 2" not in said[0]


def test_the_stopwatch_adds_up_and_starts_again() -> None:
    watch = Stopwatch()
    for _ in range(2):
        with watch("data"):
            time.sleep(0.02)
    assert watch.progress == 2 and watch.part == "data"
    assert 0.04 <= watch.take()["data"] < 1.0
    assert watch.take() == {}
