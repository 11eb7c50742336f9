import pytest
import torch

from lzn_dist.flow import interpolate, loss, times


def test_path_ends_at_noise_and_data() -> None:
    x_0, x_1 = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    assert torch.equal(interpolate(x_0, x_1, torch.zeros(3)).x_t, x_0)
    assert torch.equal(interpolate(x_0, x_1, torch.ones(3)).x_t, x_1)


def test_velocity_is_the_paths_derivative_sample_by_sample() -> None:
    x_0, x_1 = torch.randn(3, 5, dtype=torch.float64), torch.randn(3, 5, dtype=torch.float64)
    t, h = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64), 1e-6
    point = interpolate(x_0, x_1, t)
    difference = (interpolate(x_0, x_1, t + h).x_t - interpolate(x_0, x_1, t - h).x_t) / (2 * h)
    torch.testing.assert_close(point.dx_t, difference, rtol=0, atol=1e-8)
    torch.testing.assert_close(point.x_t[1], 0.5 * (x_0[1] + x_1[1]))


def test_loss_is_least_at_the_conditional_mean_of_gaussian_data() -> None:
    """x_1 = m + s z: E[dx_t | x_t] is linear in x_t, and its loss is the conditional variance s² / (t²s² + (1−t)²)."""
    torch.manual_seed(0)
    n, m, s = 400_000, 0.7, 0.5
    x_0, x_1 = torch.randn(n, 1), m + s * torch.randn(n, 1)
    t = torch.full((n,), 0.6)
    point = interpolate(x_0, x_1, t)
    variance = 0.6**2 * s**2 + 0.4**2
    exact = m + (0.6 * s**2 - 0.4) / variance * (point.x_t - 0.6 * m)
    assert loss(exact, point).item() == pytest.approx(s**2 / variance, rel=0.02)
    assert loss(exact, point) < loss(exact + 0.05, point)
    assert loss(exact, point) < loss(exact * 1.1, point)


def test_times_cover_t_min_to_one() -> None:
    t = times(torch.tensor([0.0, 0.5, 1.0]), 1e-3)
    torch.testing.assert_close(t, torch.tensor([1e-3, 0.5005, 1.0]))


def test_shapes_that_would_broadcast_are_refused() -> None:
    with pytest.raises(ValueError, match="one shape"):
        interpolate(torch.zeros(1, 2), torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="one shape"):
        interpolate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3, 1))
    point = interpolate(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(ValueError, match="velocity"):
        loss(torch.zeros(3, 1), point)
