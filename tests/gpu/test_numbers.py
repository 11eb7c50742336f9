"""The mathematics on CUDA against the CPU: random numbers, and the zones in float32 against float64."""

from __future__ import annotations

import pytest
import torch

from lzn_dist.keyed_random import make_key, normal, permutation, uniform
from tests.helpers.zone_cases import Batch, error, make, run


def test_random_numbers_are_the_cpus(gpu: torch.device) -> None:
    """Uniform ones and permutations bit for bit; normal ones to the rounding of log, sqrt and cos."""
    here = make_key(3, "numbers", torch.arange(100))
    there = make_key(3, "numbers", torch.arange(100, device=gpu))
    assert torch.equal(here, there.cpu())
    assert torch.equal(uniform(here, (7, 5)), uniform(there, (7, 5)).cpu())
    assert torch.equal(permutation(here[0], 1000), permutation(there[0], 1000).cpu())
    assert float((normal(here, (501,)) - normal(there, (501,)).cpu()).abs().max()) <= 4e-6


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("dim,b,n,scale", [(16, 40, 200, 1.0), (256, 40, 200, 0.1), (256, 300, 1111, 1.0)])
def test_zones_in_float32_are_close_to_float64(
    gpu: torch.device, dim: int, b: int, n: int, scale: float, solver: str
) -> None:
    """With TF32 allowed and autocast on outside: neither may reach the flow. Bounds are those of the CPU's test."""
    batch = make(dim, n, b, scale, spread=0.5 if dim == 16 else 1.0)
    expected = run(batch, backend="tiled", solver=solver)
    moved = Batch(*(value.to(gpu) for value in vars(batch).values()))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = run(moved, backend="tiled", solver=solver, dtype=torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    errors = {name: error(found[name].cpu(), expected[name]) for name in expected}
    for name, value in errors.items():
        assert value <= (1e-3 if name.startswith("grad") else 1e-4), errors
