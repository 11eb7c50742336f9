"""The ring on 2 and 4 ranks gives the latents, alignments and gradients of one process that holds all anchors."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lzn_dist.distributed.ring import ring_field
from tests.distributed.ring_worker import AGAIN, CASES, run, starts
from tests.helpers.launching import ranks as start

pytestmark = pytest.mark.process

WORKER = Path(__file__).with_name("ring_worker.py")


@cache
def one_process(name: str, borders: int, backend: str) -> dict[str, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    found = run(replace(CASES[name], dtype=torch.float64), 0, 1, borders=borders, backend=backend)
    torch.set_num_threads(threads)
    return found


def joined(ranks: list[dict[str, Any]], name: str) -> dict[str, Tensor]:
    results = [rank["results"][name] for rank in ranks]
    return {key: torch.cat([result[key] for result in results]).double() for key in results[0]}


def errors(ranks: list[dict[str, Any]], name: str, backend: str) -> dict[str, float]:
    found, expected = joined(ranks, name), one_process(name, len(ranks), backend)
    assert found.keys() == expected.keys()
    assert all(float(value.norm()) > 1e-6 for value in expected.values())
    return {key: float((found[key] - value).norm() / value.norm()) for key, value in expected.items()}


BY_DEFINITION = ["euler", "euler unaligned", "dpm_solver_pp", "settled", "weights", "groups", "groups, settled"]


@pytest.mark.parametrize("world", [pytest.param(2, marks=pytest.mark.soak), 4])
def test_results_and_gradients_are_those_of_one_process(world: int, tmp_path: Path) -> None:
    """All cases of one start of the ranks. Ranks that wait for each other end with the timeout."""
    done = start("ddp", WORKER, tmp_path, processes=world, cwd=tmp_path, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:]
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(world)]
    for name, case in CASES.items():
        found = errors(ranks, name, "tiled")
        for key, error in found.items():
            bound = 1e-10 if case.dtype == torch.float64 else 1e-3 if key.startswith("grad") else 1e-4
            assert error <= bound, (name, found)
    for name in BY_DEFINITION:
        found = errors(ranks, name, "plain")
        assert max(found.values()) <= 1e-10, (name, found)
    # fewer stored states, and a group of all ranks, change no digit
    for name, (_, like) in {**AGAIN, "group": (1, "euler")}.items():
        one, other = joined(ranks, name), joined(ranks, like)
        assert all(torch.equal(one[key], value) for key, value in other.items()), name
    ranks_take_part_in_steps_that_others_need(ranks)
    nothing_has_the_size_of_the_global_batch(ranks)
    for name in ("targets", "index", "anchors must", "solver", "backend", "anchors", "anchors:"):
        assert all(rank["refusals"][name].startswith(name) for rank in ranks), name


def ranks_take_part_in_steps_that_others_need(ranks: list[dict[str, Any]]) -> None:
    """As many rounds on every rank, some of them without a row of its own; the one rank alone needs hardly any."""
    for name in ("one rank alone", "settled"):
        calls = [rank["calls"][name] for rank in ranks]
        assert len({len(counts) for counts in calls}) == 1
        if name == "one rank alone":
            assert sum(a == 0 and b > 0 for a, b in zip(calls[0], calls[-1], strict=True)) >= 5
        else:
            rows = torch.tensor(calls).sum(0)
            assert int(rows[-1]) < CASES[name].n / 2  # most rows have settled


def nothing_has_the_size_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    case = CASES["settled unaligned"]
    borders = starts(case.n, len(ranks))
    most = max(b - a for a, b in pairwise(borders))
    for rank in ranks:
        assert rank["largest"] <= max(most * case.dim, most * case.steps) < case.n * case.dim


def test_one_process_needs_no_group() -> None:
    found, expected = run(CASES["euler"], 0, 1, borders=2, field=ring_field()), one_process("euler", 2, "tiled")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
