"""Flow, latents and losses against facts that hold without the code under test."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lzn_dist.zones import align, alignment_loss, compute_latents, nearest_anchor
from tests.helpers.zone_cases import error, make

NORMAL = torch.distributions.Normal(torch.tensor(0.0, dtype=torch.float64), 1.0)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# --- derivatives ---


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_gradients_of_latents_are_those_of_differences(solver: str) -> None:
    index = torch.tensor([3, 0, 3, 1])

    def function(anchors: Tensor, noise: Tensor) -> Tensor:
        return compute_latents(anchors[index], noise, anchors, index=index, solver=solver, steps=5)  # type: ignore[arg-type]

    inputs = (draw(5, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_())
    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_alignment_are_those_of_differences(weighted: bool) -> None:
    targets = torch.tensor([2, 0, 2])
    log_weights = torch.tensor([0.3, 0.0, 0.2, 0.5]).log() if weighted else None

    def function(latents: Tensor, anchors: Tensor) -> tuple[Tensor, Tensor]:
        found = align(latents, anchors, targets, log_weights=log_weights, steps=5)
        return found.log_probs, found.endpoint

    assert torch.autograd.gradcheck(function, (draw(3, 3).requires_grad_(), draw(4, 3, seed=1).requires_grad_()))


# --- the flow ---


def test_one_anchor_owns_all_of_space() -> None:
    anchor, noise = draw(1, 7), draw(1, 7, seed=1)
    assert torch.equal(compute_latents(anchor, noise), noise)
    late = compute_latents(anchor, noise, solver="dpm_solver_pp")
    torch.testing.assert_close(late, 1e-3 * anchor + (1 - 1e-3) * noise, rtol=0, atol=1e-14)
    found = align(noise, anchor, torch.zeros(1, dtype=torch.int64))
    assert not found.log_probs.any() and torch.equal(found.endpoint, anchor)


def test_two_symmetric_anchors_share_the_line_at_zero() -> None:
    anchors = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    latents = torch.tensor([[0.01], [-0.01], [2.0], [-2.0], [0.0]], dtype=torch.float64)
    found = align(latents, anchors, torch.zeros(5, dtype=torch.int64), steps=200)
    torch.testing.assert_close(found.endpoint[:, 0], latents[:, 0].sign(), rtol=0, atol=1e-9)
    # log w of ±1 at x is log sigmoid(±2 x (1−σ)/σ²); the first step but one is a single Euler step from x
    torch.testing.assert_close(found.log_probs[0], torch.full((5,), math.log(0.5), dtype=torch.float64))
    sigma = 1 - 1 / 200
    x = latents[:, 0] - latents[:, 0] / 200
    second = torch.nn.functional.logsigmoid(2 * x * (1 - sigma) / sigma**2)
    torch.testing.assert_close(found.log_probs[1], second, rtol=1e-12, atol=0)


def quantile(anchors: Tensor, noise: Tensor) -> Tensor:
    """The exact latents on the line: the flow keeps order and mass, so that ε at the k-th of n anchors (from 0) goes to
    Φ⁻¹((k + Φ(ε)) / n)."""
    rank = anchors[:, 0].argsort().argsort()
    return NORMAL.icdf((rank[:, None] + NORMAL.cdf(noise)) / len(anchors))


LINE = torch.tensor([[0.3], [-1.2], [1.0], [0.9], [-0.4]], dtype=torch.float64)


def test_adaptive_latents_on_the_line_are_quantiles() -> None:
    noise = torch.tensor([[-1.5], [-0.5], [0.0], [0.5], [1.5]], dtype=torch.float64)
    exact = quantile(LINE, noise)
    torch.testing.assert_close(compute_latents(LINE, noise, solver="dopri5"), exact, rtol=0, atol=1e-4)


@pytest.mark.parametrize("solver,order", [("euler", 1), ("dpm_solver_pp", 1)])
def test_latents_on_the_line_converge_to_quantiles(solver: str, order: int) -> None:
    noise = torch.tensor([[-1.5], [-0.5], [0.0], [0.5], [1.5]], dtype=torch.float64)
    exact = quantile(LINE, noise)
    errors = [
        float((compute_latents(LINE, noise, solver=solver, steps=steps) - exact).abs().max())  # type: ignore[arg-type]
        for steps in (50, 200, 800)
    ]
    # DPM-Solver++ stops at σ = 1 − 10⁻³, where the latent is 10⁻³ short
    assert errors[2] < 0.02 and errors[0] > errors[1] > errors[2], errors


def test_latents_of_a_positive_anchor_become_positive() -> None:
    """Of two anchors ±1, +1 owns the positive half line; coarse Euler steps miss it by their own error alone."""
    anchors = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    noise = torch.tensor([[-2.0]], dtype=torch.float64)
    own = anchors[:1]
    exact = float(NORMAL.icdf(0.5 + 0.5 * NORMAL.cdf(noise)))
    latents = [float(compute_latents(own, noise, anchors, steps=steps)) for steps in (20, 100, 1000)]
    misses = [abs(z - exact) for z in latents]
    assert latents[-1] > 0 and misses[0] > misses[1] > misses[2], (latents, exact)


def test_latents_of_all_zones_together_are_gaussian() -> None:
    """Moments of 4000 latents over 100 anchors that are anything but Gaussian: three standard deviations of a sample's
    mean (0.047), variance (0.067) and covariance (0.047)."""
    g = torch.Generator().manual_seed(0)
    anchors = torch.rand(100, 2, generator=g, dtype=torch.float64) * 2 + torch.tensor([3.0, -1.0])
    index = torch.arange(4000) % 100
    z = compute_latents(anchors[index], draw(4000, 2), anchors, index=index, steps=200)
    covariance = torch.cov(z.T)
    assert float(z.mean(0).abs().max()) < 0.047
    assert float((covariance.diagonal() - 1).abs().max()) < 0.067
    assert abs(float(covariance[0, 1])) < 0.047
    fourth = float((z.square() ** 2).mean())
    assert abs(fourth - 3) < 3 * math.sqrt(96 / 8000)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp", "dopri5"])
def test_latents_return_to_their_own_anchor(solver: str) -> None:
    anchors = draw(200, 16)
    z = compute_latents(anchors, 0.45 * draw(200, 16, seed=1), solver=solver, steps=50)  # type: ignore[arg-type]
    found = align(z, anchors, torch.arange(200), steps=50)
    assert torch.equal(nearest_anchor(found.endpoint, anchors), torch.arange(200))
    assert error(found.endpoint, anchors) < 1e-6
    assert float(alignment_loss(found.log_probs)) < 1e-6


@pytest.mark.slow
def test_adaptive_latents_agree_with_many_steps() -> None:
    start, noise = draw(6, 4), 0.5 * draw(6, 4, seed=1)
    values, grads = [], []
    for options in ({"solver": "dopri5"}, {"solver": "euler", "steps": 2000}):
        anchors = start.clone().requires_grad_()
        epsilon = noise.clone().requires_grad_()
        z = compute_latents(anchors, epsilon, **options)
        values.append(z.detach())
        grads.append(torch.autograd.grad((z * draw(6, 4, seed=2)).sum(), (anchors, epsilon)))
    assert error(values[0], values[1]) < 1e-3
    for adaptive, fixed in zip(*grads, strict=True):
        assert error(adaptive, fixed) < 1e-2


# --- symmetries ---


@settings(max_examples=20, deadline=None, derandomize=True)
@given(shift=st.lists(st.floats(-10, 10), min_size=3, max_size=3), seed=st.integers(0, 1000))
def test_a_common_shift_of_the_anchors_changes_no_latent(shift: list[float], seed: int) -> None:
    """At σ = 1 the own anchor's part is 0, so that Euler's latents are the same; DPM-Solver++'s move by 10⁻³ of it."""
    anchors, noise = draw(8, 3, seed=seed), draw(8, 3, seed=seed + 1)
    c = torch.tensor(shift, dtype=torch.float64)
    euler = compute_latents(anchors + c, noise) - compute_latents(anchors, noise)
    assert float(euler.abs().max()) < 1e-9
    late = compute_latents(anchors + c, noise, solver="dpm_solver_pp")
    late = late - compute_latents(anchors, noise, solver="dpm_solver_pp")
    assert float((late - 1e-3 * c).abs().max()) < 1e-9


