"""Numbers as a pure function of their key."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from lzn_dist.keyed_random import _bits, fold, make_key, normal, permutation, uniform


def test_generator_is_splitmix64() -> None:
    """Outputs of the published generator, seed 0."""
    found = [value % (1 << 64) for value in _bits(torch.tensor(0), 3).tolist()]
    assert found == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]


def test_numbers_stay_what_they_are() -> None:
    """A run resumed under another version must see the same noise."""
    key = make_key(7, "noise", 3)
    assert int(key) == -6090466557984451996
    expected = torch.tensor([-0.859896735605198, -0.6562396204700919, 0.3254290784568614], dtype=torch.float64)
    torch.testing.assert_close(normal(key, (3,), torch.float64), expected, rtol=1e-14, atol=0)


def test_same_key_same_numbers() -> None:
    assert torch.equal(normal(make_key(1, "a", 2), (5, 3)), normal(make_key(1, "a", 2), (5, 3)))


def test_every_part_of_the_key_counts() -> None:
    keys = [
        make_key(0, "noise"),
        make_key(1, "noise"),
        make_key(0, "dropout"),
        *(make_key(0, "noise", step) for step in range(50)),
        *(make_key(0, "noise", 1, layer) for layer in range(50)),
        *(make_key(0, "noise", layer, 1) for layer in range(50) if layer != 1),
    ]
    assert len({int(key) for key in keys}) == len(keys)
    root = make_key(0, "noise")
    assert int(fold(root, 2, 5)) == int(fold(fold(root, 2), 5)) != int(fold(root, 5, 2))
    assert len(set(fold(root, torch.arange(100_000)).tolist())) == 100_000


def test_any_split_of_the_samples_sees_the_same_numbers() -> None:
    samples = torch.arange(12)
    whole = normal(make_key(0, "noise", 4, samples), (7,))
    for parts in (samples.split(5), samples.flip(0).split(1)):
        for part in parts:
            assert torch.equal(normal(make_key(0, "noise", 4, part), (7,)), whole[part])
    for sample in samples.tolist():
        assert torch.equal(normal(make_key(0, "noise", 4, sample), (7,)), whole[sample])


def test_shapes() -> None:
    keys = make_key(0, "noise", torch.arange(6).reshape(2, 3))
    assert keys.shape == (2, 3) and keys.dtype == torch.int64
    assert normal(keys, (5,)).shape == (2, 3, 5) and normal(keys, (5, 7)).shape == (2, 3, 5, 7)
    assert uniform(keys).shape == (2, 3) and normal(keys).shape == (2, 3)
    # a longer draw starts with the shorter one
    assert torch.equal(uniform(keys, (9,))[..., :4], uniform(keys, (4,)))


def test_moments() -> None:
    """Four standard deviations of each moment's estimate from 2000 keys × 500 numbers."""
    x = normal(make_key(0, "noise", torch.arange(2000)), (500,), torch.float64)
    n = x.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(float((x**power).mean()) - moment) < 4 * (variance / n) ** 0.5, power
    # neighbours: two elements (which share 64 bits or do not), two samples
    for a, b in ((x[:, :-1], x[:, 1:]), (x[:-1], x[1:])):
        assert abs(float((a * b).mean())) < 4 / n**0.5
        assert abs(float(((a.square() - 1) * (b.square() - 1)).mean())) < 4 * 2 / n**0.5
    u = uniform(make_key(0, "time", torch.arange(2000)), (500,), torch.float64)
    assert float(u.min()) >= 0 and float(u.max()) < 1
    assert abs(float(u.mean()) - 0.5) < 4 * (1 / 12 / n) ** 0.5
    counts = torch.histc(u, 64, 0, 1)
    assert float(((counts - n / 64).square() / (n / 64)).sum()) < 63 + 4 * (2 * 63) ** 0.5


def test_float32_holds_the_same_numbers_as_float64() -> None:
    keys = make_key(3, "noise", torch.arange(100))
    assert torch.equal(uniform(keys, (64,)).double(), uniform(keys, (64,), torch.float64))
    torch.testing.assert_close(normal(keys, (64,)).double(), normal(keys, (64,), torch.float64), rtol=1e-6, atol=2e-6)


def test_permutation_is_one() -> None:
    key = make_key(0, "shuffle", 1)
    for count in (0, 1, 2, 1000):
        assert torch.equal(permutation(key, count).sort().values, torch.arange(count))
    assert torch.equal(permutation(key, 1000), permutation(key, 1000))
    assert not torch.equal(permutation(key, 1000), permutation(make_key(0, "shuffle", 2), 1000))
    # each element comes first equally often: four standard deviations
    firsts = torch.stack([permutation(make_key(0, "shuffle", k), 4)[0] for k in range(2000)]).bincount(minlength=4)
    assert float((firsts - 500).abs().max()) < 4 * (2000 * 0.25 * 0.75) ** 0.5


def test_the_callers_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    normal(make_key(0, "noise"), (10,))
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_are_mixed_on_the_host_and_nothing_is_copied_to_the_device() -> None:
    """A copy of a number from the host would wait for a GPU; there is one for each call in a step."""

    class Operators(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.names: list[str] = []

        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            self.names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    with Operators() as seen:
        key = make_key(3, "stream", 1, torch.arange(4), 2)
        fold(key, 7, torch.arange(4))
        make_key(3, "stream", 5)
    assert "full" in seen.names and not {"lift_fresh", "scalar_tensor", "_to_copy"} & set(seen.names)
    with Operators() as seen:
        torch.tensor(3)
    assert "lift_fresh" in seen.names
