"""One in several states kept between forward and backward: the same digits from less memory."""

from __future__ import annotations

import gc

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from lzn_dist.zones import align, compute_latents
from tests.helpers.zone_cases import make, run


@pytest.mark.parametrize("store_every", [2, 3, 7, 20, 100])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("spread", [0.5, None], ids=["aligned", "unaligned"])
def test_every_digit_is_the_same(spread: float | None, solver: str, store_every: int) -> None:
    """Near anchors at the first step, and more than 192 of them: rows that settle."""
    batch = make(16, 200, 64, 1.0, spread=spread, near=True)
    expected = run(batch, backend="tiled", solver=solver)
    found = run(batch, backend="tiled", solver=solver, store_every=store_every)
    assert float(expected["grad_others"].norm()) > 0
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@pytest.mark.parametrize("steps", [1, 2, 3, 9])
@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_few_steps_and_cotangents_everywhere(solver: str, steps: int) -> None:
    batch = make(16, 40, 24, 1.0, near=True)
    expected = run(batch, backend="tiled", solver=solver, steps=steps, dense=True, dtype=torch.float32)
    for store_every in (2, 4):
        found = run(
            batch, backend="tiled", solver=solver, steps=steps, dense=True, dtype=torch.float32, store_every=store_every
        )
        for name, value in expected.items():
            assert torch.equal(found[name], value), name


def held() -> int:
    """Bytes of all tensors that Python knows; of those saved for a backward too, under hooks that change nothing.

    Subclasses are left out: a compilation elsewhere in this process leaves fake tensors, which have no memory.
    """
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) in (Tensor, torch.nn.Parameter)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())


@pytest.mark.slow
@pytest.mark.parametrize("solver,states", [("euler", 4), ("dpm_solver_pp", 4 + 3 * 2)])
def test_fewer_states_are_held_until_the_backward(solver: str, states: int) -> None:
    b, d, steps = 256, 32, 20
    batch = make(d, 256, b, 1.0)
    anchors, others = batch.anchors.float().requires_grad_(), batch.others.float().requires_grad_()
    noise = batch.noise.float()

    def bytes_held(store_every: int) -> tuple[int, int]:
        with saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor):
            before = held()
            z = compute_latents(anchors, noise, solver=solver, steps=steps, store_every=store_every)  # type: ignore[arg-type]
            between = held()
            found = align(z, others, batch.index, steps=steps, store_every=store_every)
            after = held()
        del z, found
        return between - before, after - between

    one = b * d * 4
    latents, alignment = bytes_held(1)
    assert latents >= steps * one and alignment >= steps * one
    fewer = bytes_held(5)
    # the first state is an input, and held anyway
    assert latents - fewer[0] == (steps - states) * one
    assert alignment - fewer[1] == (steps - 4) * one


@pytest.mark.parametrize("store_every", [0, -1, 2.0, True])
def test_refused_by_name(store_every: object) -> None:
    x = torch.zeros(4, 3)
    with pytest.raises(ValueError, match=r"^store_every\b"):
        compute_latents(x, x, store_every=store_every)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^store_every\b"):
        align(x, x, torch.arange(4), store_every=store_every)  # type: ignore[arg-type]
