"""The mathematics on CUDA against the CPU: random numbers, and the zones in float32 against float64."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch

from lzn_dist.keyed_random import make_key, normal, permutation, uniform
from lzn_dist.models.layers import GroupNorm, KeyedDropout
from lzn_dist.zones import align, alignment_loss, compute_latents, trajectory
from tests.helpers.zone_cases import Batch, assert_equal, error, make, run
from tests.zones.test_weights_and_groups import CASES, options


def test_random_numbers_are_the_cpus(gpu: torch.device) -> None:
    """Uniform ones and permutations bit for bit; normal ones to the rounding of log, sqrt and cos."""
    here = make_key(3, "numbers", torch.arange(100))
    there = make_key(3, "numbers", torch.arange(100, device=gpu))
    assert torch.equal(here, there.cpu())
    assert torch.equal(uniform(here, (7, 5)), uniform(there, (7, 5)).cpu())
    assert torch.equal(permutation(here[0], 1000), permutation(there[0], 1000).cpu())
    assert float((normal(here, (501,)) - normal(there, (501,)).cpu()).abs().max()) <= 4e-6


def test_dropout_masks_are_the_cpus(gpu: torch.device) -> None:
    """By a kernel of their own, in training, eager and compiled."""
    layer, x = KeyedDropout(0.3, index=7), torch.randn(5, 33, 31)
    key = make_key(3, "dropout", torch.arange(5))
    expected = layer(x, key)
    kernel = importlib.import_module("lzn_dist.models.dropout_kernel").kept
    assert importlib.import_module("lzn_dist.models.layers")._gpus_mask() is kernel
    for function in (layer, torch.compile(layer)):
        found = function(x.to(gpu), key.to(gpu)).cpu()
        assert torch.equal(found != 0, expected != 0)
        torch.testing.assert_close(found, expected)


BACKENDS = ["tiled", "triton"]
SIZES = [(16, 40, 200, 1.0), (256, 40, 200, 0.1), (256, 300, 1111, 1.0), (8, 1, 1, 1.0), (512, 33, 99, 0.1)]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize(
    "dim,b,n,scale",
    [(16, 40, 200, 1.0), (256, 40, 200, 0.1), (256, 300, 1111, 1.0), (8, 1, 1, 1.0), (512, 33, 99, 0.1)],
)
def test_zones_in_float32_are_close_to_float64(
    gpu: torch.device, dim: int, b: int, n: int, scale: float, solver: str, backend: str
) -> None:
    """With TF32 allowed and autocast on outside: neither may reach the flow. Bounds are those of the CPU's test."""
    batch = make(dim, n, b, scale, spread=0.5 if dim == 16 else 1.0)
    expected = run(batch, backend="tiled", solver=solver)
    moved = Batch(*(value.to(gpu) for value in vars(batch).values()))
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        with torch.autocast("cuda", dtype=torch.bfloat16):
            found = run(moved, backend=backend, solver=solver, dtype=torch.float32)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    errors = {name: error(found[name].cpu(), expected[name]) for name in expected}
    for name, value in errors.items():
        assert value <= (1e-3 if name.startswith("grad") else 1e-4), errors


def moved(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", CASES)
def test_weights_and_groups_equal_the_definition(gpu: torch.device, case: str, backend: str) -> None:
    """In float64, cotangents everywhere; and the same digits when asked again."""
    batch = make(16, 60, 30, 1.0, spread=None)
    given = options(batch, **CASES[case])
    expected = run(batch, backend="relative", steps=10, dense=True, **given)
    there = Batch(*(value.to(gpu) for value in vars(batch).values()))
    given = {name: moved(value, gpu) for name, value in given.items()}
    first, again = (run(there, backend=backend, steps=10, dense=True, **given) for _ in range(2))
    assert_equal({name: value.cpu() for name, value in first.items()}, expected, 1e-10)
    if backend == "triton":
        assert all(torch.equal(value, again[name]) for name, value in first.items())


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_trajectory_waits_once_each_way(gpu: torch.device, backend: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = make(64, 500, 100, 0.5, spread=1.0)
    anchors, others = (value.float().to(gpu).requires_grad_() for value in (batch.anchors, batch.others))
    noise, index, waits = batch.noise.float().to(gpu), batch.index.to(gpu), []
    to_host = trajectory.to_host

    def allowed(values: torch.Tensor) -> torch.Tensor:
        waits.append(values.numel())
        torch.cuda.set_sync_debug_mode("default")
        found = to_host(values)
        torch.cuda.set_sync_debug_mode("error")
        return found

    def once() -> None:
        latents = compute_latents(anchors[index], noise, anchors, index=index, backend=backend)
        alignment_loss(align(latents, others, index, backend=backend).log_probs).backward()

    once()  # kernels are compiled, libraries loaded
    monkeypatch.setattr(trajectory, "to_host", allowed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert waits == [100, 100, 100]


def test_normalisations_under_autocast_are_bfloat16s(gpu: torch.device) -> None:
    """torch's own are float32 there; these are as near to float32 as bfloat16 is, with their gradients."""
    norm, x = GroupNorm(8, 32).to(gpu), 3 + torch.randn(4, 32, 9, 9, device=gpu)
    torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    wanted = torch.randn_like(x)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        given = x.to(dtype, copy=True).requires_grad_()
        with torch.autocast("cuda", torch.bfloat16, enabled=dtype == torch.bfloat16):
            made = norm(given)
        assert made.dtype == dtype
        made.backward(wanted.to(dtype))
        found.append([made.detach(), given.grad, *(one.grad.clone() for one in norm.parameters())])
        norm.zero_grad()
    for exact, ours in zip(*found, strict=True):
        assert error(ours.float().cpu(), exact.cpu()) <= 2e-2
