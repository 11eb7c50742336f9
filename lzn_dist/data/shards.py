"""WebDataset shards, read at random through byte offsets, and batches as a pure function of the step.

WebDataset reads tars from front to back; its shuffling depends on workers, ranks and the place in the shard, and
it has no state to save. Here a manifest (or one scan of the tars) says where every member lies, so that sample i
is one read, the order of an epoch is a keyed permutation, and **the step is the whole cursor**: batch k holds the
same samples on any number of ranks, after any resume. The bytes then go through webdataset's own decoders.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
import tarfile
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import webdataset as wds
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from webdataset.autodecode import DecodingError

from lzn_dist.keyed_random import make_key, permutation

MANIFEST = "manifest.json"
IMAGE_EXTENSIONS = ("png", "jpg", "jpeg", "webp", "ppm", "pgm")
LABEL_EXTENSION = "cls"
NO_LABEL = -1
_OPEN_SHARDS = 128  # file descriptors a data set keeps; a process may often have no more than 1,024
_PREFETCH = 2  # batches decoded ahead
_SHARD_NAME = re.compile(r"(?P<split>.+)-\d+\.tar")


class CorruptSampleError(RuntimeError):
    """A sample that cannot be read or decoded; the message names its shard and key."""


# ---------------------------------------------------------------------------------------------- where samples lie


@dataclass(frozen=True)
class Shard:
    """One tar: the keys of its n samples in order, and for each extension where the members' bytes lie.

    offsets: extension -> int64 [n, 2], the position of the first byte in the tar and the number of bytes.
    sha256 is None where the tar was scanned without reading its contents.
    """

    name: str
    bytes: int
    sha256: str | None
    keys: tuple[str, ...]
    offsets: dict[str, np.ndarray[Any, np.dtype[np.int64]]]

    @property
    def samples(self) -> int:
        return len(self.keys)

    @property
    def image_extension(self) -> str | None:
        return next((e for e in IMAGE_EXTENSIONS if e in self.offsets), None)


def scan_shard(path: Path) -> Shard:
    """Read a tar's headers, not its contents. ValueError where its samples do not all have the same members."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.isfile():
                    folder, _, file = member.name.rpartition("/")
                    stem, _, extension = file.partition(".")  # webdataset: the key ends at the first dot
                    key = f"{folder}/{stem}" if folder else stem
                    samples.setdefault(key, {})[extension.lower()] = (member.offset_data, member.size)
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar without compression: {error}") from error
    extensions = set(next(iter(samples.values()), {}))
    for key, members in samples.items():
        if set(members) != extensions:
            raise ValueError(f"{path}: sample {key} has {sorted(members)}, the shard's first has {sorted(extensions)}")
    offsets = {e: np.array([m[e] for m in samples.values()], dtype=np.int64) for e in sorted(extensions)}
    return Shard(path.name, path.stat().st_size, None, tuple(samples), offsets)


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes in hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_manifest(folder: Path, *, source: str, classes: Sequence[str], tool: str) -> None:
    """Describe the shards ``SPLIT-000000.tar`` … of ``folder`` in its manifest.json; deterministic bytes."""
    splits: dict[str, Any] = {}
    for split, shards in ShardIndex.scan(folder).splits.items():
        entries = [
            {
                "name": shard.name,
                "samples": shard.samples,
                "bytes": shard.bytes,
                "sha256": hash_file(folder / shard.name),
                "keys": list(shard.keys),
                "offsets": {extension: table.tolist() for extension, table in shard.offsets.items()},
            }
            for shard in shards
        ]
        splits[split] = {"samples": sum(shard.samples for shard in shards), "shards": entries}
    manifest = {"format": 1, "source": source, "tool": tool, "classes": list(classes), "splits": splits}
    temporary = folder / f".{MANIFEST}.{os.getpid()}"
    temporary.write_text(json.dumps(manifest))
    temporary.replace(folder / MANIFEST)


