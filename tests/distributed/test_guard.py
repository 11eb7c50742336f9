"""Signals, the watchdog, the stopwatch."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from lzn_dist.training.signals import SIGNALS, Signals
from lzn_dist.training.stopwatch import Stopwatch
from lzn_dist.training.watchdog import Watchdog
from tests.helpers.launching import ranks

WORKER = Path(__file__).with_name("watchdog_worker.py")


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """A shell's background job ignores SIGINT, and so would these tests and what they start."""
    before = {number: signal.signal(number, signal.SIG_DFL) for number in (signal.SIGINT, signal.SIGHUP)}
    signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_remembered_and_handlers_put_back() -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Signals() as signals:
        assert signals.received == ""
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.received == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


@pytest.mark.parametrize("number", SIGNALS)
def test_every_signal_that_asks_to_end_is_heard(number: signal.Signals) -> None:
    with Signals() as signals:
        os.kill(os.getpid(), number)
        assert signals.received == number.name


@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGINT], ids=["nohup", "background"])
def test_what_is_ignored_at_the_start_stays_ignored(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with Signals() as signals:
            for _ in range(2):
                os.kill(os.getpid(), number)
            assert signals.received == ""
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)


@pytest.mark.process
def test_a_second_interrupt_ends_a_process_that_hears_nothing(tmp_path: Path) -> None:
    """It waits in C with the signals' Python handlers held back, as in a collective; not so the launcher's own repeat
    of the first. The last words may hang, too."""
    program = (
        "import ctypes, sys, threading; from lzn_dist.training import signals\n"
        "from lzn_dist.training.signals import Signals; signals.LAST_WORDS = 0.3\n"
        "def last(): print('last words', flush=True); threading.Event().wait()\n"
        "with Signals(last): print('ready', flush=True); ctypes.CDLL(None).sleep(0); "
        "[ctypes.PyDLL(None).poll(0, 0, 0) or ctypes.CDLL(None).pause() for _ in range(9)]"
    )
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        try:
            for _ in range(2):
                process.send_signal(signal.SIGINT)
                time.sleep(0.2)
            time.sleep(1.0)
            assert process.poll() is None
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=30) == 130
            assert process.stdout.read() == "last words\n"
        finally:
            process.kill()


@pytest.mark.process
def test_a_process_ends_with_its_launcher(tmp_path: Path) -> None:
    """A launcher that is killed, or ends without a word to its process: SIGTERM, as from one that passes it on."""
    program = (
        "import os, subprocess, sys\n"
        "child = 'import time; from lzn_dist.training.signals import *; end_with_launcher()\\n"
        'with Signals() as s:\\n  print("ready", flush=True)\\n  while not s.received: time.sleep(0.01)\\n'
        "  print(s.received, flush=True)'\n"
        "subprocess.Popen([sys.executable, '-c', child]); sys.stdin.read(1); os.kill(os.getpid(), 9)"
    )
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": "no"}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as launcher:
        assert launcher.stdout is not None and launcher.stdout.readline() == "ready\n"
        said, _ = launcher.communicate("x", timeout=60)
        assert said == "SIGTERM\n"


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


@pytest.mark.process
def test_the_rank_that_is_behind_is_named(tmp_path: Path) -> None:
    done = ranks("ddp", WORKER, processes=3, cwd=tmp_path, timeout=200)
    assert done.returncode == 0, done.stdout[-3000:]
    said = [line for line in done.stdout.splitlines() if "watchdog:" in line]
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
