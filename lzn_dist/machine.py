"""What this machine has, where operating systems and accelerators differ."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress

import torch

# M_MMAP_MAX: no blocks of the kernel's own; M_TRIM_THRESHOLD: never shrink (bytes, an int); M_TOP_PAD: grow by 64 MiB
_HEAP_ALONE = {-4: 0, -1: 2**31 - 1, -2: 64 << 20}


def cores() -> int:
    """Of the CPU, that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def keep_freed_memory() -> None:
    """Freed tensors of the CPU stay with this process, for the next ones.

    By itself glibc hands large blocks back to the kernel at once and gets them anew, page by page and zeroed: a tenth
    to a fifth of a training step's time. Nothing where MALLOC_… or GLIBC_TUNABLES say otherwise, and for other C
    libraries.
    """
    if any(name.startswith("MALLOC_") for name in os.environ) or "GLIBC_TUNABLES" in os.environ:
        return
    with suppress(OSError, AttributeError):  # no such function
        set_option = ctypes.CDLL(None).mallopt
        for option, value in _HEAP_ALONE.items():
            set_option(option, value)


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, which the zones' scores need; Apple's GPUs do not."""
    return device.type != "mps"


def idle_gpu() -> str:
    """Why a GPU of this machine is not used, in a line; "" where there is none, or it can be."""
    if torch.backends.mps.is_available():
        return "this machine's GPU (mps) computes no float64, which the zones need: going on on the CPU"
    return ""
