from __future__ import annotations

from pathlib import Path

import pytest
from hand_made import hand_made

from lzn_dist.data import ensure_digits
from lzn_dist.model import LZN


@pytest.fixture
def joint() -> LZN:
    return hand_made("joint")


@pytest.fixture(scope="session")
def digits_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return ensure_digits(tmp_path_factory.mktemp("digits") / "shards")
