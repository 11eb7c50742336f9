"""Output that goes away or cannot show every letter; on real descriptors, in processes that import nothing heavy."""

from __future__ import annotations

import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.process

PROGRAM = """
import sys
from lzn_dist.terminal import command

def main():
    print("── Fréchet → ± \\udcff 日")
    for i in range(int(sys.argv[1])):
        print("line", i)
        print("error line", i, file=sys.stderr)
    open(sys.argv[2], "w").write("worked to the end")
    return 7

sys.exit(command(main))
"""


def start(count: int, told: Path, **more: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", PROGRAM, str(count), str(told)], **more)  # type: ignore[call-overload,no-any-return]


@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize("way", ["stdout", "stderr", "both", "full disk", "closed", "terminal"])
def test_an_output_that_goes_away_costs_the_output(way: str, unbuffered: str, tmp_path: Path) -> None:
    told = tmp_path / "told"
    environment = {**os.environ, "PYTHONUNBUFFERED": unbuffered}
    errors = tmp_path / "errors"
    if way == "terminal":
        main, other = pty.openpty()
        process = start(20_000, told, stdin=other, stdout=other, stderr=other, env=environment)
        os.close(other)
        os.read(main, 100)
        os.close(main)
    elif way == "full disk":
        with Path("/dev/full").open("w") as full:
            process = start(10, told, stdout=full, stderr=full, env=environment)
    elif way == "closed":
        process = start(10, told, preexec_fn=lambda: (os.close(1), os.close(2)), env=environment)
    else:
        read, write = os.pipe()
        with errors.open("wb") as log:
            streams = {name: write if way in (name, "both") else log for name in ("stdout", "stderr")}
            process = start(20_000, told, **streams, env=environment)  # type: ignore[arg-type]
        os.close(write)
        os.read(read, 100)
        os.close(read)
    assert process.wait(timeout=60) == 7
    assert told.read_text() == "worked to the end"
    if errors.exists():
        assert b"Traceback" not in errors.read_bytes() and b"BrokenPipe" not in errors.read_bytes()


def test_signs_that_a_terminal_cannot_show(tmp_path: Path) -> None:
    for encoding, wanted in (
        ("ascii", "-- Frechet -> +- \\udcff \\u65e5"),
        ("latin-1", "-- Fréchet -> ± \\udcff \\u65e5"),
    ):
        environment = {**os.environ, "PYTHONIOENCODING": encoding}
        process = start(0, tmp_path / "told", stdout=subprocess.PIPE, env=environment)
        assert process.communicate(timeout=60)[0].decode(encoding) == wanted + "\n"
        assert process.returncode == 7


def test_an_interrupt_is_one_line() -> None:
    program = (
        "import sys; from lzn_dist.terminal import command\n"
        "def main(): raise KeyboardInterrupt\n"
        "sys.exit(command(main))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr.strip()) == (130, "stopped by Ctrl-C")


def test_readers_that_still_wait_are_not_waited_for() -> None:
    """Threads of an executor are no daemons: Python waits for them at its end, for as long as a request may take."""
    program = (
        "import sys, time; from concurrent.futures import ThreadPoolExecutor; from lzn_dist.terminal import command\n"
        "def main():\n"
        "    ThreadPoolExecutor(1, thread_name_prefix='fetch').submit(time.sleep, 100)\n"
        "    print('done', end=''); return 75\n"
        "sys.exit(command(main))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (75, "done")


def test_a_process_of_several_ends_before_python_takes_itself_down() -> None:
    """What is to be done at an exit is done; what would end in Python's own end, where gloo's threads abort, is not."""
    program = (
        "import atexit, sys, threading, time; from concurrent.futures import ThreadPoolExecutor\n"
        "from lzn_dist.terminal import command\n"
        "class Late:\n"
        "    def __del__(self, write=sys.stdout.write): write('taken down')\n"
        "late = Late()\n"
        "def worker(): time.sleep(0.5); print('thread,', end='')\n"
        "def main():\n"
        "    atexit.register(print, ' exit', end='')\n"
        "    threading.Thread(target=worker).start()\n"
        "    late.pool = ThreadPoolExecutor(1); late.pool.submit(int).result()  # nobody ends it\n"
        "    print('done,', end=''); return 3\n"
        "sys.exit(command(main))"
    )
    for rank, wanted in (({"RANK": "1"}, "done,thread, exit"), ({}, "done,thread, exittaken down")):
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, timeout=20, env={**os.environ, **rank}
        )
        assert (done.returncode, done.stdout) == (3, wanted)
