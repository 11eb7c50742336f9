"""The published networks' reference outputs (tests/models/reference), and the filling and inputs that give them."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

REFERENCE = Path(__file__).parents[1] / "models" / "reference"


def read(case: str) -> Any:
    return json.loads((REFERENCE / f"{case}.json").read_text())


def wave(shape: tuple[int, ...], phase: float) -> Tensor:
    return torch.sin(0.37 * torch.arange(math.prod(shape), dtype=torch.float64) + phase).float().reshape(shape)


@torch.no_grad()
def fill(network: nn.Module) -> None:
    for n, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        if name == "sigmas":
            continue
        v = torch.sin(0.01 * torch.arange(tensor.numel(), dtype=torch.float64) + n).reshape(tensor.shape)
        if tensor.dim() >= 2:
            v = v * math.sqrt(2.0 / math.prod(tensor.shape[1:]))
        elif name.endswith(".W"):
            v = 16.0 * v
        else:
            v = 1.0 + 0.1 * v if name.endswith("weight") else 0.1 * v
        tensor.copy_(v)


def assert_same_output(output: Tensor, expected: dict[str, Any]) -> None:
    """To 1e-4 of the output's size."""
    assert list(output.shape) == expected["shape"]
    tolerance = 1e-4 * (expected["std"] + abs(expected["mean"]))
    first = torch.tensor(expected["first"])
    torch.testing.assert_close(output.flatten()[: len(first)], first, rtol=1e-4, atol=tolerance)
    assert output.mean().item() == pytest.approx(expected["mean"], abs=tolerance)
    assert output.std().item() == pytest.approx(expected["std"], rel=1e-4)
