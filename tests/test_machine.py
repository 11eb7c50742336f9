"""What the machine is told."""

from __future__ import annotations

import resource
import sys

import pytest
import torch

from lzn_dist.machine import keep_freed_memory


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's memory alone")
def test_freed_memory_is_used_again_without_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_TOP_PAD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    keep_freed_memory()
    for _ in range(10):  # until the heap has grown
        torch.empty(16 << 20).fill_(1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.empty(16 << 20).fill_(1)  # 64 MiB: 16,384 pages, or 32 large ones
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 50
