"""The order in which a run sees its samples: a pure function of (seed, epoch), the same on any number of ranks.

For each epoch the shards are put in a random order and joined to one sequence of all samples, which is cut into C
canonical streams of equal length (whatever the shards' borders: fewer shards than streams is no obstacle). Within a
stream, samples are shuffled within windows of W. Place j of the epoch is sample j // C of stream j mod C; global batch
k takes the next `global_batch` places and sorts them by stream, so that a rank's contiguous share of the batch comes
from its own few streams and hence from few shards, which it reads roughly from front to back. The shuffles are keyed;
nothing depends on ranks or workers, and the number of the batch is the whole cursor.

(MosaicML Streaming's canonical nodes give the same promise on a format of its own.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lzn_dist.keyed_random import make_key, permutation

Rows = NDArray[np.int64]


class SampleOrder:
    """Which sample stands where in each epoch.

    shards: samples of each shard in the manifest's order. streams: C. window: W in samples of a stream; 0 for whole
    streams: with one stream that is a permutation of everything. The last `remainder` places of an epoch, fewer than a
    global batch and others in each epoch, are left out.
    """

    def __init__(self, shards: Sequence[int], global_batch: int, seed: int, streams: int = 1, window: int = 0) -> None:
        for name, value, least in (("global_batch", global_batch, 1), ("streams", streams, 1), ("window", window, 0)):
            if value < least:
                raise ValueError(f"{name} must be at least {least}, not {value}")
        self.sizes = np.asarray(shards, dtype=np.int64)
        self.samples, self.global_batch, self.seed = int(self.sizes.sum()), global_batch, seed
        self.streams, self.window = streams, window
        self.batches_per_epoch = self.samples // global_batch
        self.remainder = self.samples - self.batches_per_epoch * global_batch
        self._starts = np.concatenate([[0], np.cumsum(self.sizes)])
        self._shuffled = functools.lru_cache(maxsize=2 * streams + 2)(self._shuffle)
        self._placed = functools.lru_cache(maxsize=2)(self._place)

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if not callable(value)}

    def __setstate__(self, state: dict[str, object]) -> None:
        self.__dict__.update(state)
        self._shuffled = functools.lru_cache(maxsize=2 * self.streams + 2)(self._shuffle)
        self._placed = functools.lru_cache(maxsize=2)(self._place)

    def batch(self, number: int, start: int = 0, stop: int | None = None) -> Rows:
        """Places start … stop - 1 of global batch `number` of the run: rows int64 in the manifest's order."""
        epoch, number = divmod(number, self.batches_per_epoch)
        places = np.arange(number * self.global_batch, (number + 1) * self.global_batch)
        places = places[np.argsort(places % self.streams, kind="stable")][start:stop]
        stream, position = places % self.streams, places // self.streams
        window = position // self.window if self.window else np.zeros_like(position)
        sequence = np.empty_like(places)
        # runs of equal (stream, window), by their borders
        borders = np.flatnonzero(np.diff(stream) | np.diff(window)) + 1
        for first, last in zip([0, *borders], [*borders, len(places)], strict=True):
            if first < last:
                s, w = int(stream[first]), int(window[first])
                begin = self._start(s) + w * self.window
                sequence[first:last] = begin + self._shuffled(epoch, s, w)[position[first:last] - w * self.window]
        order, ends = self._placed(epoch)
        shard = np.searchsorted(ends, sequence, side="right")
        within = sequence - (ends[shard] - self.sizes[order[shard]])
        return np.asarray(self._starts[order[shard]] + within, dtype=np.int64)

    def _start(self, stream: int) -> int:
        """Where a stream begins in the epoch's sequence: the first samples mod C streams are longer by one."""
        return stream * (self.samples // self.streams) + min(stream, self.samples % self.streams)

    def _shuffle(self, epoch: int, stream: int, window: int) -> Rows:
        length = self._start(stream + 1) - self._start(stream)
        size = min(self.window or length, length - window * self.window)
        return np.asarray(permutation(make_key(self.seed, "order", epoch, stream, window), size).numpy())

    def _place(self, epoch: int) -> tuple[Rows, Rows]:
        """The shards in the epoch's order, and where each ends in its sequence."""
        order = permutation(make_key(self.seed, "shards", epoch), len(self.sizes)).numpy()
        return order, np.cumsum(self.sizes[order])
