"""The order of samples: a permutation in every epoch, one and the same for any ranks, and addressed by batch alone."""

from __future__ import annotations

import pickle
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lzn_dist.data import SampleOrder

orders = st.builds(
    dict,
    shards=st.lists(st.integers(1, 40), min_size=1, max_size=12),
    streams=st.integers(1, 16),
    window=st.integers(0, 30),
    seed=st.integers(0, 5),
    batch=st.floats(0.02, 1.0),
)


def build(options: dict) -> SampleOrder:  # type: ignore[type-arg]
    batch = max(1, int(options["batch"] * sum(options["shards"])))
    return SampleOrder(options["shards"], batch, options["seed"], options["streams"], options["window"])


@settings(max_examples=200, deadline=None)
@given(orders)
def test_each_epoch_is_a_permutation_of_all_but_the_remainder(options: dict) -> None:  # type: ignore[type-arg]
    order = build(options)
    n = sum(options["shards"])
    assert order.batches_per_epoch == n // order.global_batch and order.remainder == n % order.global_batch
    for epoch in (0, 1):
        start = epoch * order.batches_per_epoch
        rows = np.concatenate([order.batch(start + k) for k in range(order.batches_per_epoch)])
        assert rows.dtype == np.int64 and len(rows) == n - order.remainder
        assert len(np.unique(rows)) == len(rows) and rows.min() >= 0 and rows.max() < n


@settings(max_examples=50, deadline=None)
@given(orders, st.integers(1, 8), st.integers(0, 20), st.booleans())
def test_any_rank_and_any_resume_sees_its_part_of_the_same_batches(
    options: dict,
    ranks: int,
    cut: int,
    copied: bool,  # type: ignore[type-arg]
) -> None:
    """What a fresh object says of batch k from `cut` on is what one says that has gone through all before."""
    whole = build(options)
    seen = [whole.batch(k) for k in range(cut + 4)]
    resumed = pickle.loads(pickle.dumps(whole)) if copied else build(options)
    size = whole.global_batch
    borders = [rank * size // ranks for rank in range(ranks + 1)]  # uneven shares too
    for k in range(cut, cut + 4):
        parts = [resumed.batch(k, a, b) for a, b in pairwise(borders)]
        np.testing.assert_array_equal(np.concatenate(parts), seen[k])


def test_epochs_and_seeds_differ() -> None:
    make = lambda seed: SampleOrder([50] * 4, 100, seed, streams=4, window=16)  # noqa: E731
    order = make(0)
    batches = [order.batch(k).tolist() for k in range(4)] + [make(1).batch(0).tolist()]
    assert len({tuple(batch) for batch in batches}) == 5


def test_one_stream_and_no_window_is_a_plain_permutation() -> None:
    """Each sample is as likely to stand in the first batch as any other, alone and together with its neighbour."""
    counts, pairs = np.zeros(60), 0
    for seed in range(2000):
        first = SampleOrder([20] * 3, 15, seed).batch(0)
        counts[first] += 1
        pairs += int({0, 1} <= set(first.tolist()))
    assert abs(counts - 500).max() < 5 * np.sqrt(2000 * 0.25 * 0.75)
    assert pairs / 2000 == pytest.approx(0.25 * 14 / 59, abs=0.02)


def test_a_rank_reads_few_shards_at_a_time() -> None:
    """What streams and windows are for: 8 ranks, 64 shards; a rank's share of 4 batches comes from a few shards."""
    order = SampleOrder([100] * 64, 64, 0, streams=8, window=100)
    for rank in range(8):
        rows = np.concatenate([order.batch(k, rank * 8, rank * 8 + 8) for k in range(4)])
        assert len(np.unique(rows // 100)) <= 2
        epoch = np.concatenate([order.batch(k, rank * 8, rank * 8 + 8) for k in range(100)])
        assert len(np.unique(epoch // 100)) == 8


def test_no_two_windows_mix() -> None:
    order = SampleOrder([1000], 10, 0, streams=2, window=50)
    rows = np.concatenate([order.batch(k)[:5] for k in range(100)])  # the first stream
    for window in range(10):
        part = rows[window * 50 : window * 50 + 50]
        assert sorted(part.tolist()) == list(range(window * 50, window * 50 + 50))
        assert part.tolist() != sorted(part.tolist())
