"""Samples that see a reference set and themselves alone: against the definition, one by one, in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lzn_dist.zones import compute_latents, latents_beside


def made(n: int, b: int, d: int, scale: float, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(n + b)
    reference = torch.randn(n, d, generator=g, dtype=torch.float64) * scale
    near = reference[torch.randint(n, (b,), generator=g)]
    anchors = near + 0.3 * scale * torch.randn(b, d, generator=g, dtype=torch.float64)
    anchors[0] = reference[0]  # one that is in the reference itself
    anchors[-1] *= 10.0  # and one far from all
    return anchors.to(dtype), torch.randn(b, d, generator=g, dtype=torch.float64).to(dtype), reference.to(dtype)


def one_by_one(anchors: Tensor, noise: Tensor, reference: Tensor, solver: str) -> Tensor:
    last = torch.tensor([len(reference)])
    rows = [
        compute_latents(
            anchors[i : i + 1], noise[i : i + 1], torch.cat((reference, anchors[i : i + 1])), index=last,
            solver=solver, backend="plain" if solver != "dopri5" else "tiled",  # type: ignore[arg-type]
        )
        for i in range(len(anchors))
    ]  # fmt: skip
    return torch.cat(rows)


@pytest.mark.parametrize(
    ("n", "b", "d", "scale", "solver"),
    [
        (50, 12, 8, 1.0, "euler"), (50, 12, 8, 1.0, "dpm_solver_pp"), (1, 3, 4, 1.0, "euler"),
        (1, 3, 4, 1.0, "dpm_solver_pp"), (30, 40, 16, 5.0, "euler"), (30, 40, 16, 5.0, "dpm_solver_pp"),
        (5, 3, 4, 1.0, "dopri5"),
    ],
)  # fmt: skip
def test_equals_the_definition_over_the_reference_and_itself(n: int, b: int, d: int, scale: float, solver: str) -> None:
    given = made(n, b, d, scale)
    found = latents_beside(*given, solver=solver)  # type: ignore[arg-type]
    torch.testing.assert_close(found, one_by_one(*given, solver), rtol=1e-8, atol=1e-8)


def test_does_not_depend_on_what_else_is_asked() -> None:
    anchors, noise, reference = made(50, 12, 8, 1.0)
    whole = latents_beside(anchors, noise, reference)
    parts = [latents_beside(anchors[i : i + 5], noise[i : i + 5], reference) for i in (0, 5, 10)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-13)
    together = compute_latents(anchors, noise, torch.cat((reference, anchors)), index=torch.arange(50, 62))
    assert (together - whole).abs().max() > 0.01
    assert latents_beside(anchors[:0], noise[:0], reference).shape == (0, 8)


def test_float32_is_near_float64() -> None:
    anchors, noise, reference = made(200, 40, 32, 1.0)
    exact = latents_beside(anchors, noise, reference)
    found = latents_beside(anchors.float(), noise.float(), reference.float())
    assert (found.double() - exact).abs().max() < 1e-5


def test_an_empty_reference_is_refused() -> None:
    anchors, noise, reference = made(5, 3, 4, 1.0)
    with pytest.raises(ValueError, match="reference is empty"):
        latents_beside(anchors, noise, reference[:0])
    with pytest.raises(ValueError, match="reference"):
        latents_beside(anchors, noise, reference[:, :2])
