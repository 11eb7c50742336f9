"""The field as a value: anchors that come in several blocks are the same field, in one process here."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import Tensor

from lzn_dist.zones import AnchorField, align, compute_latents
from lzn_dist.zones import block as block_module
from lzn_dist.zones.block import AnchorGradient, Block
from tests.helpers.zone_cases import Batch, assert_equal, error, make, run


def split(*sizes: int) -> Callable[[Tensor, Tensor | None, Tensor | None, str], AnchorField]:
    """A factory of fields whose anchors come in blocks of these sizes."""

    class Split(AnchorField):
        def __init__(self, anchors: Tensor, log_weights: Tensor | None, groups: Tensor | None, backend: str) -> None:
            assert sum(sizes) == len(anchors)
            super().__init__(anchors, log_weights, groups, backend, centre=anchors.mean(0), count=len(anchors))

        def parts(self) -> Iterator[Block]:
            start = 0
            for size in sizes:
                here, whole = slice(start, start + size), self.block
                weights = None if whole.log_weights is None else whole.log_weights[here]
                groups = None if whole.groups is None else whole.groups[here]
                yield type(whole)(whole.raw[here], self.centre, start, weights, groups, whole=False)
                start += size

        def blocks(self) -> Iterator[Block]:
            return self.parts()

        def gradient_blocks(self, into: AnchorGradient) -> Iterator[tuple[Block, AnchorGradient]]:
            for block in self.parts():
                gradient = AnchorGradient(block.raw)
                yield block, gradient
                rows = slice(block.start, block.start + len(block))
                into.anchors[rows] += gradient.anchors
                into.radial[rows] += gradient.radial

    return Split


def across(batch: Batch, first: int) -> Batch:
    """Let one exact and one near duplicate stand on either side of row first."""
    batch.anchors[first] = batch.anchors[first - 1]
    step = torch.zeros_like(batch.anchors[0])
    step[:2] = torch.tensor([6e-7, 8e-7], dtype=torch.float64)
    batch.anchors[first + 1] = batch.anchors[first - 2] + step
    return batch


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("spread", [0.5, None], ids=["aligned", "unaligned"])
@pytest.mark.parametrize("sizes", [(40, 20), (1, 30, 0, 29), (0, 60)])
def test_blocks_equal_plain(sizes: tuple[int, ...], spread: float | None, solver: str) -> None:
    batch = across(make(16, 60, 60, 1.0, spread=spread), 40)
    expected = run(batch, backend="plain", solver=solver)
    assert_equal(run(batch, backend="tiled", solver=solver, field=split(*sizes)), expected, 1e-10)
    expected = run(batch, backend="relative", solver=solver, steps=10, dense=True)
    assert_equal(run(batch, backend="tiled", solver=solver, steps=10, dense=True, field=split(*sizes)), expected, 1e-10)


@pytest.mark.parametrize("spread", [0.5, None], ids=["aligned", "unaligned"])
def test_settled_rows_follow_a_partner_of_another_block(spread: float | None) -> None:
    batch = make(16, 200, 64, 2.0, spread=spread)
    found = run(batch, backend="tiled", field=split(70, 1, 129))
    assert_equal(found, run(batch, backend="plain"), 1e-10)
    found = run(batch, backend="tiled", steps=10, dense=True, field=split(70, 1, 129))
    assert_equal(found, run(batch, backend="relative", steps=10, dense=True), 1e-10)


@pytest.mark.parametrize("elements", [1, 100])
def test_tiles_of_blocks(monkeypatch: pytest.MonkeyPatch, elements: int) -> None:
    batch = across(make(16, 47, 23, 0.1), 30)
    expected = run(batch, backend="plain")
    monkeypatch.setattr(block_module, "TILE_ELEMENTS", elements)
    monkeypatch.setattr(block_module, "TILE_ROWS", 1)
    assert_equal(run(batch, backend="tiled", field=split(30, 17)), expected, 1e-10)


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("scale", [0.1, 1.0])
def test_float32_in_blocks_is_close_to_float64(scale: float, solver: str) -> None:
    batch = make(256, 200, 40, scale, spread=1.0)
    expected = run(batch, backend="tiled", solver=solver)
    found = run(batch, backend="tiled", solver=solver, dtype=torch.float32, field=split(90, 10, 100))
    for name in expected:
        assert error(found[name], expected[name]) <= (1e-3 if name.startswith("grad") else 1e-4), name


def test_the_default_is_the_anchors_as_one_block() -> None:
    batch = make(16, 40, 40, 1.0, near=True)
    default, named = run(batch, backend="auto"), run(batch, backend="auto", field=AnchorField)
    assert all(torch.equal(value, named[name]) for name, value in default.items())


def test_what_needs_all_anchors_takes_no_field() -> None:
    x = torch.zeros(4, 3)
    for arguments in ({"solver": "dopri5"}, {"backend": "plain"}):
        with pytest.raises(ValueError, match=rf"^{next(iter(arguments))}\b.*field"):
            compute_latents(x, x, field=AnchorField, **arguments)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^backend\b.*field"):
        align(x, x, torch.arange(4), backend="plain", field=AnchorField)


class Share(AnchorField):
    """Four anchors that start at number 5, of nine."""

    def __init__(self, anchors: Tensor, log_weights: Tensor | None, groups: Tensor | None, backend: str) -> None:
        super().__init__(anchors, log_weights, groups, backend, centre=anchors.mean(0), start=5, count=9)


def test_targets_are_held_here_and_an_index_counts_everywhere() -> None:
    x = torch.eye(4)
    compute_latents(x, x, index=torch.tensor([5, 6, 7, 8]), field=Share)
    with pytest.raises(ValueError, match=r"^index must lie in 0\.\.8, got 5\.\.9"):
        compute_latents(x, x, index=torch.tensor([5, 6, 7, 9]), field=Share)
    assert torch.isfinite(align(x, x, torch.tensor([5, 6, 7, 8]), field=Share).log_probs).all()
    with pytest.raises(
        ValueError, match=r"^targets must lie in 5\.\.8, the anchors that this process holds, got 4\.\."
    ):
        align(x, x, torch.tensor([4, 6, 7, 8]), field=Share)
