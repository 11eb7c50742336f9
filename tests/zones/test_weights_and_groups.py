"""Anchors with log-weights, some absent, and targets that are a whole group: against the plain twins, in float64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from lzn_dist.zones import align, alignment_loss, compute_latents
from tests.helpers.zone_cases import Batch, assert_equal, error, make, run
from tests.zones.test_field import across, split


def weights_of(n: int, present: Tensor, absent: int) -> Tensor:
    """N(0, 1), −inf for some anchors that are no samples."""
    g = torch.Generator().manual_seed(3)
    weights = torch.randn(n, generator=g, dtype=torch.float64)
    others = [j for j in torch.randperm(n, generator=g).tolist() if j not in set(present.tolist())]
    weights[others[:absent]] = -math.inf
    return weights


def groups_of(n: int, size: int) -> Tensor:
    """Captions of which about `size` are equal, their numbers far apart."""
    return torch.randint(max(1, n // size), (n,), generator=torch.Generator().manual_seed(4)) * 1000 - 7


CASES: dict[str, dict[str, Any]] = {
    "latents weighted": {"anchor": True},
    "targets weighted": {"other": True},
    "groups": {"size": 4},
    "groups and weights": {"anchor": True, "other": True, "size": 4},
}


def options(batch: Batch, anchor: bool = False, other: bool = False, size: int = 0) -> dict[str, Any]:
    n = len(batch.anchors)
    weights = weights_of(n, batch.index, n // 5)
    return {
        "anchor_weights": weights if anchor else None, "log_weights": weights if other else None,
        "groups": groups_of(n, size) if size else None,
    }  # fmt: skip


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("blocks", [(), (40, 20), (1, 30, 0, 29)], ids=["one", "two", "uneven"])
@pytest.mark.parametrize("case", CASES)
def test_equal_the_definition(case: str, blocks: tuple[int, ...], solver: str) -> None:
    batch = across(make(16, 60, 30, 1.0, spread=None), 40)
    given = options(batch, **CASES[case])
    field = {"field": split(*blocks)} if blocks else {}
    expected = run(batch, backend="plain", solver=solver, **given)
    assert_equal(run(batch, backend="tiled", solver=solver, **given, **field), expected, 1e-10)
    expected = run(batch, backend="relative", solver=solver, steps=10, dense=True, **given)
    found = run(batch, backend="tiled", solver=solver, steps=10, dense=True, store_every=3, **given, **field)
    assert_equal(found, expected, 1e-10)


@pytest.mark.parametrize("blocks", [(), (70, 130)], ids=["one", "two"])
@pytest.mark.parametrize("spread", [0.5, None], ids=["aligned", "unaligned"])
def test_settled_rows_know_whether_their_partner_is_of_the_group(spread: float | None, blocks: tuple[int, ...]) -> None:
    batch = make(16, 200, 64, 2.0, spread=spread)
    given = options(batch, size=3)
    field = {"field": split(*blocks)} if blocks else {}
    assert_equal(run(batch, backend="tiled", **given, **field), run(batch, backend="plain", **given), 1e-10)
    expected = run(batch, backend="relative", steps=10, dense=True, **given)
    assert_equal(run(batch, backend="tiled", steps=10, dense=True, **given, **field), expected, 1e-10)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_float32_is_close_to_float64(case: str, scale: float) -> None:
    batch = make(64, 200, 40, scale, spread=1.0)
    given = options(batch, **CASES[case])
    expected, found = run(batch, backend="tiled", **given), run(batch, backend="tiled", dtype=torch.float32, **given)
    for name in expected:
        assert error(found[name], expected[name]) <= (1e-3 if name.startswith("grad") else 1e-4), name


@pytest.mark.parametrize("backend", ["tiled", "plain"])
def test_a_sample_without_an_anchor_is_felt_by_nobody(backend: Any) -> None:
    """As if its row were not there; its latent is its noise, and neither has a gradient from it."""
    batch = make(8, 12, 12, 1.0)
    weights = torch.zeros(12, dtype=torch.float64)
    gone = torch.tensor([0, 5, 6])
    weights[gone] = -math.inf
    left = torch.tensor([i for i in range(12) if i not in gone.tolist()])
    anchors = batch.anchors.clone().requires_grad_()
    latents = compute_latents(anchors, batch.noise, log_weights=weights, backend=backend)
    alone = batch.anchors[left].requires_grad_()
    expected = compute_latents(alone, batch.noise[left], backend="plain")
    torch.testing.assert_close(latents[left], expected, rtol=1e-9, atol=1e-9)
    assert torch.equal(latents[gone], batch.noise[gone])
    direction = torch.randn(12, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    (latents * direction).sum().backward()
    (expected * direction[left]).sum().backward()
    assert anchors.grad is not None and alone.grad is not None
    torch.testing.assert_close(anchors.grad[left], alone.grad, rtol=1e-8, atol=1e-8)
    assert not anchors.grad[gone].any()


@pytest.mark.parametrize("backend", ["tiled", "plain"])
@pytest.mark.parametrize("grouped", [False, True])
def test_an_absent_target_has_no_weight_but_its_groups(grouped: bool, backend: Any) -> None:
    batch = make(8, 12, 12, 1.0)
    weights = torch.zeros(12, dtype=torch.float64)
    weights[:2] = -math.inf
    groups = torch.tensor([0, 1, 0, 3, 4, 5, 6, 7, 8, 9, 10, 11]) if grouped else None
    found = align(batch.noise, batch.others, batch.index, log_weights=weights, groups=groups, backend=backend)
    assert found.log_probs[:, 1].isneginf().all() and found.log_probs[:, 2:].isfinite().all()
    if grouped:  # anchor 2 is of the first one's group
        alone = align(batch.noise[:1], batch.others[2:], torch.zeros(1, dtype=torch.int64), backend="plain")
        torch.testing.assert_close(found.log_probs[:, :1], alone.log_probs, rtol=1e-7, atol=1e-8)
    else:
        assert found.log_probs[:, 0].isneginf().all()


def test_a_group_that_is_far_from_certain_keeps_its_digits() -> None:
    """Weights of e⁻¹⁰⁰⁰ and of 1 − 10⁻²⁰, both with a loss and a gradient."""
    anchors = torch.tensor([[0.0], [0.1], [60.0], [60.1]], dtype=torch.float64)
    groups, start = torch.tensor([0, 0, 1, 1]), torch.tensor([[3.0], [-3.0]], dtype=torch.float64)
    for backend in ("tiled", "plain"):
        points = start.clone().requires_grad_()
        found = align(points, anchors, torch.tensor([0, 0]), groups=groups, backend=backend)  # type: ignore[arg-type]
        assert found.log_probs[-1, 0] < -1000 and -1e-15 <= found.log_probs[-1, 1] <= 0
        found.log_probs.sum().backward()
        if backend == "tiled":
            tiled, gradient = found.log_probs.detach(), points.grad
    torch.testing.assert_close(tiled, found.log_probs.detach(), rtol=1e-9, atol=1e-14)
    torch.testing.assert_close(gradient, points.grad, rtol=1e-9, atol=1e-12)


def test_dopri5_knows_log_weights() -> None:
    batch = make(4, 10, 10, 1.0)
    weights = torch.linspace(-1, 1, 10, dtype=torch.float64)
    weights[3] = -math.inf
    fine = compute_latents(batch.anchors, batch.noise, log_weights=weights, solver="dopri5")
    euler = compute_latents(batch.anchors, batch.noise, log_weights=weights, steps=4000)
    assert error(fine, euler) < 2e-3


def test_refused_by_name() -> None:
    x, index = torch.eye(3), torch.arange(3)
    for groups in (torch.zeros(3), torch.zeros(4, dtype=torch.int64)):
        with pytest.raises(ValueError, match=r"^groups must be int64 \[3\]"):
            align(x, x, index, groups=groups)
    with pytest.raises(ValueError, match=r"^log_weights must be floating point \[3\]"):
        compute_latents(x, x, log_weights=torch.zeros(2))
    assert alignment_loss(align(x, x, index, groups=torch.zeros(3, dtype=torch.int64)).log_probs) == 0
