"""Output that goes away, or that cannot show every letter, costs the output and never the work; Ctrl-C is one line."""

from __future__ import annotations

import atexit
import codecs
import io
import os
import select
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

INTERRUPTED = 130  # the exit status of what Ctrl-C ended, as shells give it
TRUST = "a package of network classes that the configuration may name; importing it runs its code"
READERS = ("batches", "fetch")  # names of threads that read data, which nobody needs once a command is done
_PLAIN = {
    "─": "-", "‖": "||", "·": "-", "…": "...", "→": "->", "±": "+-", "×": "x", "²": "^2", "σ": "sigma", "é": "e",
}  # fmt: skip


def _plain(error: UnicodeError) -> tuple[str | bytes, int]:
    """Our own signs in ASCII; others, and bytes of names that are no text, escaped."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    sign = error.object[error.start]
    if sign in _PLAIN:
        return _PLAIN[sign], error.start + 1
    return codecs.backslashreplace_errors(error)


codecs.register_error("lzn_dist.plain", _plain)


def printable(text: str) -> str:
    """Text from outside for a terminal or a figure: what would move the cursor, colour or ring stands as an escape."""
    return "".join(sign if sign.isprintable() else repr(sign)[1:-1] for sign in text)


def one_line(error: BaseException) -> str:
    """What an error says, however many lines it has for that."""
    return " ".join(str(error).split())[:300] or type(error).__name__


class _Steady(io.RawIOBase):
    """A descriptor for writing. One that takes nothing more (a pipe without a reader, a closed terminal, a full disk)
    is pointed at the null device: for this stream, and for whoever else writes to that descriptor."""

    def __init__(self, descriptor: int) -> None:
        self.descriptor = descriptor

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.descriptor

    def isatty(self) -> bool:
        return os.isatty(self.descriptor)

    def write(self, content: bytes) -> int:  # type: ignore[override]
        while True:
            try:
                return os.write(self.descriptor, content)
            except BlockingIOError:  # another program made the terminal non-blocking
                select.select([], [self.descriptor], [])
            except OSError:
                null = os.open(os.devnull, os.O_WRONLY)
                os.dup2(null, self.descriptor)
                if null != self.descriptor:
                    os.close(null)
                return len(content)


class _Words(io.TextIOWrapper):
    """Text on such a descriptor."""


_kept: list[Any] = []


def steady_output() -> None:
    """Make this process's standard output and error such streams; one that is not there is the null device."""
    for name, descriptor in (("stdout", 1), ("stderr", 2)):
        stream: Any = getattr(sys, name)
        if stream is None or stream.closed:
            setattr(sys, name, open(os.devnull, "w", errors="replace"))  # noqa: SIM115
        elif stream is getattr(sys, f"__{name}__") and not isinstance(stream, _Words):
            with suppress(OSError):
                stream.flush()
            at_once = stream.line_buffering or stream.write_through or name == "stderr"
            _kept.append(stream)  # logging may hold it; and its end must not close the descriptor
            raw: Any = _Steady(descriptor)
            setattr(
                sys, name, _Words(io.BufferedWriter(raw), stream.encoding, "lzn_dist.plain", line_buffering=at_once)
            )
            setattr(sys, f"__{name}__", getattr(sys, name))


def command(main: Callable[[], int]) -> int:
    """Run a command's `main` on steady output; returns its exit status, 130 after Ctrl-C.

    Ends the process itself where readers still wait for a server that does not answer: Python would wait for them. The
    same in a process of several, when all that is to be done at an exit is done: gloo's threads outlive their process
    group (torch 2.13 does not join them), and one that lets go of a tensor while Python ends aborts the process.
    """
    steady_output()
    try:
        status = main()
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C", file=sys.stderr)
        status = INTERRUPTED
    readers_wait = any(thread.name.startswith(READERS) for thread in threading.enumerate())
    if readers_wait or "RANK" in os.environ:
        if not readers_wait:  # as Python does at its end: executors are told, threads waited for, exits run
            threading._shutdown()  # type: ignore[attr-defined]
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    return status
