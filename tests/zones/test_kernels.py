"""The kernels' logic, in Triton's interpreter on the CPU, against the plain twins; and that they compile for GPUs.

The interpreter runs one program after the other and multiplies with numpy: of exactness and races on a GPU this says
nothing (tests/gpu does).
"""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lzn_dist.zones import AnchorField, align, alignment_loss, compute_latents
from lzn_dist.zones import field as field_module
from lzn_dist.zones.block import Rows
from tests.helpers.zone_cases import Batch, assert_equal, error, make, run
from tests.zones.test_field import across, split
from tests.zones.test_weights_and_groups import CASES, options

pytestmark = [
    pytest.mark.slow,  # all of them together
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bash tests/gpu/run.sh runs them on it"),
]


@pytest.fixture(scope="module", autouse=True)
def interpreter() -> Any:
    """Kernels are interpreted if the variable is set where they are made; what else uses Triton must not be."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from lzn_dist.zones import kernels
    assert kernels.INTERPRETED
    return kernels


@pytest.mark.parametrize("solver", ["euler", "dpm_solver_pp"])
@pytest.mark.parametrize("dim,n,b", [(8, 35, 5), (20, 45, 33), (3, 1, 1)])
def test_equal_the_definition(dim: int, n: int, b: int, solver: str) -> None:
    """Sizes that fill no tile, and a single anchor."""
    batch = make(dim, n, b, 0.5, spread=1.0)
    dense = n > 1
    expected = run(batch, backend="relative", solver=solver, steps=4, dense=dense)
    assert_equal(run(batch, backend="triton", solver=solver, steps=4, dense=dense, store_every=2), expected, 1e-10)


@pytest.mark.parametrize("case", ["groups and weights", "targets weighted"])
def test_points_in_any_layout(case: str) -> None:
    """As they are, each a column of a wider matrix, transposed."""

    def turned(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        found = torch.stack((value, value), -1)[..., 0] if value.dim() == 1 else value.t().contiguous().t()
        assert not found.is_contiguous()
        return found

    batch = make(16, 40, 20, 1.0, spread=None)
    given = options(batch, **CASES[case])
    expected = run(batch, backend="triton", steps=3, dense=True, **given)
    moved = Batch(*(turned(value) for value in vars(batch).values()))
    given = {name: turned(value) for name, value in given.items()}
    assert_equal(run(moved, backend="triton", steps=3, dense=True, **given), expected, 1e-12)


@pytest.mark.parametrize("blocks", [(), (1, 24, 0, 15)], ids=["one", "several"])
@pytest.mark.parametrize("case", CASES)
def test_weights_groups_and_blocks(case: str, blocks: tuple[int, ...]) -> None:
    batch = across(make(16, 40, 20, 1.0, spread=None), 25)
    given = options(batch, **CASES[case])
    field = {"field": split(*blocks)} if blocks else {}
    expected = run(batch, backend="relative", steps=3, dense=True, **given)
    assert_equal(run(batch, backend="triton", steps=3, dense=True, **given, **field), expected, 1e-10)


@pytest.mark.parametrize("case", ["groups and weights", "targets weighted"])
def test_chunks_of_anchors(case: str, monkeypatch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Three of them, the last one shorter."""
    monkeypatch.setattr(interpreter, "CHUNK_TILES", 1)
    batch = make(16, 80, 10, 1.0, spread=None)
    given = options(batch, **CASES[case])
    expected = run(batch, backend="relative", steps=3, dense=True, **given)
    assert_equal(run(batch, backend="triton", steps=3, dense=True, **given), expected, 1e-10)
    given = {name: given[name] for name in ("log_weights", "groups")}
    field = AnchorField(batch.others, given["log_weights"], given["groups"], "triton")
    rows = Rows(batch.noise, batch.others[batch.index], batch.index, torch.zeros(10, dtype=torch.float64))
    assert isinstance(field.block, interpreter.FusedBlock) and field.block._given(rows, 1.0)[-1] == (1, 3)


def clusters() -> Batch:
    """Far from the centre and near each other: scores of 10⁷ of which the first digits after the point decide."""
    batch = make(24, 32, 16, 0.05, spread=1.0)
    centres = (10 * torch.randn(4, 24, generator=torch.Generator().manual_seed(5))).double()[torch.arange(32) % 4]
    batch.anchors, batch.others = ((value + centres).float().double() for value in (batch.anchors, batch.others))
    return batch


@pytest.mark.parametrize("exact", [True, False])
def test_float32_has_float64_scores_where_it_needs_them(
    exact: bool, monkeypatch: pytest.MonkeyPatch, interpreter: Any
) -> None:
    """And without them it would be noticed."""
    if not exact:
        monkeypatch.setattr(interpreter, "FLOAT32_SCORES", math.inf)
    batch = clusters()
    expected = run(batch, backend="tiled", steps=10)
    found = run(batch, backend="triton", steps=10, dtype=torch.float32)
    assert (error(found["latents"], expected["latents"]) <= 1e-5) is exact
    if exact:
        for name in expected:
            assert error(found[name], expected[name]) <= (5e-3 if name.startswith("grad") else 1e-4), name


def test_float32_is_close_to_float64() -> None:
    batch = make(24, 40, 20, 0.1, spread=1.0)
    expected, found = run(batch, backend="tiled", steps=6), run(batch, backend="triton", dtype=torch.float32, steps=6)
    for name in expected:
        assert error(found[name], expected[name]) <= (1e-3 if name.startswith("grad") else 1e-4), name


