import math

import pytest
import torch
from torch import Tensor

from lzn_dist.flow import invert, sample

M, S = 0.7, 0.5


def gaussian_velocity(t: Tensor, x: Tensor) -> Tensor:
    """Exact velocity for data N(M, S²): the conditional mean of x_1 − x_0, which carries N(0, 1) to N(M, S²)."""
    variance = t**2 * S**2 + (1 - t) ** 2
    return M + (t * S**2 - (1 - t)) / variance * (x - t * M)


def test_gaussian_data_in_closed_form() -> None:
    """The flow of a Gaussian path keeps (x − tM) / sqrt(t²S² + (1−t)²) constant."""
    x0 = torch.linspace(-3, 3, 11, dtype=torch.float64)[:, None]
    exact = M + S * x0
    solution = sample(gaussian_velocity, x0, method="dopri5", t_min=0.0, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(solution.x, exact, rtol=0, atol=1e-7)
    torch.testing.assert_close(sample(gaussian_velocity, x0, steps=2000, t_min=0.0).x, exact, rtol=0, atol=2e-3)


def test_t_min_is_where_the_walk_starts() -> None:
    seen: list[float] = []

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        seen.append(t.item())
        return torch.ones_like(x)

    x = sample(velocity, torch.zeros(2, 3, dtype=torch.float64), steps=4, t_min=0.2).x
    assert seen == pytest.approx([0.2, 0.4, 0.6, 0.8])
    torch.testing.assert_close(x, torch.full((2, 3), 0.8, dtype=torch.float64))
    seen.clear()
    invert(velocity, x, steps=4, t_min=0.2)
    assert seen == pytest.approx([1.0, 0.8, 0.6, 0.4])


def test_orders_of_convergence_on_a_linear_ode() -> None:
    x0 = torch.ones(1, 2, dtype=torch.float64)
    exact = math.exp(-1.0)

    def error(steps: int) -> float:
        x = sample(lambda t, x: -x, x0, steps=steps, t_min=0.0).x
        return (x - exact).abs().max().item()

    assert error(100) / error(200) == pytest.approx(2.0, rel=0.02)  # Euler: first order
    coarse, fine = (
        sample(lambda t, x: -x, x0, method="dopri5", t_min=0.0, rtol=tol, atol=tol) for tol in (1e-5, 1e-10)
    )
    assert (coarse.x - exact).abs().max() < 1e-4 and (fine.x - exact).abs().max() < 1e-9
    assert fine.nfe > coarse.nfe


def test_inversion_round_trip() -> None:
    x1 = torch.linspace(-1.5, 2.5, 6, dtype=torch.float64)[:, None]
    x0 = invert(gaussian_velocity, x1, method="dopri5", rtol=1e-9, atol=1e-9).x
    assert (x0 - x1).abs().max() > 0.1
    back = sample(gaussian_velocity, x0, method="dopri5", rtol=1e-9, atol=1e-9).x
    torch.testing.assert_close(back, x1, rtol=0, atol=1e-6)
    euler = sample(gaussian_velocity, invert(gaussian_velocity, x1, steps=1000).x, steps=1000).x
    torch.testing.assert_close(euler, x1, rtol=0, atol=2e-2)


@pytest.mark.parametrize("method", ["euler", "dopri5"])
def test_evaluations_are_counted(method: str) -> None:
    calls = 0

    def velocity(t: Tensor, x: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return gaussian_velocity(t, x)

    assert sample(velocity, torch.zeros(1, 1), method=method, steps=7).nfe == calls > 0  # type: ignore[arg-type]


def test_empty_batches_and_wrong_arguments() -> None:
    for method in ("euler", "dopri5"):
        assert sample(gaussian_velocity, torch.zeros(0, 1), method=method).x.shape == (0, 1)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="method"):
        sample(gaussian_velocity, torch.zeros(1, 1), method="rk")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="steps"):
        sample(gaussian_velocity, torch.zeros(1, 1), steps=0)
    with pytest.raises(ValueError, match="t_min"):
        sample(gaussian_velocity, torch.zeros(1, 1), t_min=1.0)
