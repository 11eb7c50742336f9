"""Random numbers as a pure function of a key: no generator, no state, no call order.

Every random number in a run is addressed by (seed, stream, counters…, element): the stream is a name
("noise", "dropout", …), the counters are sample indices, steps or layers. Ranks, micro-batches and workers
ask for the numbers of *their* samples, so that any split of a global batch sees the same numbers, and a
resumed run sees those of the undisturbed one.

The generator is SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"):
``mix(key + (element + 1) * GOLDEN)``. It is integer arithmetic that wraps at 64 bits, hence equal on every
device. This file imports torch alone and may be imported from everywhere.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from itertools import takewhile

import torch
from torch import Tensor

GOLDEN = 0x9E3779B97F4A7C15
MIX_1 = 0xBF58476D1CE4E5B9
MIX_2 = 0x94D049BB133111EB
_ALL = (1 << 64) - 1
BITS_24 = (1 << 24) - 1


def _signed(value: int) -> int:
    """The int64 with the same 64 bits as the unsigned ``value``: torch has no full unsigned arithmetic."""
    value &= _ALL
    return value - (1 << 64) if value >= 1 << 63 else value


def _xor_shift(x: Tensor, bits: int) -> Tensor:
    # int64's >> copies the sign bit; masking makes it the logical shift that SplitMix64 is defined with
    return x ^ ((x >> bits) & ((1 << (64 - bits)) - 1))


def _mix(x: Tensor) -> Tensor:
    """SplitMix64's finaliser on int64 [...]: a bijection in which every input bit flips half of the output bits."""
    x = _xor_shift(x, 30) * _signed(MIX_1)
    x = _xor_shift(x, 27) * _signed(MIX_2)
    return _xor_shift(x, 31)


def _mix_number(x: int) -> int:
    """`_mix` of a Python number, 0 ≤ x < 2⁶⁴, and the result too."""
    x = ((x ^ (x >> 30)) * MIX_1) & _ALL
    x = ((x ^ (x >> 27)) * MIX_2) & _ALL
    return x ^ (x >> 31)


def mixed_counter(counter: int) -> int:
    """What `fold` takes of a number: an int64."""
    return _signed(_mix_number((int(counter) + MIX_1) & _ALL))


def _fold_number(key: int, counter: int) -> int:
    return _mix_number(_mix_number((key + GOLDEN) & _ALL) ^ (mixed_counter(counter) & _ALL))


def fold(key: Tensor, *counters: int | Tensor) -> Tensor:
    """Derive a key from ``key`` and counters, one after the other (they broadcast): int64 in, int64 out.

    Numbers are mixed in Python: no copy to the device, for which it would be waited.
    """
    for counter in counters:
        if isinstance(counter, Tensor):
            mixed: int | Tensor = _mix(counter.to(key.device, torch.int64) + _signed(MIX_1))
        else:
            mixed = mixed_counter(counter)
        key = _mix(_mix(key + _signed(GOLDEN)) ^ mixed)
    return key


def make_key(seed: int, stream: str, *counters: int | Tensor, device: torch.device | str | None = None) -> Tensor:
    """The key of ``stream`` under ``seed``; tensor counters (sample indices, say) give a key each.

    Returns int64 of the counters' broadcast shape, a 0-dimensional tensor without tensor counters.
    """
    if device is None:
        device = next((c.device for c in counters if isinstance(c, Tensor)), torch.device("cpu"))
    root = int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little")
    numbers = list(takewhile(lambda counter: not isinstance(counter, Tensor), counters))
    for number in numbers:
        root = _fold_number(root, int(number))
    return fold(torch.full((), _signed(root), dtype=torch.int64, device=device), *counters[len(numbers) :])


def _bits(keys: Tensor, count: int) -> Tensor:
    """64 random bits for each of ``count`` elements under each key: int64 [*keys.shape, count]."""
    elements = torch.arange(1, count + 1, dtype=torch.int64, device=keys.device) * _signed(GOLDEN)
    return _mix(keys.unsqueeze(-1) + elements)


def uniform(keys: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Uniform numbers in [0, 1) with 24 bits, so that float32 and float64 hold the same ones.

    keys: int64 [...]; returns [..., *shape].
    """
    bits = _bits(keys, math.prod(shape)) & BITS_24
    return (bits.to(dtype) * 2.0**-24).reshape(*keys.shape, *shape)


def normal(keys: Tensor, shape: Sequence[int] = (), dtype: torch.dtype = torch.float32) -> Tensor:
    """Standard normal numbers by Box–Muller, two from each 64 bits; float32 and float64 agree to rounding.

    keys: int64 [...]; returns [..., *shape]. No number exceeds sqrt(48 ln 2) = 5.8 in size (23 bits of the radius).
    """
    count = math.prod(shape)
    bits = _bits(keys, (count + 1) // 2)
    # the half step keeps the logarithm's argument off 0; with it, 23 bits are what float32 holds exactly
    radius = torch.sqrt(-2.0 * torch.log(((bits & (BITS_24 >> 1)).to(dtype) + 0.5) * 2.0**-23))
    angle = ((bits >> 24) & BITS_24).to(dtype) * (2.0 * math.pi * 2.0**-24)
    pair = torch.stack((radius * torch.cos(angle), radius * torch.sin(angle)), dim=-1)
    return pair.flatten(-2)[..., :count].reshape(*keys.shape, *shape)


def permutation(key: Tensor, count: int) -> Tensor:
    """A random permutation of range(count) under one key: int64 [count]."""
    return torch.argsort(_bits(key, count), stable=True)