@settings(max_examples=20, deadline=None, derandomize=True)
@given(seed=st.integers(0, 1000), steps=st.integers(1, 25), solver=st.sampled_from(["euler", "dpm_solver_pp"]))
def test_order_of_samples_and_of_anchors_does_not_matter(seed: int, steps: int, solver: str) -> None:
    anchors, noise, others = draw(9, 4, seed=seed), draw(9, 4, seed=seed + 1), draw(9, 4, seed=seed + 2)
    g = torch.Generator().manual_seed(seed)
    rows, keys = torch.randperm(9, generator=g), torch.randperm(9, generator=g)
    where = keys.argsort()[rows]  # anchors[keys][where] = anchors[rows]
    z = compute_latents(anchors, noise, solver=solver, steps=steps)  # type: ignore[arg-type]
    moved = compute_latents(anchors[rows], noise[rows], anchors[keys], index=where, solver=solver, steps=steps)  # type: ignore[arg-type]
    torch.testing.assert_close(moved, z[rows], rtol=0, atol=1e-10)
    log_weights = torch.rand(9, generator=g).log()
    found = align(z, others, torch.arange(9), log_weights=log_weights, steps=steps)
    again = align(z[rows], others[keys], where, log_weights=log_weights[keys], steps=steps)
    torch.testing.assert_close(again.log_probs, found.log_probs[:, rows], rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(again.endpoint, found.endpoint[rows], rtol=0, atol=1e-9)


# --- losses ---


def test_alignment_loss_keeps_each_samples_best_late_step() -> None:
    log_probs = torch.tensor([[0.0, 0.0], [-1.0, -9.0], [-3.0, -2.0], [-2.0, -4.0], [-5.0, -8.0]])
    assert float(alignment_loss(log_probs)) == pytest.approx(1.5)  # the first of five is left out
    assert float(alignment_loss(log_probs, cutoff=0.0)) == 0.0
    assert float(alignment_loss(log_probs, cutoff=0.4)) == pytest.approx(2.0)
    assert float(alignment_loss(log_probs, cutoff=0.39)) == pytest.approx(1.5)  # int(1.95) = 1
    by_hand = -(math.exp(-1) + math.exp(-2)) / 2
    assert float(alignment_loss(log_probs, kind="probability")) == pytest.approx(by_hand)


def test_what_of_the_steps_the_loss_takes_by_hand() -> None:
    log_probs = torch.tensor([[0.0, 0.0], [-1.0, -9.0], [-3.0, -2.0], [-2.0, -4.0], [-5.0, -8.0]], dtype=torch.float64)

    def loss(over: str, **more: float) -> float:
        return float(alignment_loss(log_probs, over=over, **more))  # type: ignore[arg-type]

    assert loss("mean") == pytest.approx((11 / 4 + 23 / 4) / 2) and loss("last") == pytest.approx(6.5)
    smooth = [math.log(sum(math.exp(v / 0.5) for v in row) / 4) * 0.5 for row in ((-1, -3, -2, -5), (-9, -2, -4, -8))]
    assert loss("softmax", temperature=0.5) == pytest.approx(-sum(smooth) / 2)
    assert loss("softmax", temperature=1e-4) == pytest.approx(loss("max"), abs=2e-4)
    assert loss("softmax", temperature=1e5) == pytest.approx(loss("mean"), abs=2e-4)
    by_hand = -(math.exp(-5) + math.exp(-8)) / 2
    assert float(alignment_loss(log_probs, over="last", kind="probability")) == pytest.approx(by_hand)


@pytest.mark.parametrize("over", ["mean", "last", "softmax"])
def test_every_way_of_the_loss_has_the_definitions_gradient(over: str) -> None:
    """Also where rows settle and pass no gradient: other steps than the best one have a cotangent."""
    batch = make(16, 200, 60, 1.0, spread=0.5)
    found = []
    for backend in ("plain", "tiled"):
        anchors, others = batch.anchors.clone().requires_grad_(), batch.others.clone().requires_grad_()
        latents = compute_latents(anchors[batch.index], batch.noise, anchors, index=batch.index, backend=backend)  # type: ignore[arg-type]
        log_probs = align(latents, others, batch.index, backend=backend).log_probs  # type: ignore[arg-type]
        alignment_loss(log_probs, over=over, temperature=0.5).backward()  # type: ignore[arg-type]
        assert anchors.grad is not None and others.grad is not None
        found.append((anchors.grad, others.grad))
    for ours, exact in zip(found[1], found[0], strict=True):
        assert error(ours, exact) <= 1e-10


def test_nearest_anchor_by_hand() -> None:
    anchors = torch.tensor([[0.0, 0.0], [4.0, 0.0], [0.0, 3.0]])
    endpoint = torch.tensor([[1.9, 0.0], [2.1, 0.1], [0.0, 1.6], [-5.0, -5.0]])
    assert nearest_anchor(endpoint, anchors).tolist() == [0, 1, 2, 0]


def test_nearest_anchor_tells_close_anchors_apart() -> None:
    anchors = torch.tensor([[1000.0, 0.0], [1000.0, 1e-3]])
    assert nearest_anchor(anchors, anchors).tolist() == [0, 1]
