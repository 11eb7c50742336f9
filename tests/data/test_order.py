"""The order of samples: a permutation in every epoch, one and the same for any ranks, and addressed by batch alone."""

from __future__ import annotations

import io
import pickle
import tarfile
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, count, islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lzn_dist.data import Batch, BatchStream, Exact, SampleOrder, ShardedDataset, ShardIndex
from lzn_dist.data import shards as shards_module

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


@pytest.mark.slow
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


# --------------------------------------------------------------------------------------------- the stream of batches


@dataclass(frozen=True)
class Case:
    """Shards with so many samples; a batch and streams that all of `worlds`, (ranks, workers), can share; two cuts."""

    shards: list[int]
    batch: int
    streams: int
    window: int
    seed: int
    worlds: list[tuple[int, int]]
    cuts: tuple[int, int]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    shards = draw(st.lists(st.integers(1, 9), min_size=1, max_size=6))
    batch = draw(st.integers(1, min(12, sum(shards))))
    streams = draw(st.integers(1, 6))
    ranks = [n for n in range(1, batch + 1) if batch % n == 0 and (streams == 1 or streams % n == 0)]
    worlds = draw(st.lists(st.tuples(st.sampled_from(ranks), st.integers(0, 3)), min_size=3, max_size=3))
    first = draw(st.integers(0, 2 * (sum(shards) // batch)))
    second = draw(st.integers(first, first + sum(shards) // batch))  # often in the same epoch
    return Case(shards, batch, streams, draw(st.integers(0, 6)), draw(st.integers(0, 3)), worlds, (first, second))


class Workers:
    """Stands in for torch's loader: as many copies of the stream as it has workers take turns, in this process."""

    def __init__(self, dataset: Any, sampler: range, num_workers: int, **_: object) -> None:
        self.copies = [pickle.loads(pickle.dumps(dataset)) for _ in range(num_workers)]
        self.numbers = sampler

    def __iter__(self) -> Iterator[Batch | Exception]:
        for turn, number in enumerate(self.numbers):
            yield self.copies[turn % len(self.copies)][number]


@settings(max_examples=40, deadline=None)
@given(case=cases())
def test_a_stream_is_a_permutation_an_epoch_whatever_ranks_workers_and_cuts(case: Case) -> None:
    """Samples, as their pixels and labels say which they are, from real shards; 4 batches past the second cut."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(shards_module, "DataLoader", Workers):
        write_numbered(Path(folder), case.shards)
        n, index = sum(case.shards), ShardIndex.load(folder)
        stop = max(2 * (n // case.batch), case.cuts[1] + 4)

        def run(world: tuple[int, int], start: int, stop: int) -> list[list[int]]:
            """The samples of each global batch, the ranks' parts joined."""
            ranks, workers = world
            parts = []
            for rank in range(ranks):
                order = SampleOrder(case.shards, case.batch, case.seed, case.streams, case.window)
                dataset = ShardedDataset(index, "train", 1, Exact(1))
                found = list(BatchStream(dataset, order, rank, ranks, workers).iterate(start, stop))
                for batch in found:
                    assert batch.bad == () and torch.equal(batch.labels, batch.index)
                    assert torch.equal(batch.pixels.flatten().long(), batch.index)
                parts.append([batch.index.tolist() for batch in found])
            return [list(chain(*batches)) for batches in zip(*parts, strict=True)]

        first, second = case.cuts
        whole = run(case.worlds[0], 0, stop)
        assert whole[:first] == run(case.worlds[1], 0, first)
        assert whole[first:second] == run(case.worlds[2], first, second)
        assert whole[second:] == run(case.worlds[1], second, stop)
        for epoch in (0, 1):
            seen = list(chain(*whole[epoch * (n // case.batch) : (epoch + 1) * (n // case.batch)]))
            assert len(seen) == len(set(seen)) == n - n % case.batch and set(seen) <= set(range(n))


def write_numbered(folder: Path, shards: list[int]) -> None:
    """Shards of images of one pixel; pixel and label are the sample's number."""
    numbers = count()
    for shard, samples in enumerate(shards):
        with tarfile.open(folder / f"train-{shard:06d}.tar", "w") as tar:
            for number in islice(numbers, samples):
                for extension, content in (("pgm", b"P5 1 1 255\n" + bytes([number])), ("cls", str(number).encode())):
                    member = tarfile.TarInfo(f"{number:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
