"""The ring on 2 and 4 ranks gives the latents, alignments and gradients of one process that holds all anchors."""

from __future__ import annotations

import subprocess
import sys
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

pytestmark = pytest.mark.process

WORKER = Path(__file__).with_name("ring_worker.py")


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found. Ranks that wait for each other end with the timeout."""
    folder = tmp_path_factory.mktemp("ring")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={request.param}"]
    done = subprocess.run([*command, WORKER, folder], timeout=300, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return [torch.load(folder / f"{rank}.pt") for rank in range(request.param)]


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


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float64])
def test_results_and_gradients_are_those_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    found = errors(ranks, name, "tiled")
    assert max(found.values()) <= 1e-10, found


BY_DEFINITION = ["euler", "euler unaligned", "dpm_solver_pp", "settled", "weights", "groups", "groups, settled"]


@pytest.mark.parametrize("name", BY_DEFINITION)
def test_results_and_gradients_are_those_of_the_definition(ranks: list[dict[str, Any]], name: str) -> None:
    found = errors(ranks, name, "plain")
    assert max(found.values()) <= 1e-10, found


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.dtype == torch.float32])
def test_float32_is_close_to_float64(ranks: list[dict[str, Any]], name: str) -> None:
    found = errors(ranks, name, "tiled")
    assert all(error <= (1e-3 if key.startswith("grad") else 1e-4) for key, error in found.items()), found


@pytest.mark.parametrize("name", AGAIN)
def test_fewer_stored_states_change_no_digit(ranks: list[dict[str, Any]], name: str) -> None:
    found, expected = joined(ranks, name), joined(ranks, AGAIN[name][1])
    assert all(torch.equal(found[key], value) for key, value in expected.items())


def test_a_group_of_all_ranks_changes_no_digit(ranks: list[dict[str, Any]]) -> None:
    found, expected = joined(ranks, "group"), joined(ranks, "euler")
    assert all(torch.equal(found[key], value) for key, value in expected.items())


@pytest.mark.parametrize("name", ["one rank alone", "settled"])
def test_ranks_take_part_in_steps_that_others_need(ranks: list[dict[str, Any]], name: str) -> None:
    """As many rounds on every rank, some of them without a row of its own; the one rank alone needs hardly any."""
    calls = [rank["calls"][name] for rank in ranks]
    assert len({len(counts) for counts in calls}) == 1
    if name == "one rank alone":
        assert sum(a == 0 and b > 0 for a, b in zip(calls[0], calls[-1], strict=True)) >= 5
    else:
        rows = torch.tensor(calls).sum(0)
        assert int(rows[-1]) < CASES[name].n / 2  # most rows have settled


def test_nothing_has_the_size_of_the_global_batch(ranks: list[dict[str, Any]]) -> None:
    case = CASES["settled unaligned"]
    borders = starts(case.n, len(ranks))
    most = max(b - a for a, b in pairwise(borders))
    for rank in ranks:
        assert rank["largest"] <= max(most * case.dim, most * case.steps) < case.n * case.dim


@pytest.mark.parametrize("name", ["targets", "index", "anchors must", "solver", "backend", "anchors", "anchors:"])
def test_refused_by_name(ranks: list[dict[str, Any]], name: str) -> None:
    for rank in ranks:
        assert rank["refusals"][name].startswith(name)


def test_one_process_needs_no_group() -> None:
    found, expected = run(CASES["euler"], 0, 1, borders=2, field=ring_field()), one_process("euler", 2, "tiled")
    assert all(torch.equal(found[key], value) for key, value in expected.items())
