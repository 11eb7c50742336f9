"""Refusals that name the argument."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Backend = Literal["auto", "tiled", "triton", "plain"]


def check_points(name: str, value: Tensor, dim: int | None = None, dtype: torch.dtype | None = None) -> None:
    """A ValueError that names the argument, unless value is a float32 or float64 matrix [., dim]."""
    if value.ndim != 2 or (dim is not None and value.shape[1] != dim) or not value.shape[1]:
        raise ValueError(f"{name} must be a matrix [rows, {dim or 'd'}], got shape {tuple(value.shape)}")
    if value.dtype not in (torch.float32, torch.float64) or (dtype is not None and value.dtype != dtype):
        raise ValueError(f"{name} must be {dtype or 'float32 or float64'}, got {value.dtype}; zones are not for bf16")


def check_index(name: str, value: Tensor, rows: int, numbers: range, which: str = "") -> None:
    """A ValueError that names the argument, unless value is int64 [rows] with entries among numbers (which are …)."""
    if value.shape != (rows,) or value.dtype != torch.int64:
        raise ValueError(f"{name} must be int64 [{rows}], got {value.dtype} {tuple(value.shape)}")
    if value.is_cuda:  # reading it here would wait for all that the device has still to do
        torch._assert_async(((value >= numbers.start) & (value < numbers.stop)).all(), f"{name} out of range{which}")
    elif rows and (int(value.min()) < numbers.start or int(value.max()) >= numbers.stop):
        raise ValueError(
            f"{name} must lie in {numbers.start}..{numbers.stop - 1}{which}, got {int(value.min())}..{int(value.max())}"
        )


def check_log_weights(value: Tensor | None, count: int) -> Tensor | None:
    """Detached, float64. A ValueError, unless value is floating point [count]."""
    if value is None:
        return None
    if value.shape != (count,) or not value.is_floating_point():
        raise ValueError(f"log_weights must be floating point [{count}], got {value.dtype} {tuple(value.shape)}")
    return value.detach().double()


def check_count(name: str, value: int) -> None:
    """A ValueError that names the argument, unless value is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")


def check_backend(backend: str, field: object) -> None:
    """A ValueError that names the argument, unless backend is known and, where a field is given, not plain."""
    if backend not in ("auto", "tiled", "triton", "plain"):
        raise ValueError(f"backend must be auto, tiled, triton or plain, got {backend!r}")
    if backend == "plain" and field is not None:
        raise ValueError("backend plain works on all anchors at once and takes no field")
