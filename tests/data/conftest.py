from __future__ import annotations

from pathlib import Path

import pytest
import torch

from lzn_dist.data import ShardIndex, write_digits


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_digits(tmp_path_factory.mktemp("data") / "digits")


@pytest.fixture(scope="session")
def index(digits: Path) -> ShardIndex:
    return ShardIndex.load(digits)