@pytest.mark.parametrize("terms", [1, 3])
def test_three_products_on_tensor_cores_have_the_digits(terms: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one has not. Factors are cut to TF32's 11 bits here as a GPU's tensor cores cut them; which sums these make,
    in which order, is theirs."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    multiply = InterpreterBuilder.create_dot

    def cut(x: Any) -> Any:
        return ((np.ascontiguousarray(x).view(np.uint32) + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)

    def tensor_cores(self: Any, a: Any, b: Any, d: Any, precision: Any, *rest: Any) -> Any:
        if "TF32x3" not in str(precision):
            return multiply(self, a, b, d, precision, *rest)
        seen.append(precision)
        high = cut(a.data), cut(b.data)
        low = cut(a.data - high[0]), cut(b.data - high[1])
        total = high[0] @ high[1]
        if terms == 3:
            total = total + (low[0] @ high[1] + high[0] @ low[1])
        return TensorHandle(total + d.data, d.dtype.scalar)

    seen: list[Any] = []
    batch = make(24, 80, 40, 1.0, spread=0.5)
    expected = run(batch, backend="tiled", steps=10)
    monkeypatch.setattr(InterpreterBuilder, "create_dot", tensor_cores)
    found = run(batch, backend="triton", steps=10, dtype=torch.float32)
    assert seen
    errors = {name: error(found[name], expected[name]) for name in expected}
    within = all(value <= (1e-4 if name.startswith("grad") else 4e-6) for name, value in errors.items())
    assert within is (terms == 3), errors


def test_absent_classes_have_no_weight() -> None:
    g = torch.Generator().manual_seed(0)
    latents, anchors = torch.randn(9, 8, generator=g).double(), torch.randn(5, 8, generator=g).double()
    weights = torch.tensor([0.0, -math.inf, -1.0, -math.inf, 0.5], dtype=torch.float64)
    targets, found = torch.arange(9) % 5, []
    for backend in ("plain", "triton"):
        points, keys = latents.clone().requires_grad_(), anchors.clone().requires_grad_()
        log_probs = align(points, keys, targets, log_weights=weights, backend=backend, steps=5).log_probs
        present = ~log_probs.isneginf()
        alignment_loss(log_probs.masked_fill(~present, 0.0)).backward()
        assert points.grad is not None and keys.grad is not None
        found.append({"there": present.double(), "points": points.grad, "keys": keys.grad,
                      "log_probs": log_probs.detach().masked_fill(~present, 0.0)})  # fmt: skip
    assert_equal(found[1], found[0], 1e-10)


def test_the_backend_is_chosen_when_the_field_is_made(monkeypatch: pytest.MonkeyPatch, interpreter: Any) -> None:
    x = torch.eye(4)
    assert isinstance(AnchorField(x, None, None, "triton").block, interpreter.FusedBlock)
    assert not isinstance(AnchorField(x, None, None, "auto").block, interpreter.FusedBlock)  # no GPU
    with pytest.raises(ValueError, match="at most 1024 dimensions, got 2000: use tiled"):
        AnchorField(torch.zeros(2, 2000), None, None, "triton")
    monkeypatch.setattr(interpreter, "INTERPRETED", False)
    with pytest.raises(ValueError, match="backend triton needs a GPU"):
        compute_latents(x, x, backend="triton")
    monkeypatch.setattr(field_module, "find_spec", lambda _: None)
    with pytest.raises(ValueError, match=r"install lzn_dist\[gpu\]"):
        compute_latents(x, x, backend="triton")


def test_what_no_row_of_a_tile_feels_is_skipped(monkeypatch: pytest.MonkeyPatch, interpreter: Any) -> None:
    """Two clusters far apart, one a tile: fewer products, the same results."""
    from triton.runtime.interpreter import InterpreterBuilder

    batch = make(16, 64, 20, 0.5, spread=1.0)
    batch.anchors[32:] += 20
    batch.others[32:] += 20
    batch.index = torch.arange(20)
    counts: list[int] = []
    multiply = InterpreterBuilder.create_dot

    def counted(*args: Any) -> Any:
        counts[-1] += 1
        return multiply(*args)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    found = []
    for floor in (-math.inf, interpreter.EXP_FLOOR):
        monkeypatch.setattr(interpreter, "EXP_FLOOR", floor)
        counts.append(0)
        found.append(run(batch, backend="triton", steps=5))
    assert_equal(found[1], found[0], 1e-12)
    assert 0 < counts[1] < 0.85 * counts[0], counts


@pytest.mark.process
def test_they_compile_for_a_gpu() -> None:
    """To PTX and through ptxas, without a GPU: with all that they can be asked for, at the paper's width.

    Where a program's numbers do not fit into its registers, each tile goes through memory (3 KB a thread, once).
    """
    worker = Path(__file__).with_name("compile_kernels.py")
    done = subprocess.run([sys.executable, worker, "256", "90"], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    *lines, masks = done.stdout.splitlines()
    assert masks == "_masks 0"
    assert [line.split()[0] for line in lines] == ["_forward", "_moments", "_backward_rows", "_backward_anchors"]
    for line in lines:
        _, shared, limit, spilled, products = line.split()
        assert int(shared) <= int(limit)
        assert int(spilled) <= 1200
        assert int(products) > 0  # float64 scores on tensor cores
