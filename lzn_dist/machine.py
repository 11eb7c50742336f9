"""What this machine has, where operating systems and accelerators differ."""

from __future__ import annotations

import os

import torch


def cores() -> int:
    """Of the CPU, that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def has_float64(device: torch.device) -> bool:
    """Whether a device computes in float64, which the zones' scores need; Apple's GPUs do not."""
    return device.type != "mps"


def idle_gpu() -> str:
    """Why a GPU of this machine is not used, in a line; "" where there is none, or it can be."""
    if torch.backends.mps.is_available():
        return "this machine's GPU (mps) computes no float64, which the zones need: going on on the CPU"
    return ""
