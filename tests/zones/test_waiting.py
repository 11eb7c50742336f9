"""How often a trajectory waits for its device: once forward, if it starts at anchors, and once backward.

Counted on the CPU, over the path that a GPU takes (no lists of settled rows, no reading of arguments' values): through
`trajectory.to_host`, and with a mode that sees the operators that would wait.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lzn_dist.zones import align, alignment, alignment_loss, compute_latents, latents, trajectory
from tests.helpers.zone_cases import make

WAIT = {"_local_scalar_dense", "nonzero", "is_nonzero", "masked_select", "_unique2", "unique_dim", "equal", "bincount"}


class Waits(TorchDispatchMode):
    """Names of the operators that would wait, as they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        by_mask = name in ("index", "index_put", "index_put_") and any(
            one is not None and one.dtype == torch.bool for one in args[1]
        )
        if name in WAIT or by_mask:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def hosted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Elements of each transfer to the host. What is decided there, on the CPU, is not counted."""
    sizes: list[int] = []

    def outside(function: Any, counted: bool) -> Any:
        def call(*args: Any) -> Any:
            if counted:
                sizes.append(args[0].numel())
            with _disable_current_modes():
                return function(*args)

        return call

    monkeypatch.setattr(trajectory, "to_host", outside(trajectory.to_host, True))
    monkeypatch.setattr(trajectory, "_lists", outside(trajectory._lists, False))
    for module in (latents, alignment):
        monkeypatch.setattr(module, "check_index", lambda *_: None)  # on a GPU the device asserts, later
    return sizes


@pytest.mark.parametrize("grouped", [False, True])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_once_forward_and_once_backward(solver: Any, grouped: bool, hosted: list[int]) -> None:
    batch = make(16, 150, 40, 0.5, spread=1.0)
    weights = torch.linspace(-1, 1, 150, dtype=torch.float64) if grouped else None
    groups = torch.arange(150) // 3 if grouped else None
    anchors, others = batch.anchors.requires_grad_(), batch.others.requires_grad_()
    with Waits() as mode:
        found = compute_latents(
            anchors[batch.index], batch.noise, anchors, index=batch.index, solver=solver, log_weights=weights
        )
        assert hosted == [40]
        log_probs = align(found, others, batch.index, log_weights=weights, groups=groups).log_probs
        assert hosted == [40]
        alignment_loss(log_probs).backward()
    assert hosted == [40, 40, 40]
    assert mode.found == []
    assert anchors.grad is not None and bool(anchors.grad.any())


def test_the_mode_sees_what_waits() -> None:
    x = torch.arange(4.0)
    with Waits() as mode:
        float(x.sum())
        x[x > 1]
        (x > 1).nonzero()
    assert mode.found == ["_local_scalar_dense", "index", "nonzero"]
