"""Float32 against float64, and anchors so far apart that exponentiating first fails."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lzn_dist.zones import align, alignment_loss, compute_latents
from tests.helpers.zone_cases import error, make, run


@pytest.mark.parametrize("steps", [20, 100])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("dim,b,n", [(16, 40, 200), (256, 40, 200)])
def test_float32_is_close_to_float64(dim: int, b: int, n: int, scale: float, solver: str, steps: int) -> None:
    batch = make(dim, n, b, scale, spread=0.5 if dim == 16 else 1.0)
    expected = run(batch, backend="tiled", solver=solver, steps=steps)
    found = run(batch, backend="tiled", solver=solver, steps=steps, dtype=torch.float32)
    errors = {name: error(found[name], expected[name]) for name in expected}
    for name, value in errors.items():
        assert value <= (1e-3 if name.startswith("grad") else 1e-4), errors


def published(x: Tensor, anchors: Tensor, steps: int, targets: Tensor) -> Tensor:
    """Log-probabilities [steps, b] by exponentiating and then dividing, as the formula is written."""
    recorded = []
    for k in range(steps):
        sigma = 1 - k / steps
        density = torch.exp(-0.5 * ((x[:, None] - (1 - sigma) * anchors[None]) / sigma).square().sum(-1))
        w = density / density.sum(1, keepdim=True)
        recorded.append(w.gather(1, targets[:, None])[:, 0].log())
        x = x - (x - w @ anchors) / sigma / steps
    return torch.stack(recorded)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("spread", [0.5, None], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("dim", [16, 256])
def test_finite_where_exponentiating_first_is_not(dim: int, spread: float | None, solver: str) -> None:
    batch = make(dim, 200, 24, 10.0, spread=spread)
    anchors = batch.anchors.float().requires_grad_()
    others = batch.others.float().requires_grad_()
    noise = batch.noise.float()
    latents = compute_latents(anchors[batch.index], noise, anchors, index=batch.index, solver=solver)  # type: ignore[arg-type]
    found = align(latents, others, batch.index)
    loss = alignment_loss(found.log_probs)
    grads = torch.autograd.grad(loss, (anchors, others), retain_graph=True)
    for value in (latents, found.log_probs, found.endpoint, loss, *grads):
        assert bool(value.isfinite().all())
    if dim == 256:
        theirs = alignment_loss(published(latents, others, 20, batch.index))
        assert not bool(theirs.isfinite())
        assert bool(torch.autograd.grad(theirs, others)[0].isnan().any())


def test_the_published_form_agrees_where_it_is_finite() -> None:
    """So that the test above compares like with like."""
    batch = make(16, 50, 24, 0.1)
    found = align(batch.noise, batch.others, batch.index)
    expected = published(batch.noise, batch.others, 20, batch.index)
    torch.testing.assert_close(found.log_probs, expected, rtol=1e-10, atol=1e-10)


def test_autocast_does_not_touch_the_flow() -> None:
    batch = make(32, 64, 32, 1.0)
    plain = run(batch, backend="tiled", dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = run(batch, backend="tiled", dtype=torch.float32)
    for name, value in plain.items():
        torch.testing.assert_close(cast[name], value, rtol=1e-5, atol=1e-6)
