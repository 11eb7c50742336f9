"""The masks of `KeyedDropout` as one kernel for GPUs, in Triton.

As chains of torch's operators on int64 (`lzn_dist.keyed_random`) a mask is some 16 kernels that move 250 bytes an
element; here one is written. The same integers, hence the same masks on every device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from lzn_dist import keyed_random

_GOLDEN, _BITS_24 = tl.constexpr(keyed_random.GOLDEN), tl.constexpr(keyed_random.BITS_24)
_MIX_1, _MIX_2 = tl.constexpr(keyed_random.MIX_1), tl.constexpr(keyed_random.MIX_2)
_BLOCK = 1024

# pyright: reportInvalidTypeForm=false


@triton.jit
def _mix(x):  # type: ignore[no-untyped-def]
    """SplitMix64's finaliser on uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)


@triton.jit(do_not_specialize=("mixed", "count", "threshold"))
def _masks(keys, made, mixed, count, threshold, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """made: bool [b, count]; a program makes BLOCK elements of one sample."""
    blocks = tl.cdiv(count, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    element = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    key = tl.load(keys + sample).to(tl.uint64, bitcast=True)
    key = _mix(_mix(key + _GOLDEN) ^ mixed.to(tl.uint64))
    bits = _mix(key + (element + 1).to(tl.uint64) * _GOLDEN) & _BITS_24
    tl.store(made + sample * count + element, bits >= threshold.to(tl.uint64), mask=element < count)


def kept(key: Tensor, index: int, rate: float, shape: Sequence[int]) -> Tensor:
    """Bool [*key.shape, *shape]: uniform(fold(key, index), shape) >= rate, where rate is a float32."""
    count = math.prod(shape)
    made = torch.empty((*key.shape, *shape), dtype=torch.bool, device=key.device)
    if made.numel():
        # uniform numbers are multiples of 2⁻²⁴, and float32 holds them all
        threshold = math.ceil(torch.tensor(rate, dtype=torch.float32).double().item() * 2**24)
        programs = key.numel() * triton.cdiv(count, _BLOCK)
        _masks[(programs,)](key.contiguous(), made, keyed_random.mixed_counter(index), count, threshold, BLOCK=_BLOCK)
    return made