@dataclass(frozen=True)
class ShardIndex:
    """Which shards a folder holds, by split, and where each sample lies in them."""

    folder: Path
    splits: dict[str, tuple[Shard, ...]]
    classes: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: str | Path) -> ShardIndex:
        """Read the manifest, or scan the tars where there is none.

        FileNotFoundError where the folder has no shards or lacks one that the manifest names, ValueError where a
        shard has another size than the manifest says or the manifest cannot be read.
        """
        folder = Path(folder)
        if not (folder / MANIFEST).is_file():
            return cls.scan(folder)
        try:
            manifest = json.loads((folder / MANIFEST).read_text())
            splits = {
                split: tuple(
                    Shard(
                        s["name"],
                        s["bytes"],
                        s["sha256"],
                        tuple(s["keys"]),
                        {e: np.array(table, dtype=np.int64).reshape(-1, 2) for e, table in s["offsets"].items()},
                    )
                    for s in entry["shards"]
                )
                for split, entry in manifest["splits"].items()
            }
            classes = tuple(manifest["classes"])
        except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{folder / MANIFEST}: not a manifest of shards: {error!r}") from error
        for shard in (shard for shards in splits.values() for shard in shards):
            path = folder / shard.name
            if not path.is_file():
                raise FileNotFoundError(f"{path} is missing, though {MANIFEST} names it: {_how_to_write(folder)}")
            if path.stat().st_size != shard.bytes:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, {MANIFEST} says {shard.bytes}: {_how_to_write(folder)}"
                )
        return cls(folder, splits, classes)

    @classmethod
    def scan(cls, folder: str | Path) -> ShardIndex:
        """Build the index from the tars ``SPLIT-000000.tar`` … alone; the classes stay unknown."""
        folder = Path(folder)
        splits: dict[str, tuple[Shard, ...]] = {}
        for path in sorted(folder.glob("*.tar")):
            if match := _SHARD_NAME.fullmatch(path.name):
                splits[match["split"]] = (*splits.get(match["split"], ()), scan_shard(path))
        if not splits:
            raise FileNotFoundError(f"no shards (SPLIT-000000.tar …) in {folder}: {_how_to_write(folder)}")
        return cls(folder, splits)

    def shards(self, split: str) -> tuple[Shard, ...]:
        """The shards of a split; ValueError naming the splits that there are."""
        if split not in self.splits:
            raise ValueError(f"{self.folder} has no split {split!r}; it has {sorted(self.splits)}")
        return self.splits[split]

    def samples(self, split: str) -> int:
        """How many samples a split has."""
        return sum(shard.samples for shard in self.shards(split))

    def verify(self) -> None:
        """Read every shard in full; ValueError naming the first whose hash is not the manifest's."""
        for shard in (shard for shards in self.splits.values() for shard in shards):
            if shard.sha256 is not None and hash_file(self.folder / shard.name) != shard.sha256:
                raise ValueError(f"{self.folder / shard.name}: its SHA-256 is not the one in {MANIFEST}")


def _how_to_write(folder: Path) -> str:
    return (
        f"write them with `python data_prep/digits.py --output {folder}` (digits) or the script of your data set in "
        "data_prep/, or point data.shards at a folder that has them"
    )


# ------------------------------------------------------------------------------------------------ samples by index


class _Descriptor:
    """An open file that closes when its last user lets go; pread has no position, so threads and forks share it."""

    def __init__(self, path: Path) -> None:
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "number"):
            os.close(self.number)


