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


def adversarial(kind: str, n: int, d: int) -> tuple[Tensor, Tensor]:
    """Two views of n anchors; numbers that float32 has, in float64."""
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator, dtype=torch.float64) for _ in range(2))
    centres = torch.randn(12, d, generator=generator, dtype=torch.float64)[torch.arange(n) % 12]
    sphere = x / x.norm(dim=1, keepdim=True) * d**0.5
    first, second = {
        "sphere": (sphere, sphere + 0.3 * y), "clusters": (centres + 0.1 * x, centres + 0.1 * y),
        "near-duplicates": (centres + 1e-4 * x, centres + 1e-4 * y), "lattice": (x.round(), x.round() + 0.1 * y),
        "scale 10": (10 * x, 10 * x + y), "scale 0.1": (0.1 * x, 0.1 * x + 0.05 * y),
        "scale 0.01": (0.01 * x, 0.01 * y), "far outlier": (torch.cat((100 * x[:1], x[1:])), x + 0.1 * y),
        "equal views": (x, x),
    }[kind]  # fmt: skip
    return first.float().double(), second.float().double()


@pytest.mark.parametrize("every_step", [False, True], ids=["best step", "every step"])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("kind", [
    "sphere", "clusters", "near-duplicates", "lattice", "scale 10", "scale 0.1", "scale 0.01", "far outlier",
    "equal views",
])  # fmt: skip
def test_what_float32_leaves_out_is_rounding(kind: str, solver: str, every_step: bool) -> None:
    """Scores in float32 where they are small, no exp that underflows, no gradient of rows that have none: latents
    within 2e-6, the loss within 4e-6, gradients within 5e-3 of float64's (the rest is float32's own rounding: a loss of
    0.008 that hangs on one row is 1.5e-6 off with all scores in float64, 2.0e-6 so, on one of two processors).
    """
    n, b, d = 600, 120, 32
    first, second = adversarial(kind, n, d)
    noise = 0.45 * torch.randn(b, d, generator=torch.Generator().manual_seed(1)).double()
    index, found = torch.arange(b), []
    for dtype in (torch.float64, torch.float32):
        anchors, others = (value.to(dtype, copy=True).requires_grad_() for value in (first, second))
        latents = compute_latents(anchors[:b], noise.to(dtype), anchors, index=index, solver=solver)  # type: ignore[arg-type]
        log_probs = align(latents, others, index).log_probs
        loss = -log_probs.mean() if every_step else alignment_loss(log_probs)
        found.append([latents.detach(), loss.detach(), *torch.autograd.grad(loss, (anchors, others))])
    (latents, loss, *grads), (ours, our_loss, *our_grads) = found
    assert (ours.double() - latents).norm() <= 2e-6 * latents.norm()
    assert (our_loss.double() - loss).abs() <= 4e-6 * loss.abs() + 1e-12
    total = torch.stack([grad.norm() for grad in grads]).norm()
    for ours, exact in zip(our_grads, grads, strict=True):
        assert (ours.double() - exact).norm() <= 5e-3 * total + 1e-10


@pytest.mark.parametrize("weights", [None, [0.0, -torch.inf, -1.0]])
def test_what_weighs_nothing_is_exactly_nothing(weights: list[float] | None) -> None:
    """A single anchor is all there is; a class of no weight is as if it were not there."""
    generator = torch.Generator().manual_seed(0)
    anchors, latents = (torch.randn(3, 8, generator=generator) for _ in range(2))
    if weights is None:
        found = align(latents, anchors[:1], torch.zeros(3, dtype=torch.int64))
        assert torch.equal(found.log_probs, torch.zeros_like(found.log_probs))
        assert torch.equal(compute_latents(anchors[:1], latents[:1], anchors[:1]), latents[:1])
    else:
        log_weights, targets = torch.tensor(weights), torch.tensor([0, 2, 0])
        found = align(latents, anchors, targets, log_weights=log_weights)
        without = align(latents, anchors[[0, 2]], torch.tensor([0, 1, 0]), log_weights=log_weights[[0, 2]])
        torch.testing.assert_close(found.log_probs, without.log_probs, rtol=2e-6, atol=1e-12)
