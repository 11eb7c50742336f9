import math

import numpy as np
import pytest
import torch

from lzn_dist.evaluation.zone_health import assignment_entropy, gaussianity, zone_health
from lzn_dist.zones import compute_latents


def normal(n: int, d: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(n, d))


def anchors_and_noise(
    n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Anchors on the sphere of radius √d, and noise that is not refused itself."""
    generator = torch.Generator().manual_seed(seed)
    points = torch.nn.functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64)) * math.sqrt(d)
    return points.to(dtype), torch.randn(n, d, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("d", [1, 3, 64])
def test_normal_draws_are_not_refused(d: int) -> None:
    values = [gaussianity(normal(400, d, seed))["normality_p"] for seed in range(40)]
    assert sum(p < 0.05 for p in values) <= 6  # 2 expected; more than 6 has a chance of 0.3 %
    assert min(values) > 1e-4 and np.median(values) > 0.25


@pytest.mark.parametrize("kind", ["shifted", "wide", "narrow", "heavy", "heavy together", "two modes", "folded"])
def test_other_draws_are_refused(kind: str) -> None:
    z = normal(400, 16)
    random = np.random.default_rng(1)
    other = {
        "shifted": z + 0.5,
        "wide": 1.2 * z,
        "narrow": 0.8 * z,
        "heavy": random.standard_t(3, size=z.shape) / math.sqrt(3),  # variance 1, in each dimension alone
        "heavy together": z * np.sqrt(3 / random.chisquare(5, size=(400, 1))),  # a multivariate t, variance 1
        "folded": np.abs(z),  # with the norms of normal draws
        "two modes": np.concatenate([z[:200] + 1.0, z[200:] - 1.0]),
    }[kind]
    assert gaussianity(other)["normality_p"] < 1e-4


def test_gaussianity_in_closed_form() -> None:
    corners = np.array([[1.0, 1], [1, -1], [-1, 1], [-1, -1]])
    found = gaussianity(corners + np.array([0.25, -2.0]))
    assert found["mean"] == 2.0 and found["variance"] == 1.0
    assert found["correlation"] == 0.0 and found["kurtosis"] == pytest.approx(-2.0)
    line = normal(50, 1) @ [[1.0, -3.0, 2.0]]
    assert gaussianity(line)["correlation"] == pytest.approx(1.0)
    assert gaussianity(line)["variance"] == pytest.approx(line.var(0).mean())


def test_gaussianity_refuses() -> None:
    for wrong in (normal(1, 3), np.full((5, 3), np.nan), normal(5, 3)[0]):
        with pytest.raises(ValueError, match="latents must be finite"):
            gaussianity(wrong)


def test_one_anchor_or_far_ones_leave_no_doubt_and_equal_ones_all() -> None:
    latents = torch.from_numpy(normal(30, 8))
    targets = torch.zeros(30, dtype=torch.int64)
    assert assignment_entropy(latents, latents[:1], targets).abs().max() == 0.0
    far = 100.0 * torch.eye(8, dtype=torch.float64)
    assert assignment_entropy(latents, far, targets).max() < 1e-9
    same = torch.full((6, 8), 3.0, dtype=torch.float64)
    torch.testing.assert_close(assignment_entropy(latents, same, targets), torch.full((30,), math.log(6)).double())


def test_entropy_equals_the_flow_by_hand() -> None:
    anchors, latents = anchors_and_noise(12, 4)
    anchors = 0.3 * anchors
    steps = 7
    found = assignment_entropy(latents, anchors, torch.arange(12), steps=steps)
    assert 0.05 < found.mean() < 0.95 * math.log(12)
    for start, entropy in zip(latents.numpy(), found.tolist(), strict=True):
        x, sigma = start.copy(), 1.0
        for _ in range(steps):
            p = np.exp(-0.5 * np.square((x - (1 - sigma) * anchors.numpy()) / sigma).sum(1))
            p /= p.sum()
            x = x - (x - p @ anchors.numpy()) / sigma / steps
            sigma -= 1 / steps
        assert entropy == pytest.approx(-sum(q * math.log(q) for q in p if q > 0), abs=1e-9)


def test_entropy_does_not_hang_on_the_reference() -> None:
    anchors, latents = anchors_and_noise(40, 8, torch.float32)
    own = assignment_entropy(latents, 0.2 * anchors, torch.arange(40))
    other = assignment_entropy(latents, 0.2 * anchors, (torch.arange(40) + 7) % 40)
    torch.testing.assert_close(own, other, rtol=1e-3, atol=1e-4)
    with pytest.raises(ValueError, match="targets"):
        assignment_entropy(latents, anchors, torch.full((40,), 40))


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp", "dopri5"])
def test_zone_health_of_separate_anchors(solver) -> None:  # type: ignore[no-untyped-def]
    anchors, noise = anchors_and_noise(200, 16, torch.float32)
    found = zone_health(anchors, noise, solver=solver, steps=20)
    assert set(found) == {
        f"zones.{key}"
        for key in ("entropy", "effective_anchors", "mean", "variance", "correlation", "kurtosis", "normality_p",
                    "solver_error")
    }  # fmt: skip
    assert all(type(value) is float and math.isfinite(value) for value in found.values())
    assert found["zones.effective_anchors"] == pytest.approx(math.exp(found["zones.entropy"]))
    assert found["zones.effective_anchors"] < 1.05
    coarse, fine = (
        compute_latents(anchors.double(), noise.double(), solver=solver, steps=steps, backend="plain")
        for steps in (20, 80)
    )
    error = np.linalg.norm(coarse - fine) / np.linalg.norm(fine)
    assert found["zones.solver_error"] == pytest.approx(error, rel=1e-2, abs=1e-4)
    assert found["zones.variance"] == pytest.approx(coarse.var(0, correction=0).mean().item(), rel=1e-3)
    assert (found["zones.solver_error"] == 0.0) == (solver == "dopri5")


def test_zone_health_sees_collapse_and_scaled_noise() -> None:
    anchors, noise = anchors_and_noise(100, 8)
    collapsed = zone_health(torch.ones_like(anchors), noise)
    assert collapsed["zones.effective_anchors"] == pytest.approx(100)
    finer = [zone_health(anchors, noise, steps=steps)["zones.solver_error"] for steps in (5, 20, 80)]
    assert finer[0] > 2 * finer[1] > 4 * finer[2] > 0
    accurate = zone_health(anchors, noise, steps=200)
    scaled = zone_health(anchors, 0.2 * noise, steps=200)
    assert accurate["zones.normality_p"] > 0.05 > 1e-4 > scaled["zones.normality_p"]
    with pytest.raises(ValueError, match="solver"):
        zone_health(anchors, noise, solver="heun")  # type: ignore[arg-type]
