"""The gathered anchors' gradients on 2 and 4 ranks are those of one process on the global batch."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.distributed.worker import shared_objective
from tests.helpers.launching import ranks

WORKER = Path(__file__).with_name("worker.py")


@pytest.mark.process
@pytest.mark.parametrize("world", [2, 4])
def test_shares_give_the_gradients_of_one_process(world: int, tmp_path: Path) -> None:
    done = ranks("ddp", WORKER, tmp_path, processes=world, cwd=tmp_path)
    assert done.returncode == 0, done.stdout[-3000:]
    result = torch.load(tmp_path / "gather.pt")
    generator = torch.Generator().manual_seed(0)
    everyone = torch.randn(24, 8, dtype=torch.float64, generator=generator)
    weight = torch.randn(8, 6, dtype=torch.float64, generator=generator).requires_grad_()
    loss = shared_objective(everyone, slice(0, 24), weight)
    loss.backward()
    assert weight.grad is not None
    assert weight.grad.norm() > 1e-3
    assert torch.allclose(result["loss"], loss.detach(), rtol=1e-12)
    assert (result["grad"] - weight.grad).norm() <= 1e-10 * weight.grad.norm()
