"""One rank, started by the tests of the ring: each case on this rank's share, results written to a folder."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lzn_dist.distributed.ring import RingField, ring_field
from lzn_dist.terminal import command
from lzn_dist.zones import align, alignment_loss, block, compute_latents
from tests.helpers.zone_cases import Batch, make


@dataclass(frozen=True)
class Case:
    dim: int = 16
    n: int = 60
    scale: float = 1.0
    spread: float | None = 0.5
    solver: str = "euler"
    steps: int = 12
    dense: bool = False
    dtype: torch.dtype = torch.float64
    store_every: int = 1
    near: bool = True
    weights: bool = False  # log-weights, some anchors absent
    groups: bool = False  # a few equal captions, on several ranks
    alone: bool = False  # the first rank's anchors are so far apart that its rows are one-hot almost at once

    def batch(self, world: int) -> Batch:
        """All anchors are samples. near: duplicates, exact and not, that stand on the first rank and the last."""
        batch = make(self.dim, self.n, self.n, self.scale, spread=self.spread)
        batch.index = torch.arange(self.n)
        border = starts(self.n, world)[-2]
        if self.alone:
            batch.anchors[:border] *= 100
            batch.others[:border] *= 100
        elif self.near:
            first, other = batch.anchors, batch.others
            near = torch.zeros(self.dim, dtype=torch.float64)
            near[:2] = torch.tensor([6e-7, 8e-7])
            first[border] = first[0]
            first[border + 1] = first[1] + near
            other[border + 2] = other[2] + near
        return batch

    def extras(self, rows: slice) -> tuple[Tensor | None, Tensor | None]:
        """A share's log-weights and groups."""
        g = torch.Generator().manual_seed(2)
        weights = torch.randn(self.n, generator=g, dtype=torch.float64)
        weights[torch.randperm(self.n, generator=g)[: self.n // 6]] = -torch.inf
        groups = torch.randint(self.n // 3, (self.n,), generator=g)
        return weights[rows] if self.weights else None, groups[rows] if self.groups else None


CASES = {
    "euler": Case(),
    "euler unaligned": Case(spread=None),
    "dpm_solver_pp": Case(solver="dpm_solver_pp"),
    "dpm_solver_pp unaligned": Case(solver="dpm_solver_pp", spread=None, scale=0.1),
    "cotangents everywhere": Case(steps=10, spread=None, dense=True),
    "cotangents everywhere, dpm_solver_pp": Case(steps=9, solver="dpm_solver_pp", dense=True),
    "settled": Case(n=220, steps=20),
    "settled unaligned": Case(n=220, spread=None, scale=2.0),
    "settled, cotangents everywhere": Case(n=220, steps=10, dense=True),
    "settled unaligned, cotangents everywhere": Case(n=220, spread=None, scale=2.0, steps=10, dense=True),
    "one rank alone": Case(n=220, steps=10, alone=True),
    "weights": Case(weights=True),
    "weights, cotangents everywhere": Case(weights=True, steps=10, dense=True, spread=None),
    "groups": Case(groups=True),
    "groups, settled": Case(groups=True, n=220, spread=None, scale=2.0),
    "groups, weights, cotangents everywhere": Case(weights=True, groups=True, steps=10, dense=True, spread=None),
    "float32": Case(n=200, dim=256, spread=1.0, dtype=torch.float32, near=False),
    "float32 small": Case(n=200, dim=256, spread=1.0, scale=0.1, dtype=torch.float32, near=False),
    "float32 dpm_solver_pp": Case(n=200, dim=256, spread=1.0, solver="dpm_solver_pp", dtype=torch.float32, near=False),
}
AGAIN = {  # name: stored states, and which case's digits they must give
    "euler, stored": (3, "euler"),
    "dpm_solver_pp, stored": (7, "dpm_solver_pp unaligned"),
    "settled, stored": (20, "settled unaligned"),
    "one rank alone, stored": (4, "one rank alone"),
}


def starts(n: int, world: int) -> list[int]:
    """Where the ranks' shares start, and n: uneven, with 4 ranks one of one row and one of none."""
    return {1: [0, n], 2: [0, n * 2 // 3, n], 4: [0, n // 2, n // 2 + 1, n // 2 + 1, n]}[world]


def objective(case: Case, latents: Tensor, log_probs: Tensor, endpoint: Tensor, rows: slice) -> Tensor:
    """This share's part of the loss of all samples; the shares' parts add up to it."""
    total = sum((value * 0).sum() for value in (latents, log_probs, endpoint))  # without samples, still a result
    count = rows.stop - rows.start
    if count:
        total = total + alignment_loss(log_probs) * count / case.n
    if case.dense:
        g = torch.Generator().manual_seed(1)
        for value, dim in ((latents, 0), (log_probs, 1), (endpoint, 0)):
            shape = [case.n if axis == dim else size for axis, size in enumerate(value.shape)]
            cotangent = torch.randn(shape, generator=g).to(value.dtype)
            total = total + (value * cotangent.narrow(dim, rows.start, count)).sum()
    assert isinstance(total, Tensor)
    return total


def run(
    case: Case, rank: int, world: int, *, watch: TorchDispatchMode | None = None, **options: Any
) -> dict[str, Tensor]:
    """Results and gradients of one share. With world 1 and no field, of all samples in one process."""
    first, behind = starts(case.n, world)[rank : rank + 2]
    rows, batch = slice(first, behind), case.batch(options.pop("borders", world))
    anchors, others, noise = (
        value[rows].to(case.dtype).requires_grad_() for value in (batch.anchors, batch.others, batch.noise)
    )
    options |= {"steps": case.steps}
    weights, groups = case.extras(rows)
    positions = torch.arange(first, behind)
    with watch or nullcontext():
        latents = compute_latents(
            anchors, noise, index=positions, log_weights=weights, solver=case.solver, **options  # type: ignore[arg-type]
        )  # fmt: skip
        found = align(latents, others, positions, log_weights=weights, groups=groups, **options)
        absent = found.log_probs.isneginf()  # a target that is not there
        log_probs = found.log_probs.masked_fill(absent, 0.0)
        objective(case, latents, log_probs, found.endpoint, rows).backward()
    results = {
        "latents": latents, "log_probs": log_probs.T, "endpoint": found.endpoint,
        "grad_anchors": anchors.grad, "grad_others": others.grad, "grad_noise": noise.grad,
    }  # fmt: skip
    if case.weights and not case.groups:
        results["absent"] = absent.T.double()
    return {name: value.detach() for name, value in results.items() if value is not None}


class Largest(TorchDispatchMode):
    """Elements of the largest tensor that an operation returns."""

    elements = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        sizes = [value.numel() for value in tree_leaves(result) if isinstance(value, Tensor)]
        self.elements = max(self.elements, *sizes, 0)
        return result


def largest(rank: int, world: int) -> int:
    before = block.TILE_ELEMENTS, block.TILE_ROWS
    block.TILE_ELEMENTS, block.TILE_ROWS = 1 << 10, 1
    mode = Largest()
    run(CASES["settled unaligned"], rank, world, watch=mode, field=ring_field())
    block.TILE_ELEMENTS, block.TILE_ROWS = before
    return mode.elements


def refusals(rank: int) -> dict[str, str]:
    """What all ranks are refused."""
    x, field = torch.eye(3), ring_field()
    here, elsewhere = torch.arange(3) + 3 * rank, torch.arange(3) + (0 if rank else 3)
    weights, wide = torch.zeros(3), torch.zeros(3, 3 + rank)
    calls = {
        "targets": lambda: align(x, x, elsewhere, field=field),
        "index": lambda: compute_latents(x, x, index=here + 3 * dist.get_world_size(), field=field),
        "anchors must": lambda: align(x, x, here, log_weights=None if rank else weights, field=field),
        "solver": lambda: compute_latents(x, x, index=here, solver="dopri5", field=field),
        "backend": lambda: compute_latents(x, x, index=here, backend="plain", field=field),
        "anchors": lambda: compute_latents(wide, wide, index=here, field=field),
        "anchors:": lambda: compute_latents(x[:0], x[:0], index=here[:0], field=field),
    }
    found = {}
    for name, call in calls.items():
        try:
            call()
        except ValueError as refusal:
            found[name] = str(refusal)
    return found


def main() -> int:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    counts: list[int] = []  # rows of each call of the field
    posterior = RingField.posterior

    def spy(field: Any, rows: Any, *args: Any, **options: Any) -> Any:
        counts.append(len(rows))
        return posterior(field, rows, *args, **options)

    RingField.posterior = spy  # type: ignore[method-assign]
    results, calls = {}, {}
    for name, case in CASES.items():
        counts.clear()
        results[name] = run(case, rank, world, field=ring_field())
        calls[name] = list(counts)
    for name, (store_every, like) in AGAIN.items():
        results[name] = run(CASES[like], rank, world, field=ring_field(), store_every=store_every)
    group = dist.new_group(list(range(world)))
    results["group"] = run(CASES["euler"], rank, world, field=ring_field(group))
    found = {"results": results, "calls": calls, "largest": largest(rank, world), "refusals": refusals(rank)}
    torch.save(found, folder / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(command(main))
