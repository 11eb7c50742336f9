"""Random numbers are functions of their key: the generator itself, and independence of how a batch is split."""

from __future__ import annotations

import torch

from lzn_dist.keyed_random import _bits, fold, make_key, normal, permutation, uniform


def test_the_generator_is_splitmix64() -> None:
    # the first outputs for seed 0, as published with the algorithm's reference implementation
    expected = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    assert [int(v) & (1 << 64) - 1 for v in _bits(torch.tensor(0), 3)] == expected


def test_numbers_do_not_depend_on_how_a_batch_is_split() -> None:
    index = torch.arange(12)
    whole = normal(make_key(3, "noise", torch.tensor(5), index), (2, 3))
    parts = [normal(make_key(3, "noise", torch.tensor(5), part), (2, 3)) for part in index.split(5)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(whole[7], normal(make_key(3, "noise", 5, torch.tensor(7)), (2, 3)))


def test_every_part_of_a_key_counts() -> None:
    keys = [make_key(0, "a", 1, 2), make_key(1, "a", 1, 2), make_key(0, "b", 1, 2), make_key(0, "a", 2, 1)]
    keys += [make_key(0, "a", 1), fold(make_key(0, "a", 1, 2), 0)]
    assert len({int(key) for key in keys}) == len(keys)


def test_moments_and_ranges() -> None:
    keys = make_key(0, "moments", torch.arange(1000))
    u, z = uniform(keys, (201,)), normal(keys, (201,), torch.float64)
    assert u.min() >= 0 and u.max() < 1
    # 201,000 numbers: five standard errors of each moment
    assert abs(u.mean() - 0.5) < 5 * (1 / 12 / 201_000) ** 0.5
    assert abs(z.mean()) < 5 / 201_000**0.5
    assert abs(z.var() - 1) < 5 * (2 / 201_000) ** 0.5
    assert abs((z**4).mean() - 3) < 5 * (96 / 201_000) ** 0.5
    assert abs((z[:, :-1] * z[:, 1:]).mean()) < 5 / 200_000**0.5  # the two numbers of a pair are independent


def test_float32_and_float64_hold_the_same_numbers() -> None:
    keys = make_key(0, "dtype", torch.arange(100))
    assert torch.equal(uniform(keys, (50,)).double(), uniform(keys, (50,), torch.float64))
    assert torch.allclose(
        normal(keys, (50,)).double(), normal(keys, (50,), torch.float64), atol=5e-6
    )  # 5.8 times float32's angle


def test_permutations() -> None:
    first, second = (permutation(make_key(0, "order", epoch), 1000) for epoch in range(2))
    assert torch.equal(first.sort().values, torch.arange(1000))
    assert (first != second).float().mean() > 0.9
