"""Tiled path against its plain twin, and against a third derivation, in float64: values and every gradient, to 1e-10.

Cotangents on every step's log-probability (dense) are compared with the third derivation, and at 10 steps: late
steps multiply the error of a row on a zone's boundary by r² times the anchors' spread, and the plain twin, which
works on x, starts from an error that 1/σ has amplified already. The training loss keeps one step a sample.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from lzn_dist.zones import align, alignment_loss, block, compute_latents, trajectory
from lzn_dist.zones.field import AnchorField, Posterior
from tests.helpers.zone_cases import Batch, assert_equal, error, make, run

SIZES = {16: (256, 256), 32: (60, 200), 256: (10, 256)}  # dim: (b, n)


def compare(batch: Batch, *, solver: str = "euler", steps: int = 20, dense: bool = False) -> None:
    expected = run(batch, backend="relative" if dense else "plain", solver=solver, steps=steps, dense=dense)
    assert_equal(run(batch, backend="tiled", solver=solver, steps=steps, dense=dense), expected, 1e-10)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("dim", [16, 32, 256])
def test_tiled_equals_plain(dim: int, scale: float, solver: str) -> None:
    b, n = SIZES[dim]
    compare(make(dim, n, b, scale, near=True), solver=solver, steps=12)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("near", [False, True])
@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("dim", [16, 32, 256])
def test_tiled_equals_the_form_that_amplifies_no_rounding(dim: int, scale: float, near: bool, dense: bool) -> None:
    b, n = SIZES[dim]
    compare(make(dim, n, b // 2, scale, near=near, spread=None), steps=10, dense=dense)
    expected = run(make(dim, n, b // 2, scale, near=near), backend="relative")
    found = run(make(dim, n, b // 2, scale, near=near), backend="tiled")
    assert_equal(found, {name: expected[name] for name in ("latents", "log_probs", "endpoint")}, 1e-13)


@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9, 10])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_few_steps(solver: str, steps: int) -> None:
    """DPM-Solver++ falls back to lower orders at its end with fewer than 10 steps."""
    batch = make(16, 40, 24, 1.0, near=True)
    if steps > 1:  # the first step's log-probabilities are constant
        compare(batch, solver=solver, steps=steps)
    compare(batch, solver=solver, steps=steps, dense=True)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_cotangents_everywhere(scale: float, solver: str) -> None:
    compare(make(16, 100, 37, scale, near=True), solver=solver, steps=10, dense=True)


def test_many_steps() -> None:
    compare(make(16, 50, 20, 1.0), steps=100)


@pytest.mark.parametrize("elements", [1, 100, 1 << 10])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_uneven_tiles(monkeypatch: pytest.MonkeyPatch, solver: str, elements: int) -> None:
    """One row a tile, two, and a height that does not divide the rows."""
    batch = make(16, 47, 23, 0.1, near=True)
    monkeypatch.setattr(block, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(block, "TILE_ROWS", 1)
    compare(batch, solver=solver)
    compare(batch, solver=solver, steps=10, dense=True)


@pytest.mark.parametrize(
    "dim,b,scale,spread", [(16, 64, 1.0, 0.5), (16, 64, 1.0, None), (256, 8, 0.2, 1.0), (256, 8, 0.2, None)]
)
@pytest.mark.parametrize("dense", [False, True])
def test_rows_that_settle_early(
    monkeypatch: pytest.MonkeyPatch, dim: int, b: int, scale: float, spread: float | None, dense: bool
) -> None:
    """From 192 anchors on, a row on which one anchor holds all weight is followed in that pair alone."""
    batch = make(dim, 200, b, scale, spread=spread)
    settled: list[int] = []
    posterior = AnchorField.posterior

    def spy(*args: Any, **options: Any) -> Posterior:
        part = posterior(*args, **options)
        settled.append(0 if part.settled is None else int(part.settled.sum()))
        return part

    monkeypatch.setattr(AnchorField, "posterior", spy)
    compare(batch, steps=10 if dense else 20, dense=dense)
    assert b / 3 < sum(settled) <= b
    settled.clear()
    monkeypatch.setattr(trajectory, "SETTLE_ANCHORS", 201)
    compare(batch, steps=10 if dense else 20, dense=dense)
    assert sum(settled) == 0


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("dim", [16, 256])
def test_scale_10(dim: int, solver: str) -> None:
    """Latents and losses to 1e-8. The anchors' gradient has no accurate digits of its own there (it is the tiny rest
    of huge terms that cancel), hence the floor from the other gradients' norm."""
    batch = make(dim, 200, 64 if dim == 16 else 8, 10.0)
    expected = run(batch, backend="plain", solver=solver)
    found = run(batch, backend="tiled", solver=solver)
    for name in ("latents", "endpoint", "loss"):
        assert error(found[name], expected[name]) <= 1e-8, name
    floor = max(float(value.norm()) for name, value in expected.items() if name.startswith("grad"))
    for name in ("grad_anchors", "grad_others", "grad_noise"):
        difference = float((found[name] - expected[name]).norm())
        assert difference <= 1e-8 * (float(expected[name].norm()) + floor), name


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_one_anchor(solver: str) -> None:
    compare_one = make(16, 1, 1, 1.0)
    expected = run(compare_one, backend="plain", solver=solver, dense=True)
    found = run(compare_one, backend="tiled", solver=solver, dense=True)
    assert_equal(found, {name: expected[name] for name in ("latents", "endpoint", "grad_others")}, 1e-10)
    for name in ("log_probs", "loss"):
        assert not found[name].any(), name
    for name in ("grad_anchors", "grad_noise"):
        assert float((found[name] - expected[name]).norm()) <= 1e-10 * float(expected["grad_others"].norm()), name


