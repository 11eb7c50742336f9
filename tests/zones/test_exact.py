"""The tiled flow against its plain twin in float64, and float32 against float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lzn_dist.zones import align, alignment_loss, compute_latents, nearest_anchor
from lzn_dist.zones import velocity as velocity_module


def rel(value: Tensor, expected: Tensor, floor: float = 0.0) -> float:
    return float((value.double() - expected).norm() / max(float(expected.norm()), floor, 1e-300))


def problem(n: int, b: int, d: int, scale: float, *, duplicates: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors of two views [n, d], noise [b, d]; values that float32 holds exactly."""
    g = torch.Generator().manual_seed(n + d)
    first = scale * torch.randn(n, d, generator=g)
    second = first + 0.5 * scale * torch.randn(n, d, generator=g)
    first, second = first.double(), second.double()
    if duplicates and n > 8:
        first[5] = first[3]
        first[7] = first[1] + 1e-6 * torch.nn.functional.normalize(torch.randn(d, generator=g), dim=0)
    return first, second, 0.45 * torch.randn(b, d, generator=g).double()


def run(
    first: Tensor, second: Tensor, noise: Tensor, dtype: torch.dtype, backend: str, solver: str, steps: int,
    log_weights: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    index = torch.arange(len(noise)) % len(first)
    # The alignment starts from given latents: through the latents its gradients would measure how far the problem
    # amplifies the plain twin's own rounding (1e-12, from dividing by σ = 1e-4), not whether the two are equal.
    start = compute_latents(first[index], noise, first, index=index, steps=steps)
    a, v, e, z = (t.to(dtype).detach().clone().requires_grad_() for t in (first, second, noise, start))
    latents = compute_latents(a[index], e, a, index=index, solver=solver, steps=steps, backend=backend)  # type: ignore[arg-type]
    (latents * torch.sin(torch.arange(latents.numel())).reshape(latents.shape).to(dtype)).sum().backward()
    result = align(z, v, index, steps=steps, backend=backend, log_weights=log_weights)  # type: ignore[arg-type]
    loss = alignment_loss(result.log_probs)
    (loss + 0.1 * result.endpoint.square().mean()).backward()
    grads = {"first": a.grad, "noise": e.grad, "second": v.grad, "start": z.grad}
    values = {"latents": latents, "log_probs": result.log_probs, "loss": loss, "endpoint": result.endpoint}
    assert all(g is not None for g in grads.values())
    return {k: t.detach() for k, t in {**values, **grads}.items() if t is not None}


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize(
    ("n", "b", "d", "steps"), [(64, 64, 16, 20), (97, 41, 32, 7), (256, 48, 256, 20), (9, 13, 16, 5)]
)
def test_float64_equals_the_plain_twin(
    n: int, b: int, d: int, steps: int, solver: str, scale: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(velocity_module, "TILE_ELEMENTS", 13 * n + 5)  # uneven tiles
    data = problem(n, b, d, scale)
    plain = run(*data, torch.float64, "plain", solver, steps)
    tiled = run(*data, torch.float64, "tiled", solver, steps)
    for name, expected in plain.items():
        assert rel(tiled[name], expected, floor=1e-3) <= 1e-10, name


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_float64_at_scale_ten(solver: str) -> None:
    data = problem(128, 32, 32, 10.0, duplicates=False)
    plain = run(*data, torch.float64, "plain", solver, 20)
    tiled = run(*data, torch.float64, "tiled", solver, 20)
    for name in ("latents", "loss", "log_probs", "endpoint"):
        assert rel(tiled[name], plain[name]) <= 1e-8, name
    floor = max(float(plain[name].norm()) for name in ("first", "second", "noise", "start"))
    for name in ("first", "second", "noise", "start"):
        assert rel(tiled[name], plain[name], floor) <= 1e-8, name


@pytest.mark.parametrize("scale", [0.1, 1.0])
@pytest.mark.parametrize("steps", [20, 100])
def test_float32_is_close_to_float64(steps: int, scale: float) -> None:
    data = problem(256, 64, 256, scale, duplicates=False)
    exact = run(*data, torch.float64, "tiled", "euler", steps)
    single = run(*data, torch.float32, "tiled", "euler", steps)
    for name in ("latents", "log_probs", "loss"):
        assert rel(single[name], exact[name]) <= 1e-4, name
    for name in ("first", "second", "noise", "start"):
        assert rel(single[name], exact[name]) <= 1e-3, name


def test_float32_is_finite_where_the_published_form_is_not() -> None:
    data = problem(128, 32, 256, 10.0, duplicates=False)
    for name, value in run(*data, torch.float32, "tiled", "euler", 20).items():
        assert value.isfinite().all(), name
    # the published form exponentiates before it normalises
    first, second, noise = (t.float() for t in data)
    x = compute_latents(first[:32], noise, first)
    weights = torch.exp(-0.5 * ((x[:, None] - 0.5 * second[None]) / 0.5).square().sum(-1))
    assert not (weights / weights.sum(1, keepdim=True)).log().mean().isfinite()


def test_log_weights_with_an_absent_class() -> None:
    latents, anchors, _ = problem(10, 10, 16, 1.0)
    log_weights = torch.log_softmax(torch.linspace(-2, 0, 10).double(), 0)
    log_weights[4] = -torch.inf
    targets = torch.arange(10)
    results = [align(latents, anchors, targets, log_weights=log_weights, backend=b) for b in ("plain", "tiled")]  # type: ignore[arg-type]
    here = targets != 4
    assert rel(results[1].log_probs[:, here], results[0].log_probs[:, here]) <= 1e-10
    assert rel(results[1].endpoint, results[0].endpoint) <= 1e-10
    assert (results[1].log_probs[:, 4] == -torch.inf).all()


def test_gradients_by_finite_differences() -> None:
    first, second, noise = problem(6, 6, 3, 1.0, duplicates=False)
    first.requires_grad_()
    second.requires_grad_()
    assert torch.autograd.gradcheck(lambda a: compute_latents(a, noise, steps=4), first)
    assert torch.autograd.gradcheck(lambda v: align(noise, v, torch.arange(6), steps=4).log_probs, second)


def test_no_tensor_of_rows_times_anchors() -> None:
    from torch.utils._python_dispatch import TorchDispatchMode

    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for t in out if isinstance(out, tuple | list) else [out]:
                largest = max(largest, t.numel() if isinstance(t, Tensor) else 0)
            return out

    n, b, d = 2048, 1024, 16
    data = problem(n, b, d, 1.0)
    with Largest():
        run(*data, torch.float32, "tiled", "euler", 3)
    assert largest <= velocity_module.TILE_ELEMENTS < b * n


def test_one_anchor_round_trip_and_adaptive_solver() -> None:
    noise = torch.randn(4, 8, generator=torch.Generator().manual_seed(0)).double()
    lone = torch.ones(1, 8).double()
    assert torch.equal(compute_latents(lone.expand(4, 8), noise, lone, index=torch.zeros(4, dtype=torch.int64)), noise)
    # DPM-Solver++ ends at σ = 0.999: x = 0.001 a + 0.999 ε, whatever the steps
    expected = 1e-3 * lone + 0.999 * noise
    rows = torch.zeros(4, dtype=torch.int64)
    assert torch.allclose(
        compute_latents(lone.expand(4, 8), noise, lone, index=rows, solver="dpm_solver_pp", steps=5),
        expected,
        atol=1e-14,
    )
    anchors, _, noise = problem(40, 40, 16, 1.0, duplicates=False)
    latents = compute_latents(anchors, noise, steps=2000)
    back = align(latents, anchors, torch.arange(40), steps=2000)
    assert torch.equal(nearest_anchor(back.endpoint, anchors), torch.arange(40))
    adaptive = compute_latents(anchors.requires_grad_(), noise, solver="dopri5")
    assert rel(adaptive.detach(), latents) <= 1e-2
    adaptive.sum().backward()
    assert anchors.grad is not None and anchors.grad.norm() > 0


def test_losses_by_hand() -> None:
    log_probs = torch.tensor([[0.0, 0.0], [-1.0, -2.0], [-3.0, -0.5], [-4.0, -4.0], [-5.0, -5.0]])
    assert alignment_loss(log_probs).item() == pytest.approx((1.0 + 0.5) / 2)
    expected = -(torch.tensor(-1.0).exp() + torch.tensor(-0.5).exp()) / 2
    assert alignment_loss(log_probs, kind="probability").item() == pytest.approx(expected.item())


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"anchors": torch.zeros(3)}, "anchors"),
        ({"anchors": torch.zeros(3, 4).bfloat16()}, "anchors"),
        ({"noise": torch.zeros(2, 4)}, "noise"),
        ({"noise": torch.zeros(3, 4).double()}, "noise"),
        ({"all_anchors": torch.zeros(5, 3)}, "all_anchors"),
        ({"all_anchors": torch.zeros(2, 4)}, "all_anchors"),
        ({"index": torch.tensor([0, 1, 3])}, "index"),
        ({"index": torch.tensor([0.0, 1, 2])}, "index"),
        ({"steps": 0}, "steps"),
        ({"solver": "heun"}, "solver"),
        ({"backend": "magic"}, "backend"),
    ],
)
def test_bad_arguments_are_named(arguments: dict[str, object], name: str) -> None:
    good: dict[str, object] = {"anchors": torch.zeros(3, 4), "noise": torch.zeros(3, 4)}
    with pytest.raises(ValueError, match=name):
        compute_latents(**{**good, **arguments})  # type: ignore[arg-type]


def test_bad_alignment_arguments_are_named() -> None:
    x, targets = torch.zeros(3, 4), torch.arange(3)
    with pytest.raises(ValueError, match="targets"):
        align(x, torch.zeros(2, 4), targets)
    with pytest.raises(ValueError, match="latents"):
        align(x.int(), x, targets)
    with pytest.raises(ValueError, match="log_weights"):
        align(x, x, targets, log_weights=torch.zeros(2))
    with pytest.raises(ValueError, match="steps"):
        align(x, x, targets, steps=0)
    with pytest.raises(ValueError, match="cutoff"):
        alignment_loss(torch.zeros(4, 2), cutoff=1.0)