@dataclass(frozen=True)
class EvaluationBatch:
    """index int64 [b], images float32 [b, c, h, w] in [-1, 1], labels int64 [b], valid bool [b].

    Rows that are not valid repeat the split's first samples to fill up the last batch.
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


class ShardedDataset(Dataset[tuple[Tensor, int]]):
    """The samples of a split by their index in the manifest's order: ``dataset[i] -> (uint8 [c, h, w], label)``.

    ``channels`` is 1 (grey) or 3 (RGB); images are converted. ``image_size`` is the height and width that they must
    have: shards are written at the size of training. The label is -1 where samples have no ``cls``.
    ``cache_decoded`` keeps each decoded image, n·c·h·w bytes in all, ``shared`` with forked loader processes.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        channels: int,
        image_size: int,
        cache_decoded: bool = False,
        shared: bool = False,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB), not {channels}")
        self.index, self.split, self.channels, self.image_size = index, split, channels, image_size
        self.shards = index.shards(split)
        for shard in self.shards:
            if shard.image_extension is None:
                path = index.folder / shard.name
                raise ValueError(f"{path}: no images ({', '.join(IMAGE_EXTENSIONS)}) among {sorted(shard.offsets)}")
        self._ends = np.cumsum([shard.samples for shard in self.shards])
        self._descriptor = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Descriptor)
        self._cache: tuple[Tensor, Tensor, Tensor] | None = None
        if cache_decoded:
            n = len(self)
            self._cache = (
                torch.empty(n, channels, image_size, image_size, dtype=torch.uint8),
                torch.empty(n, dtype=torch.int64),
                torch.zeros(n, dtype=torch.bool),  # which rows are there; written last
            )
            if shared:
                for tensor in self._cache:
                    tensor.share_memory_()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_descriptor"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._descriptor = functools.lru_cache(maxsize=_OPEN_SHARDS)(_Descriptor)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        images, labels = self.read([i])
        return images[0], int(labels[0])

    def raw(self, i: int) -> dict[str, Any]:
        """The undecoded sample, as webdataset has it: its key, its shard as ``__url__``, bytes by extension."""
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)} in split {self.split!r}")
        number = int(np.searchsorted(self._ends, i, side="right"))
        shard = self.shards[number]
        row = i - (int(self._ends[number - 1]) if number else 0)
        path = self.index.folder / shard.name
        sample: dict[str, Any] = {"__key__": shard.keys[row], "__url__": str(path)}
        descriptor = self._descriptor(path)
        for extension in (shard.image_extension, LABEL_EXTENSION):
            if extension is not None and extension in shard.offsets:
                offset, size = shard.offsets[extension][row].tolist()
                sample[extension] = os.pread(descriptor.number, size, offset)
                if len(sample[extension]) != size:
                    raise CorruptSampleError(f"{path}: sample {shard.keys[row]}: the shard ends inside {extension}")
        return sample

    def read(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Decode samples: uint8 [b, c, h, w] and int64 [b]. CorruptSampleError names shard and key."""
        if self._cache is None:
            return self._decode(rows)
        images, labels, present = self._cache
        wanted = torch.as_tensor(rows, dtype=torch.int64)
        missing = wanted[~present[wanted]].unique()
        if len(missing):
            images[missing], labels[missing] = self._decode(missing.tolist())
            present[missing] = True
        return images[wanted], labels[wanted]

    def _decode(self, rows: Iterable[int]) -> tuple[Tensor, Tensor]:
        images_as = wds.imagehandler("torchl8" if self.channels == 1 else "torchrgb8", IMAGE_EXTENSIONS)
        pipeline = wds.DataPipeline(
            lambda: (self.raw(row) for row in rows),
            wds.decode(images_as),
            wds.map(self._check),
            wds.to_tuple("image", "label"),
        )
        try:
            images, labels = zip(*pipeline, strict=True)
        except DecodingError as error:
            raise CorruptSampleError(
                f"{error.url}: sample {error.key}: cannot decode {error.k}: {error.__cause__}"
            ) from error
        return torch.stack(images), torch.tensor(labels, dtype=torch.int64)

    def _check(self, sample: dict[str, Any]) -> dict[str, Any]:
        image = next(sample[extension] for extension in IMAGE_EXTENSIONS if extension in sample)
        height, width = image.shape[-2:]
        if (height, width) != (self.image_size, self.image_size):
            raise ValueError(
                f"{sample['__url__']}: sample {sample['__key__']} is {height}x{width} pixels, image_size is "
                f"{self.image_size}: write the shards at that size, or set image_size"
            )
        image = image.reshape(self.channels, height, width)
        return {"__key__": sample["__key__"], "image": image, "label": sample.get(LABEL_EXTENSION, NO_LABEL)}

    def fixed_batches(self, batch_size: int) -> Iterator[EvaluationBatch]:
        """The split in the manifest's order, the same on every rank, in batches of exactly ``batch_size``.

        The last one is filled up by repeating from the start; ``valid`` [b] says which rows count.
        """
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, not {batch_size}")
        for start in range(0, len(self), batch_size):
            position = torch.arange(start, start + batch_size)
            index = position % len(self)
            pixels, labels = self.read(index.tolist())
            yield EvaluationBatch(index, to_unit_range(pixels), labels, position < len(self))


def to_unit_range(pixels: Tensor) -> Tensor:
    """8-bit pixels to [-1, 1]: p / 127.5 - 1. uint8 [...] in, float32 [...] out."""
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)


# ------------------------------------------------------------------------------------------------- batches by step


@dataclass(frozen=True)
class Batch:
    """A rank's part of a global batch: index int64 [b] (in the split), images float32 [b, c, h, w] in [-1, 1],
    labels int64 [b] (-1 without one), and the epoch that all of them belong to."""

    index: Tensor
    images: Tensor
    labels: Tensor
    epoch: int

    def to(self, device: torch.device | str) -> Batch:
        """The batch on ``device``."""
        return Batch(self.index.to(device), self.images.to(device), self.labels.to(device), self.epoch)


class BatchStream:
    """The batches of a training run, addressed by step: ``batch(k)`` is the rank's part of global batch k.

    An epoch is a permutation of the split keyed by (seed, epoch), cut into ``batches_per_epoch`` global batches;
    the remainder (fewer than ``global_batch`` samples, others in each epoch) is dropped. Global batch k of the run
    belongs to epoch ``k // batches_per_epoch`` and is cut into contiguous equal parts, one a rank. So the step is
    the cursor, and a global batch is the same on any number of ranks that divides it.

    ``workers`` is the number of loader processes; 0 decodes in one background thread.
    """

    def __init__(
        self,
        index: ShardIndex,
        split: str,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        channels: int = 1,
        image_size: int = 8,
        cache_decoded: bool = False,
        workers: int = 0,
    ) -> None:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        if global_batch < 1:
            raise ValueError(f"the global batch must be at least 1, not {global_batch}")
        samples = index.samples(split)
        if global_batch > samples:
            raise ValueError(
                f"the global batch of {global_batch} is larger than split {split!r} of {index.folder}, which has "
                f"{samples} samples: use at most {samples}"
            )
        if global_batch % world_size:
            below = global_batch // world_size * world_size
            sizes = [size for size in (below, below + world_size) if 0 < size <= samples]
            ranks = [n for n in range(1, min(global_batch, 2 * world_size) + 1) if global_batch % n == 0]
            raise ValueError(
                f"the global batch of {global_batch} cannot be split evenly over {world_size} ranks: use a global "
                f"batch of {' or '.join(map(str, sizes)) or 'more samples'}, or {' or '.join(map(str, ranks))} ranks"
            )
        self.seed, self.rank, self.workers = seed, rank, workers
        self.global_batch, self.local_batch = global_batch, global_batch // world_size
        self.batches_per_epoch = samples // global_batch
        self.dataset = ShardedDataset(index, split, channels, image_size, cache_decoded, shared=workers > 0)
        self._order: tuple[int, Tensor] | None = None

    def order(self, epoch: int) -> Tensor:
        """The epoch's permutation of the split: int64 [samples]."""
        cached = self._order  # one read, for threads
        if cached is None or cached[0] != epoch:
            cached = (epoch, permutation(make_key(self.seed, "order", epoch), len(self.dataset)))
            self._order = cached
        return cached[1]

    def indices(self, step: int) -> Tensor:
        """Which samples the rank sees in global batch ``step``: int64 [b]."""
        if step < 0:
            raise ValueError(f"batches are counted from 0; there is no batch {step}")
        epoch, number = divmod(step, self.batches_per_epoch)
        start = number * self.global_batch + self.rank * self.local_batch
        return self.order(epoch)[start : start + self.local_batch].clone()

    def batch(self, step: int) -> Batch:
        """The rank's part of global batch ``step``, read and decoded here and now."""
        index = self.indices(step)
        pixels, labels = self.dataset.read(index.tolist())
        return Batch(index, to_unit_range(pixels), labels, step // self.batches_per_epoch)

    def iterate(self, start_step: int, stop_step: int) -> Iterator[Batch]:
        """Batches ``start_step`` … ``stop_step - 1`` in order, the next ones being decoded meanwhile.

        An error surfaces at the batch that it belongs to; closing the iterator ends thread or processes.
        """
        steps = range(start_step, stop_step)
        if self.workers and len(steps):
            loader = DataLoader(
                _BatchOrError(self),
                batch_size=None,
                sampler=steps,
                num_workers=min(self.workers, len(steps)),
                prefetch_factor=_PREFETCH,
                generator=torch.Generator(),  # the loader would otherwise draw from torch's global one
            )
            for item in loader:
                if isinstance(item, Exception):
                    raise item
                yield item
            return
        remaining = iter(steps)
        with ThreadPoolExecutor(1, thread_name_prefix="batches") as reader:
            ahead: deque[Future[Batch]] = deque(reader.submit(self.batch, k) for k in islice(remaining, _PREFETCH))
            try:
                while ahead:
                    batch = ahead.popleft().result()
                    ahead.extend(reader.submit(self.batch, k) for k in islice(remaining, 1))
                    yield batch
            finally:
                reader.shutdown(wait=True, cancel_futures=True)


class _BatchOrError(Dataset["Batch | Exception"]):
    """What a loader process runs. An error comes back as a value: raised there, torch would bury its message in the
    worker's traceback, and keep the processes waiting in a reference cycle."""

    def __init__(self, stream: BatchStream) -> None:
        self.stream = stream

    def __getitem__(self, step: int) -> Batch | Exception:
        try:
            return self.stream.batch(step)
        except (CorruptSampleError, OSError, ValueError) as error:
            return error
