from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path += [str(Path(__file__).parents[1] / folder) for folder in ("distributed", "zones")]


@pytest.fixture(scope="session", autouse=True)
def gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU: bash tests/gpu/run.sh")
    return torch.device("cuda", 0)
