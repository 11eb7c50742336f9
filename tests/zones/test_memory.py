"""Nothing of size b × n × d, nor b × n: the largest tensor that forward and backward make."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lzn_dist.zones import align, alignment_loss, block, compute_latents
from tests.helpers.zone_cases import make

B, N, D, TILE = 96, 1024, 8, 1 << 13


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def largest(backend: str, solver: str, spread: float | None, scale: float = 1.0) -> int:
    batch = make(D, N, B, scale, spread=spread)
    anchors, others = batch.anchors.float().requires_grad_(), batch.others.float().requires_grad_()
    noise = batch.noise.float()
    with Largest() as mode:
        own = anchors[batch.index]
        z = compute_latents(own, noise, anchors, index=batch.index, solver=solver, backend=backend)  # type: ignore[arg-type]
        found = align(z, others, batch.index, backend=backend)  # type: ignore[arg-type]
        (alignment_loss(found.log_probs) + found.endpoint.sum()).backward()
    return mode.elements


@pytest.mark.parametrize(
    "solver,spread", [("euler", 0.5), ("euler", None), ("dpm_solver_pp", 0.5), ("dpm_solver_pp", None)]
)
def test_tiled_holds_one_tile(monkeypatch: pytest.MonkeyPatch, solver: str, spread: float | None) -> None:
    monkeypatch.setattr(block, "TILE_ELEMENTS", TILE)
    monkeypatch.setattr(block, "TILE_ROWS", 1)
    assert max(TILE, N * D) < B * N / 8
    assert largest("tiled", solver, spread) <= max(TILE, N * D)


@pytest.mark.parametrize("anchors,rows", [(64, 16384), (8192, 128), (65536, 128), (1 << 20, 16)])
def test_tiles_have_rows_enough_but_for_more_anchors_than_memory_is_for(anchors: int, rows: int) -> None:
    tiles = block.Block(torch.zeros(anchors, 1), torch.zeros(1)).tiles(10**6)
    assert next(tiles) == slice(0, rows) and next(tiles) == slice(rows, 2 * rows)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
def test_collapsed_anchors_take_a_list_of_pairs_at_most(monkeypatch: pytest.MonkeyPatch, solver: str) -> None:
    """All anchors within 10⁻⁴: every pair has weight at the first step, and is listed; still nothing of b × n × d."""
    monkeypatch.setattr(block, "TILE_ELEMENTS", TILE)
    monkeypatch.setattr(block, "TILE_ROWS", 1)
    assert largest("tiled", solver, 0.5, 1e-5) <= B * N


def test_plain_holds_everything() -> None:
    """The measure sees what it should."""
    assert largest("plain", "euler", 0.5) >= B * N * D
