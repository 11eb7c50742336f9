"""The GPU's masks of dropout, in Triton's interpreter on the CPU, against torch's operators: the same bits."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

from lzn_dist.keyed_random import fold, make_key, uniform

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="Triton is for Linux"),
    pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU: bash tests/gpu/run.sh runs them on it"),
]


@pytest.fixture(scope="module")
def kernel() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        from lzn_dist.models import dropout_kernel
    return dropout_kernel


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.5, 1.0 - 2.0**-24])
@pytest.mark.parametrize("shape", [(1,), (3, 5, 7), (16, 9, 15)])
def test_the_same_masks_as_by_torch(kernel: Any, shape: tuple[int, ...], rate: float) -> None:
    key = make_key(3, "dropout", torch.arange(5))
    for index in (0, 41):
        found = kernel.kept(key, index, rate, shape)
        assert found.dtype == torch.bool
        assert torch.equal(found, uniform(fold(key, index), shape) >= rate)


@pytest.mark.parametrize("off", [0.0, 2.0**-26, -(2.0**-26)])
def test_a_number_that_is_the_rate_is_kept(kernel: Any, off: float) -> None:
    """As by torch, to which a rate is a float32."""
    key = make_key(3, "dropout", torch.arange(2))
    numbers = uniform(fold(key, 5), (50,))
    rate = float(numbers.flatten()[numbers.flatten() < 0.2][0])  # here float32 has more digits than the numbers
    assert torch.equal(kernel.kept(key, 5, rate + off, (50,)), numbers >= rate + off)
    assert int((numbers >= rate + 2.0**-26).sum()) == int((numbers >= rate).sum()) - 1


def test_no_samples(kernel: Any) -> None:
    assert kernel.kept(torch.empty(0, dtype=torch.int64), 1, 0.1, (4, 2)).shape == (0, 4, 2)
