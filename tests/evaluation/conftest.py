from __future__ import annotations

import pytest

from lzn_dist.inference import LZN
from tests.helpers.hand_made import hand_made


@pytest.fixture
def joint() -> LZN:
    return hand_made("joint")
