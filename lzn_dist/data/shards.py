"""Batches from WebDataset shards as a pure function of the step.

WebDataset reads tars from front to back; its shuffling depends on workers, ranks and the place in the shard, and it
has no state to save. Here the index says where every member lies (index.py), an epoch's order is a keyed function
(order.py), and **the number of the batch is the whole cursor**: batch k holds the same samples on any number of ranks
and workers, after any resume, and resuming reads nothing of what went before.
"""

from __future__ import annotations

import json
import multiprocessing.util
import os
import queue
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lzn_dist.data.captions import captions_of
from lzn_dist.data.index import ABSENT, ShardIndex
from lzn_dist.data.order import Rows, SampleOrder
from lzn_dist.data.pixels import Reading, WrongSizeError
from lzn_dist.keyed_random import make_key

NO_LABEL = -1
PREFETCH = 2  # batches decoded ahead
_CHUNK = 32  # files in memory at once
_NUMBER = re.compile(rb"(?:\xef\xbb\xbf)?\s*(\d{1,18})\s*")  # a label; editors on Windows put a mark before it
_ATTEMPTS = 16  # replacements of a sample that is not there, each by another one


class CorruptSampleError(ValueError):
    """Samples that cannot be read or decoded, where none may be replaced; the message names shard and key."""


# ── samples by number ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class BadSample:
    """A sample that cannot be used. row: its number in the split; why: shard, key and what is wrong."""

    row: int
    why: str