def test_defaults_are_the_own_anchors_in_their_order() -> None:
    batch = make(16, 12, 12, 1.0)
    short = compute_latents(batch.anchors, batch.noise)
    full = compute_latents(batch.anchors, batch.noise, batch.anchors, index=torch.arange(12))
    assert torch.equal(short, full)
    # products of other shapes may round otherwise
    torch.testing.assert_close(
        compute_latents(batch.anchors[:5], batch.noise[:5], batch.anchors), full[:5], rtol=0, atol=1e-13
    )


def test_more_samples_than_anchors() -> None:
    """b > n: several latents of one anchor, index with repetitions."""
    batch = make(16, 5, 5, 1.0)
    g = torch.Generator().manual_seed(3)
    index = torch.randint(0, 5, (31,), generator=g)
    noise = torch.randn(31, 16, generator=g).double()
    compare(Batch(batch.anchors, batch.others, noise, index))
    compare(Batch(batch.anchors, batch.others, noise, index), steps=10, dense=True)


@pytest.mark.parametrize("classes", [10, 200])
def test_alignment_with_class_weights(classes: int) -> None:
    """Log-frequencies with an absent class: −inf where it is the target, the right end point, no gradient to it."""
    g = torch.Generator().manual_seed(0)
    start = torch.randn(40, 16, generator=g).double()
    start_anchors = torch.randn(classes, 16, generator=g).double()
    frequencies = torch.rand(classes, generator=g).double() + 0.1
    frequencies[4] = 0.0
    log_weights = (frequencies / frequencies.sum()).log()
    targets = torch.arange(40) % min(classes, 10)
    present = targets != 4
    results = []
    for backend in ("plain", "tiled"):
        latents, anchors = start.clone().requires_grad_(), start_anchors.clone().requires_grad_()
        found = align(latents, anchors, targets, log_weights=log_weights, steps=10, backend=backend)
        assert bool(found.log_probs[:, ~present].isneginf().all())
        assert bool(found.log_probs[:, present].isfinite().all())
        kept = found.log_probs[:, present]
        weight = torch.linspace(-1, 2, kept.numel(), dtype=torch.float64).reshape(kept.shape)
        objective = (kept * weight).sum() + (found.endpoint * start.flip(0)).sum()
        grads = torch.autograd.grad(objective, (latents, anchors))
        results.append({"log_probs": kept, "endpoint": found.endpoint, "latents": grads[0], "anchors": grads[1]})
    assert_equal(results[1], results[0], 1e-10)
    assert not results[1]["anchors"][4].any()
    # the first step, at x itself: log π_j − ½‖x‖² normalised over j is log π_j
    assert error(results[1]["log_probs"][0], log_weights[targets[present]]) < 1e-14


def test_gradient_of_latents_in_alignment() -> None:
    batch = make(32, 90, 33, 1.0)
    g = torch.Generator().manual_seed(2)
    start = torch.randn(33, 32, generator=g).double()
    grads = []
    for backend in ("plain", "tiled"):
        latents = start.clone().requires_grad_()
        found = align(latents, batch.others, batch.index, steps=10, backend=backend)
        objective = alignment_loss(found.log_probs) + (found.endpoint * start.flip(0)).mean()
        grads.append(torch.autograd.grad(objective, latents)[0])
    assert error(grads[1], grads[0]) <= 1e-10


def test_own_anchors_gradients_are_summed_over_both_roles() -> None:
    """With anchors and all_anchors as separate leaves it is the sum that must agree."""
    batch = make(16, 20, 20, 1.0)
    sums = []
    for backend in ("plain", "tiled"):
        own, everyone = batch.anchors.clone().requires_grad_(), batch.anchors.clone().requires_grad_()
        latents = compute_latents(own, batch.noise, everyone, backend=backend)
        first, second = torch.autograd.grad((latents * batch.others).sum(), (own, everyone))
        sums.append(first + second)
    assert error(sums[1], sums[0]) <= 1e-10


def test_no_samples() -> None:
    batch = make(16, 6, 6, 1.0)
    none = torch.zeros(0, dtype=torch.int64)
    latents = compute_latents(batch.anchors[none], batch.noise[none], batch.anchors, index=none)
    found = align(latents, batch.others, none, steps=7)
    assert latents.shape == (0, 16) and found.log_probs.shape == (7, 0) and found.endpoint.shape == (0, 16)


def test_loss_value_is_that_of_chance_before_any_step() -> None:
    """At σ = 1 every anchor is as likely: log w = −log n."""
    batch = make(16, 30, 30, 1.0)
    found = align(batch.noise, batch.others, batch.index)
    torch.testing.assert_close(found.log_probs[0], torch.full((30,), -math.log(30), dtype=torch.float64))
