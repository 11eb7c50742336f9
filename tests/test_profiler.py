"""The profile of a few steps: a trace that can be read, a table with the flow's row, and a word where there is none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import torch

from lzn_dist.training.profiler import WARM_UP, StepProfiler
from lzn_dist.zones import align, alignment_loss, compute_latents


def step() -> None:
    anchors = torch.randn(64, 16, requires_grad=True)
    latents = compute_latents(anchors, torch.randn(64, 16), steps=3)
    alignment_loss(align(latents, anchors + 0.1, torch.arange(64), steps=3).log_probs).backward()


def test_a_profile_has_a_trace_and_a_row_for_the_flow(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(2, tmp_path / "profile", torch.device("cpu"), said.append)
    for number in range(WARM_UP + 2):
        assert not said, number
        step()
        profiler.step()
    table, where = said
    *items, flow = table.splitlines()[2:]
    assert table.startswith("profile of 2 steps") and len(items) == 10
    # latents and alignment, forward and backward; nothing else is done here, so that they are most of it
    name, calls, _, share, _ = flow.rsplit(maxsplit=4)
    assert name == "flow of the zones, with all it calls" and calls == "4" and 50 < float(share) <= 100
    shares = [float(line.split()[-2]) for line in items]
    assert shares == sorted(shares, reverse=True)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"]]
    assert names.count("_TrajectoryBackward") == 4 and str(tmp_path / "profile" / "trace.json.gz") in where
    profiler.step()
    profiler.close()
    assert len(said) == 2


def test_a_run_that_ends_before_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    profiler = StepProfiler(5, tmp_path / "profile", torch.device("cpu"), said.append)
    profiler.step()
    profiler.close()
    assert said == ["profile: the run ended before 2 + 5 steps"] and not list((tmp_path / "profile").iterdir())
    nothing = StepProfiler(0, tmp_path / "none", torch.device("cpu"), said.append)
    nothing.step()
    nothing.close()
    assert len(said) == 1 and not (tmp_path / "none").exists()