@runtime_checkable
class MemberReader(Protocol):
    """What another data type sees of a sample: its member of this extension, beside image and label."""

    @property
    def extension(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a sample's int64 tensor."""

    def __call__(self, contents: Sequence[bytes | None], rows: Tensor, epoch: int) -> list[Tensor | ValueError]:
        """For each sample int64 [*shape], or why it cannot be had; None: it has no such member. rows: int64 [b]."""


class Read(NamedTuple):
    """pixels uint8 [v, b, c, h, w], labels int64 [b], members [b, …] by data type, the rows that were read, and what
    was bad and had to be replaced."""

    pixels: Tensor
    labels: Tensor
    members: dict[str, Tensor]
    rows: Rows
    bad: list[BadSample]


class _Content(NamedTuple):
    """A sample's image file, its label, and its other members by data type (None: not there)."""

    image: bytes
    label: int
    members: dict[str, bytes | None]


class ShardedDataset(Dataset[tuple[Tensor, int]]):
    """The samples of a split by their number in the manifest's order: ``dataset[i] -> (uint8 [c, h, w], label)``.

    channels: 1 (grey) or 3 (RGB), to which images are converted. reading: how files become pixels. num_classes: where
    labels are needed, samples without one below it are bad (partial: unless they have none); 0: they are not needed,
    and -1 stands for one that is not there or no number. members: readers of other members, by data type.
    cache_decoded keeps each decoded image, n·c·h·w bytes in all, `shared` with forked loader processes; it needs a
    reading that is the same in all epochs. seed: of the replacements of bad samples.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        channels: int,
        reading: Reading,
        *,
        num_classes: int = 0,
        partial: bool = False,
        members: Mapping[str, MemberReader] | None = None,
        cache_decoded: bool = False,
        shared: bool = False,
        seed: int = 0,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
        if cache_decoded and reading.keyed:
            raise ValueError(
                "images whose views differ from epoch to epoch cannot be kept decoded: cache_decoded=false"
            )
        self.index, self.split, self.channels, self.reading = index, split, channels, reading
        self.num_classes, self.partial, self.seed = num_classes, partial, seed
        self.members = dict(members or {})
        self.table = index.split(split)
        try:
            self.images = self.table.images
        except ValueError as error:
            raise ValueError(f"{index.folder}, split {split!r}: {error}") from error
        self.labels = self.table.labels
        self._cache: tuple[Tensor, Tensor, Tensor] | None = None
        if cache_decoded:
            n = len(self)
            self._cache = (
                torch.empty(n, 1, channels, reading.size, reading.size, dtype=torch.uint8),
                torch.empty(n, dtype=torch.int64),
                torch.zeros(n, dtype=torch.bool),  # which rows are there; written last
            )
            if shared:
                for tensor in self._cache:
                    tensor.share_memory_()

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in split {self.split!r}")
        pixels, labels = self.read(np.array([i]))
        return pixels[0, 0], int(labels[0])

    def read(self, rows: Rows, epoch: int = 0) -> tuple[Tensor, Tensor]:
        """Samples that must all be good: uint8 [v, b, c, h, w] and int64 [b]. Raises CorruptSampleError."""
        found = self.read_or_replace(rows, epoch)
        if found.bad:
            raise CorruptSampleError(found.bad[0].why)
        return found.pixels, found.labels

    def captions(self, rows: Rows) -> list[list[str]]:
        """All captions of each sample; none of one whose text is damaged or not there."""
        found: list[list[str]] = []
        for content in self._members(rows, "txt"):
            try:
                found.append(captions_of(content))
            except ValueError:
                found.append([])
        return found

    def attributes(self, rows: Rows) -> list[dict[str, object]]:
        """What else is known of each sample (KEY.json); nothing of one whose file is damaged or not there."""
        found: list[dict[str, object]] = []
        for content in self._members(rows, "json"):
            try:
                read = json.loads(content)
            except ValueError:
                read = None
            found.append(read if isinstance(read, dict) else {})
        return found

    def _members(self, rows: Rows, extension: str) -> Iterator[bytes]:
        """A member of each sample, b"" where it has none."""
        table = self.table.offsets.get(extension)
        for row in np.asarray(rows).tolist():
            offset, size = (ABSENT, 0) if table is None else table[row].tolist()
            yield b"" if offset == ABSENT else self.index.storage.read(self.table.shard_of(row).name, offset, size)

    def read_or_replace(self, rows: Rows, epoch: int = 0) -> Read:
        """Samples, those that cannot be used replaced by others. The replacement is a function of the seed, the bad
        sample's key and the split's keys: the same in shards that hold the same samples in another order.

        Raises ValueError and OSError for what is no damage of single samples: images of another size, a lost server, a
        full disk.
        """
        rows = np.array(rows, dtype=np.int64)
        pixels = torch.empty(
            self.reading.views, len(rows), self.channels, self.reading.size, self.reading.size, dtype=torch.uint8
        )
        labels = torch.empty(len(rows), dtype=torch.int64)
        more = {name: torch.empty(len(rows), *own.shape, dtype=torch.int64) for name, own in self.members.items()}
        found = Read(pixels, labels, more, rows, [])
        bad = found.bad
        wanted, attempt = np.arange(len(rows)), 0
        originals = rows.copy()
        while len(wanted):
            failed = self._fill(found, wanted, epoch)
            if len(failed) and attempt == _ATTEMPTS:
                raise CorruptSampleError(f"{bad[-1].why}; so are {_ATTEMPTS} others in a row")
            for place in failed:
                key = make_key(self.seed, f"replacement/{self.table.key(originals[place])}", attempt)
                rows[place] = self._by_key[(int(key) & (2**63 - 1)) % len(self)]
            wanted, attempt = np.array(failed, dtype=np.int64), attempt + 1
        return found

    def _fill(self, into: Read, places: Rows, epoch: int) -> list[int]:
        """Read the samples at some places of a batch; returns the places that failed."""
        pixels, labels, members, rows, bad = into
        failed: list[int] = []
        if self._cache is not None and not self.members:  # nothing has to be read
            images, known, present = self._cache
            there = present[torch.from_numpy(rows[places])].numpy()
            kept = torch.from_numpy(places[there])
            numbers = torch.from_numpy(rows[places[there]])
            pixels[:, kept] = images[numbers].transpose(0, 1)
            labels[kept] = known[numbers]
            places = places[~there]
        for start in range(0, len(places), _CHUNK):
            chunk = places[start : start + _CHUNK]
            contents = self._contents(rows[chunk])
            numbers = torch.from_numpy(rows[chunk])
            files = [content.image if isinstance(content, _Content) else b"" for content in contents]
            try:
                found = self._decoded(files, numbers, epoch)
            except WrongSizeError as error:
                raise ValueError(f"{self.index.folder}, split {self.split!r}: an image {error}") from error
            parts = {"": found} | {
                name: reader(
                    [content.members[name] if isinstance(content, _Content) else b"-" for content in contents],
                    numbers, epoch,
                )
                for name, reader in self.members.items()
            }  # fmt: skip
            for number, (place, content) in enumerate(zip(chunk.tolist(), contents, strict=True)):
                wrong = next((part[number] for part in parts.values() if isinstance(part[number], ValueError)), None)
                if isinstance(content, str) or wrong is not None:
                    row = int(rows[place])
                    bad.append(BadSample(row, f"{self.where(row)}: {content if isinstance(content, str) else wrong}"))
                    failed.append(place)
                    continue
                pixels[:, place] = parts[""][number]  # type: ignore[assignment]
                labels[place] = content.label
                for name, tensor in members.items():
                    tensor[place] = parts[name][number]  # type: ignore[assignment]
                if self._cache is not None:
                    images, known, present = self._cache
                    images[rows[place]], known[rows[place]] = pixels[:, place], content.label
                    present[rows[place]] = True
        return failed

    def _decoded(self, files: list[bytes], numbers: Tensor, epoch: int) -> Sequence[Tensor | ValueError]:
        """Images of the samples int64 [b], those that are kept without decoding them again."""
        if self._cache is None:
            return self.reading(files, self.channels, numbers, epoch)
        images, _, present = self._cache
        there = present[numbers]
        wanted = [file for file, kept in zip(files, there.tolist(), strict=True) if not kept]
        fresh = iter(self.reading(wanted, self.channels, numbers[~there], epoch))
        return [images[n] if kept else next(fresh) for n, kept in zip(numbers.tolist(), there.tolist(), strict=True)]

    @cached_property
    def _by_key(self) -> Rows:
        """The rows in the order of their keys; sorted where there is something to replace."""
        return np.argsort(self.table.keys, kind="stable")

    def where(self, row: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.index.path(self.table.shard_of(row))}: sample {self.table.key(row)}"

    def _contents(self, rows: Rows) -> list[_Content | str]:
        """Each sample's files and label, or what is wrong with it."""
        shards = np.searchsorted(self.table.ends, rows, side="right").tolist()
        images = self.images[rows].tolist()
        labels = [[ABSENT, 0]] * len(rows) if self.labels is None else self.labels[rows].tolist()
        members = {
            name: [[ABSENT, 0]] * len(rows) if (table := self.table.offsets.get(reader.extension)) is None
            else table[rows].tolist()
            for name, reader in self.members.items()
        }  # fmt: skip
        # a sample's members lie beside each other: one read for all
        spans = []
        for place, (shard, *own) in enumerate(zip(shards, images, labels, strict=True)):
            parts = [part for part in (*own, *(of[place] for of in members.values())) if part[0] != ABSENT] or [[0, 0]]
            first = min(part[0] for part in parts)
            spans.append((self.table.shards[shard].name, first, max(sum(part) for part in parts) - first))
        storage = self.index.storage
        storage.fetch(spans)
        found: list[_Content | str] = []
        for place, (span, image, label) in enumerate(zip(spans, images, labels, strict=True)):
            if image[0] == ABSENT or (self.num_classes and label[0] == ABSENT and not self.partial):
                found.append("has no image" if image[0] == ABSENT else "has no label")
                continue
            content = storage.read(*span)
            if len(content) != span[2]:
                found.append("the shard ends inside it")
                continue

            def piece(part: list[int], content: bytes = content, first: int = span[1]) -> bytes | None:
                return None if part[0] == ABSENT else content[part[0] - first : sum(part) - first]

            text = piece(label)
            match = _NUMBER.fullmatch(text or b"")
            number = int(match[1]) if match else NO_LABEL
            if self.num_classes and text is not None and not 0 <= number < self.num_classes:
                found.append(f"its label is {text[:20]!r}, not one of 0 to {self.num_classes - 1}")
                continue
            others = {name: piece(of[place]) for name, of in members.items()}
            found.append(_Content(piece(image) or b"", number, others))
        return found

    def fixed_batches(self, batch_size: int) -> FixedBatches:
        """The split in the manifest's order, the same on every rank, in batches of exactly ``batch_size``."""
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        return FixedBatches(self, batch_size)


class FixedBatches(Sequence["EvaluationBatch"]):
    """A split in batches of one size, each read when it is asked for.

    The last one is filled up by repeating from the start; ``valid`` [b] says which rows count. A damaged sample does
    not: another one stands in its row, and it is told once. Raises CorruptSampleError where that does not help (images
    of another size, say), OSError for a lost server or a full disk.
    """

    def __init__(self, dataset: ShardedDataset, batch_size: int) -> None:
        self.dataset, self.batch_size = dataset, batch_size

    def __len__(self) -> int:
        return -(-len(self.dataset) // self.batch_size)

    def __getitem__(self, number: int) -> EvaluationBatch:  # type: ignore[override]
        if not 0 <= number < len(self):
            raise IndexError(f"batch {number} of {len(self)}")
        position = torch.arange(number * self.batch_size, (number + 1) * self.batch_size)
        index = position % len(self.dataset)
        try:
            pixels, labels, _, rows, bad = self.dataset.read_or_replace(index.numpy())
        except ValueError as error:
            raise CorruptSampleError(str(error)) from error
        for sample in bad:
            if (where := self.dataset.where(sample.row)) not in _told:
                _told.add(where)
                print(f"evaluation leaves out a sample that it cannot use: {sample.why}", file=sys.stderr, flush=True)
        valid = (position < len(self.dataset)) & torch.eq(torch.from_numpy(rows), index)
        return EvaluationBatch(index, to_unit_range(pixels[0]), labels, valid)


_told: set[str] = set()  # damaged samples of evaluation: once in a process, however often a batch is read


@dataclass(frozen=True)
class EvaluationBatch:
    """index int64 [b], images float32 [b, c, h, w] in [-1, 1], labels int64 [b], valid bool [b].

    Rows that are not valid repeat the split's first samples to fill up the last batch, or show another sample where
    their own, which the index names, is damaged.
    """

    index: Tensor
    images: Tensor
    labels: Tensor
    valid: Tensor

    def to(self, device: torch.device | str) -> EvaluationBatch:
        """The batch on ``device``."""
        return EvaluationBatch(
            self.index.to(device), self.images.to(device), self.labels.to(device), self.valid.to(device)
        )


def to_unit_range(pixels: Tensor) -> Tensor:
    """8-bit pixels to [-1, 1]: p / 127.5 - 1. uint8 [...] in, float32 [...] out."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


# ── batches by number ───────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: index int64 [b] (in the split), pixels uint8 [v, b, c, h, w] of one or more
    views, labels int64 [b] (-1 without one), the epoch that all belong to, the samples that were replaced, and what
    other data types see of each, [b, …] by name."""

    index: Tensor
    pixels: Tensor
    labels: Tensor
    epoch: int
    bad: tuple[BadSample, ...] = ()
    members: dict[str, Tensor] = field(default_factory=dict)

    def pin_memory(self) -> Batch:
        """The same in memory from which copies to a GPU run beside the computation."""
        pixels, index, labels = (value.pin_memory() for value in (self.pixels, self.index, self.labels))
        members = {name: value.pin_memory() for name, value in self.members.items()}
        return replace(self, pixels=pixels, index=index, labels=labels, members=members)


class BatchStream:
    """The batches of a training run by number: ``batch(k)`` is the rank's part of global batch k.

    Epochs have ``batches_per_epoch`` batches, on all ranks; `order` says how many samples that leaves out. A global
    batch is cut into contiguous equal parts, one a rank. workers: loader processes; 0 decodes in one background
    thread. Each worker makes whole batches, so that any number of them does.
    """

    def __init__(
        self, dataset: ShardedDataset, order: SampleOrder, rank: int = 0, world_size: int = 1, workers: int = 0
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        check_divisible(order, world_size, f"split {dataset.split!r} of {dataset.index.folder}")
        self.dataset, self.order, self.rank, self.workers = dataset, order, rank, workers
        self.local_batch = order.global_batch // world_size
        self.batches_per_epoch = order.batches_per_epoch

    def __str__(self) -> str:
        """How long an epoch is, for people."""
        order, split = self.order, self.dataset.split
        left_out = f", {order.remainder:,} other samples left out in each" if order.remainder else ""
        return (
            f"{split}: {order.samples:,} samples, {order.batches_per_epoch:,} global batches of "
            f"{order.global_batch:,} an epoch{left_out}"
        )

    def indices(self, number: int) -> Rows:
        """Which samples the rank sees in global batch `number`: int64 [b]."""
        if number < 0:
            raise ValueError(f"batches are counted from 0; there is no batch {number}")
        return self.order.batch(number, self.rank * self.local_batch, (self.rank + 1) * self.local_batch)

    def batch(self, number: int) -> Batch:
        """The rank's part of global batch `number`, read and decoded here and now."""
        epoch = number // self.batches_per_epoch
        pixels, labels, members, rows, bad = self.dataset.read_or_replace(self.indices(number), epoch)
        return Batch(torch.from_numpy(rows), pixels, labels, epoch, tuple(bad), members)

    def iterate(
        self, start: int, stop: int, interrupted: Callable[[], bool] = lambda: False
    ) -> Generator[Batch, None, None]:
        """Batches start … stop - 1 in order, the next ones being decoded meanwhile.

        An error surfaces at the batch that it belongs to; closing the iterator ends thread or processes. interrupted:
        asked while a batch is waited for; raises InterruptedError once it says so. Raises OSError where a loader
        process ended by itself.
        """
        numbers = range(start, stop)
        if self.workers and len(numbers):
            _short_sockets()
            loader = DataLoader(
                _BatchOrError(self),
                batch_size=None,
                sampler=numbers,
                num_workers=min(self.workers, len(numbers)),
                prefetch_factor=PREFETCH,
                pin_memory=torch.cuda.is_available(),
                generator=torch.Generator(),  # the loader would otherwise draw from torch's global one
            )
            ahead = _Ahead(_loaded(loader), 1)
        else:
            ahead = _Ahead(map(self.batch, numbers), PREFETCH - 1)
        try:
            for number in numbers:
                yield ahead.get(interrupted, f"global batch {number} of split {self.dataset.split!r}")
        finally:
            ahead.close()


class _Ahead:
    """Items of an iterator, made by a thread some ahead of their use; waiting for one can be interrupted, whatever the
    thread is doing then. It is a daemon: a request that has no answer must not keep the process from ending."""

    CLOSING = 5.0  # seconds for what is under way when it is closed; fewer where waiting for it was given up

    def __init__(self, items: Iterator[Batch | Exception], ahead: int) -> None:
        self._items, self._queue, self._closed = items, queue.Queue[Batch | BaseException](max(1, ahead)), False
        self._thread = threading.Thread(target=self._make, name="batches", daemon=True)
        self._thread.start()

    def _make(self) -> None:
        try:
            for item in self._items:
                self._put(item)
                if self._closed:
                    return
        except BaseException as error:
            self._put(error)

    def _put(self, item: Batch | BaseException) -> None:
        while not self._closed:
            with suppress(queue.Full):
                self._queue.put(item, timeout=0.1)
                return

    def get(self, interrupted: Callable[[], bool], what: str) -> Batch:
        began = said = time.monotonic()
        while True:
            try:
                item = self._queue.get(timeout=0.2)
                break
            except queue.Empty:
                if interrupted():
                    self.CLOSING = 0.5
                    raise InterruptedError(f"told to end while waiting for {what}") from None
                if time.monotonic() - said > SILENCE:
                    said = time.monotonic()
                    print(f"waiting for {what} since {said - began:.0f} s", file=sys.stderr, flush=True)
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._closed = True
        self._thread.join(timeout=self.CLOSING)


def _loaded(loader: DataLoader[Batch | Exception]) -> Iterator[Batch | Exception]:
    """What the loader's processes make. They start here and now; OSError where one of them is lost later."""
    handler = signal.getsignal(signal.SIGCHLD)
    items = iter(loader)
    if threading.current_thread() is threading.main_thread():
        # torch's own handler would raise a lost process as an error in whatever the main thread does at that moment, a
        # collective, say. Without it the loader finds out by itself, within 5 s of waiting.
        signal.signal(signal.SIGCHLD, handler)

    def each() -> Iterator[Batch | Exception]:
        try:
            yield from items
        except (RuntimeError, OSError, EOFError) as error:  # errors of the data are items, they are not raised here
            why = (str(error) or repr(error)).splitlines()[0]
            raise OSError(
                f"a loader process ended by itself ({why}): for want of memory, or of room in /dev/shm? Try fewer "
                "data.workers"
            ) from error

    return each()


SILENCE = 30.0  # seconds after which a wait is told
_SOCKET_PATH = 107 - len("/pymp-01234567/listener-01234567")  # what the system allows, less what is put behind it


def _short_sockets() -> None:
    """Loader processes hand over memory through sockets in the temporary folder, whose path must not be long; where it
    is, they go to a private one under /tmp."""
    if len(os.fsencode(tempfile.gettempdir())) > _SOCKET_PATH:
        own, tempfile.tempdir = tempfile.tempdir, "/tmp"
        try:
            multiprocessing.util.get_temp_dir()  # made once for this process and its children, removed at its end
        finally:
            tempfile.tempdir = own


def check_divisible(order: SampleOrder, world_size: int, what: str) -> None:
    """ValueError, naming numbers that work, unless ranks get equal parts of a batch that the split can fill."""
    batch, samples, streams = order.global_batch, order.samples, order.streams

    def good_batch(ranks: int) -> bool:
        return batch <= samples and batch % ranks == 0

    def good_streams(ranks: int) -> bool:
        return streams == 1 or streams % ranks == 0

    def multiples(number: int) -> list[int]:
        """Of the ranks, around a number."""
        below = number // world_size * world_size
        return [size for size in (below, below + world_size) if size]

    if good_batch(world_size) and good_streams(world_size):
        return
    if batch > samples:
        wrong = f"the global batch of {batch} is larger than {what}, which has {samples} samples"
    elif batch % world_size:
        wrong = f"the global batch of {batch} cannot be split evenly over {world_size} ranks"
    else:
        wrong = f"{streams} streams (data.streams) cannot be shared evenly by {world_size} ranks"
    changes, ways = [], []
    if not good_batch(world_size):
        sizes = [size for size in multiples(min(batch, samples)) if size <= samples]
        changes.append(f"a global batch of {_either(sizes)}")
    if not good_streams(world_size):
        changes.append(f"data.streams={_either(multiples(streams))} (another order of samples)")
    if world_size <= samples:
        ways.append(" with ".join(changes))
    if ranks := [n for n in range(1, 2 * world_size + 1) if good_batch(n) and good_streams(n)]:
        ways.append(f"{_either(ranks)} rank{'' if ranks == [1] else 's'}")
    raise ValueError(f"{wrong}: use {', or '.join(ways) or f'1 rank and a global batch of at most {samples}'}")


def _either(numbers: Sequence[int]) -> str:
    return " or ".join(map(str, numbers))


class _BatchOrError(Dataset["Batch | Exception"]):
    """What a loader process runs. An error comes back as a value: raised there, torch would bury its message in the
    worker's traceback, and keep the processes waiting in a reference cycle."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __getitem__(self, number: int) -> Batch | Exception:
        try:
            return self.stream.batch(number)
        except (OSError, ValueError) as error:
            return error
