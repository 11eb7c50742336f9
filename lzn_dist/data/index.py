"""Which samples a folder of WebDataset shards holds, and where their bytes lie.

A folder has shards ``SPLIT-000000.tar`` … (plain tars; a sample is the members that share a key), a ``manifest.json``
that people read (shards with their samples, bytes and SHA-256; classes; where the data is from), and beside it one
``SPLIT.index.npz`` a split that machines read: the keys and the byte offsets of all members. With offsets, sample i is
one read, and an epoch's order may be any function. Without a manifest a local folder is scanned once, header by header.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import sys
import tarfile
import threading
import zipfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from lzn_dist.data.storage import LocalStorage, Storage, is_remote, open_storage
from lzn_dist.json_files import Text, parse_json
from lzn_dist.paths import plain_name

MANIFEST = "manifest.json"
_MANIFEST_BYTES = 256 << 20  # what a server may answer at most: a manifest of two million shards has as many bytes,
_INDEX_SAMPLE = 4096  # and a sample's part of an index is its key, of 255 characters at most, and a few offsets
FORMAT = 2
IMAGE_EXTENSIONS = (
    "jpg", "jpeg", "png", "webp", "ppm", "pgm", "bmp", "jfif", "jpe", "tif", "tiff", "gif", "avif",
)  # fmt: skip
LABEL_EXTENSION = "cls"
SPLITS = {
    "train": ("train", "training", "trn"),
    "val": ("val", "valid", "validation", "dev", "devel", "development"),
    "test": ("test", "testing", "tst", "eval", "evaluation"),
}
_OFFSETS = "offsets."  # before the extension, in an index file
ABSENT = -1  # the offset of a member that a sample lacks
_SHARD_NAME = re.compile(r"(?P<split>.+)-\d+\.tar")


def split_name(name: str) -> str | None:
    """train, val or test for what people call these; None for other names."""
    plain = re.sub(r"[-_ ]?(set|split|data|images)$", "", name.strip().lower())
    return next((split for split, names in SPLITS.items() if plain in names), None)


Count = Annotated[int, Field(ge=0, lt=2**53)]


@dataclass(frozen=True)
class Shard:
    """One tar. sha256 is empty where the tar was scanned without reading its contents."""

    name: Text
    samples: Count
    bytes: Count
    sha256: str = ""


@dataclass(frozen=True)
class Split:
    """The samples of a split in the manifest's order: shard after shard, each from front to back.

    keys: bytes (UTF-8) [n]. offsets: extension -> int64 [n, 2], the first byte in the tar and the number of bytes;
    (ABSENT, 0) where a sample has no such member.
    """

    shards: tuple[Shard, ...]
    keys: NDArray[np.bytes_]
    offsets: dict[str, NDArray[np.int64]]

    def __len__(self) -> int:
        return len(self.keys)

    @cached_property
    def ends(self) -> NDArray[np.int64]:
        """For each shard the number of samples up to its end."""
        return np.cumsum([shard.samples for shard in self.shards], dtype=np.int64)

    def shard_of(self, row: int) -> Shard:
        return self.shards[int(np.searchsorted(self.ends, row, side="right"))]

    def key(self, row: int) -> str:
        return self.keys[row].decode("utf-8", "surrogateescape")

    @cached_property
    def images(self) -> NDArray[np.int64]:
        """Where each sample's image lies: int64 [n, 2]. ValueError where no sample has one."""
        tables = [self.offsets[extension] for extension in IMAGE_EXTENSIONS if extension in self.offsets]
        if not tables:
            raise ValueError(f"no images ({', '.join(IMAGE_EXTENSIONS)}) among {sorted(self.offsets)}")
        found = tables[0].copy()
        for table in tables[1:]:
            missing = found[:, 0] == ABSENT
            found[missing] = table[missing]
        return found

    @cached_property
    def labels(self) -> NDArray[np.int64] | None:
        """Where each sample's label lies: int64 [n, 2]; None where no sample has one."""
        return self.offsets.get(LABEL_EXTENSION)


def tar_members(path: Path, file: io.RawIOBase | None = None) -> Iterator[tarfile.TarInfo]:
    """The files in a tar without compression. file: the tar's own bytes, where it is not a file of its own but lies
    inside another; path then only names it. ValueError, naming path, where it is damaged."""
    try:
        with tarfile.open(path, "r:", fileobj=file) as tar:
            yield from (member for member in tar if member.isfile())
            # tarfile takes a damaged header for the end of the archive, and the images behind it would be lost unsaid
            assert tar.fileobj is not None
            tar.fileobj.seek(tar.offset)
            if tar.fileobj.read(tarfile.BLOCKSIZE) != tarfile.NUL * tarfile.BLOCKSIZE:
                raise tarfile.ReadError(f"damaged or cut off at byte {tar.offset:,}")
    except tarfile.TarError as error:
        raise ValueError(f"{path}: not a readable tar without compression: {error}") from error


def sample_of(name: str) -> tuple[str, str] | None:
    """A member's key and extension: the key ends at the first dot of the file's name, as webdataset has it.

    None where the member is no part of a sample: without a key or an extension, or hidden, as what a Mac adds to each
    file (``._x.jpg``, ``.DS_Store``, ``__MACOSX/``; webdataset takes files of hidden folders). ``./`` means nothing.
    """
    *folders, file = (part for part in name.split("/") if part not in ("", "."))
    stem, dot, extension = file.partition(".")
    if not stem or not dot or any(folder.startswith(".") or folder == "__MACOSX" for folder in folders):
        return None
    return "/".join([*folders, stem]), extension.lower()


def scan_tar(path: Path, passed_over: list[str] | None = None) -> tuple[list[str], list[dict[str, tuple[int, int]]]]:
    """Keys and members (extension -> offset, size) of a tar's samples, from its headers. passed_over: takes the names
    of members that are none. ValueError if unreadable, or where two members would be the same part of a sample."""
    samples: dict[str, dict[str, tuple[int, int]]] = {}
    for member in tar_members(path):
        found = sample_of(member.name)
        if found is None:
            if passed_over is not None:
                passed_over.append(member.name)
            continue
        key, extension = found
        sample = samples.setdefault(key, {})
        if extension in sample:
            raise ValueError(f"{path}: two members are {key}.{extension}: give each sample a name of its own")
        sample[extension] = (member.offset_data, member.size)
    return list(samples), list(samples.values())


def make_split(parts: Iterable[tuple[Shard, list[str], list[dict[str, tuple[int, int]]]]]) -> Split:
    """Join what `scan_tar` says of several shards."""
    shards: list[Shard] = []
    keys: list[bytes] = []
    members: list[dict[str, tuple[int, int]]] = []
    for shard, names, found in parts:
        shards.append(shard)
        keys += [name.encode("utf-8", "surrogateescape") for name in names]
        members += found
    extensions = sorted({extension for sample in members for extension in sample})
    offsets = {
        extension: np.array([sample.get(extension, (ABSENT, 0)) for sample in members], dtype=np.int64).reshape(-1, 2)
        for extension in extensions
    }
    return Split(tuple(shards), np.array(keys, dtype=np.bytes_), offsets)


def hash_file(path: Path, stop: threading.Event | None = None) -> str:
    """SHA-256 of a file's bytes in hexadecimal digits; of its beginning where another thread sets `stop`."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while not (stop and stop.is_set()) and (block := file.read(1 << 20)):
            digest.update(block)
    return digest.hexdigest()


def _index_name(split: str) -> str:
    return f"{split}.index.npz"


def write_manifest(
    folder: Path, splits: dict[str, Split], *, source: str, tool: str, classes: Iterable[str] = (), **more: Any
) -> None:
    """Write manifest.json and the index files; the bytes are a function of the arguments."""
    entries: dict[str, Any] = {}
    for name, split in splits.items():
        tables = {f"{_OFFSETS}{extension}": table for extension, table in split.offsets.items()}
        temporary = folder / f".{_index_name(name)}"
        with temporary.open("wb") as file:
            np.savez_compressed(file, keys=split.keys, **tables)  # type: ignore[arg-type]
        temporary.replace(folder / _index_name(name))
        entries[name] = {
            "samples": len(split),
            "index": {"name": _index_name(name), "sha256": hash_file(folder / _index_name(name))},
            "shards": [vars(shard) for shard in split.shards],
        }
    manifest = {"format": FORMAT, "source": source, "tool": tool, **more, "classes": list(classes), "splits": entries}
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps(manifest, indent=1) + "\n")
    temporary.replace(folder / MANIFEST)  # last: a folder with a manifest is complete


@dataclass(frozen=True)
class _IndexFile:
    name: Text
    sha256: str


@dataclass(frozen=True)
class _Entry:
    """A split in the manifest."""

    samples: Count
    index: _IndexFile
    shards: list[Shard]


@dataclass(frozen=True)
class _Manifest:
    """What is read of manifest.json."""

    format: int
    splits: dict[str, _Entry]
    classes: list[Text]
    source: Text = ""
    counts: dict[str, list[Count]] = field(default_factory=dict)


@dataclass(frozen=True)
class ShardIndex:
    """Which shards a folder holds, by split, and where each sample lies in them.

    source: what they were made from; counts: by split, how many samples each class has; identity: a hash of the
    manifest. All empty for a folder that was scanned.
    """

    folder: str
    storage: Storage
    splits: dict[str, Split]
    classes: tuple[str, ...] = ()
    source: str = ""
    counts: dict[str, list[int]] = field(default_factory=dict)
    identity: str = ""

    @staticmethod
    def load(folder: str | Path, cache: str | Path = "", retry_seconds: float = 600.0) -> ShardIndex:
        """Read the manifest, or scan the tars of a local folder where there is none.

        folder: a path, or a URL (http, https, and what fsspec knows: s3, gs, …) that must have a manifest; its shards
        are kept in the folder `cache` as far as they are read. FileNotFoundError where there are no shards or one is
        missing, ValueError where a shard has another size than the manifest says or the manifest cannot be read.
        """
        folder = str(folder)
        storage = open_storage(folder, cache, retry_seconds)
        if isinstance(storage, LocalStorage) and not (Path(folder) / MANIFEST).is_file():
            return ShardIndex.scan(folder)
        try:
            text = storage.read_file(MANIFEST, _MANIFEST_BYTES)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{folder} has no {MANIFEST}: {_how_to_write(folder)}") from error
        try:
            manifest = parse_json(text, _Manifest, MANIFEST)
            if manifest.format != FORMAT:
                raise ValueError(f"it has format {manifest.format}, this version of lzn_dist reads {FORMAT}")
            splits = {
                plain_name(name, "a split"): _read_split(storage, entry) for name, entry in manifest.splits.items()
            }
        except ValueError as error:
            raise ValueError(
                f"{folder}/{MANIFEST}: not a manifest of shards ({error}): {_how_to_write(folder)}"
            ) from error
        identity = hashlib.sha256(text).hexdigest()
        storage.know(identity, {shard.name: shard.bytes for split in splits.values() for shard in split.shards})
        index = ShardIndex(folder, storage, splits, tuple(manifest.classes), manifest.source, manifest.counts, identity)
        index._check_sizes()
        return index

    @staticmethod
    def scan(folder: str | Path) -> ShardIndex:
        """Build the index from the tars ``SPLIT-000000.tar`` … alone; the classes stay unknown."""
        found: dict[str, list[Path]] = {}
        for path in sorted(Path(folder).glob("*.tar")):
            if match := _SHARD_NAME.fullmatch(path.name):
                found.setdefault(match["split"], []).append(path)
        if not found:
            raise FileNotFoundError(f"no shards (SPLIT-000000.tar …) in {folder}: {_how_to_write(str(folder))}")
        splits: dict[str, Split] = {}
        passed_over: list[str] = []
        for name, paths in found.items():
            scanned = [(path, *scan_tar(path, passed_over)) for path in paths]
            splits[name] = make_split(
                (Shard(path.name, len(keys), path.stat().st_size), keys, members) for path, keys, members in scanned
            )
        if passed_over and os.environ.get("RANK", "0") == "0":
            print(
                f"{folder}: {len(passed_over):,} members are hidden or have no extension, and are passed over "
                f"(the first: {passed_over[0]})", file=sys.stderr,
            )  # fmt: skip
        return ShardIndex(str(folder), LocalStorage(Path(folder)), splits)

    def split(self, name: str) -> Split:
        """A split; ValueError naming those that there are."""
        if name not in self.splits:
            raise ValueError(f"{self.folder} has no split {name!r}; it has {sorted(self.splits)}")
        return self.splits[name]

    def label(self, split: Split, row: int) -> int:
        """A sample's label, −1 without one. ValueError where it is no number."""
        if split.labels is None or split.labels[row, 0] == ABSENT:
            return -1
        return int(self.storage.read(split.shard_of(row).name, *split.labels[row].tolist()))

    def samples(self, split: str) -> int:
        """How many samples a split has."""
        return len(self.split(split))

    def path(self, shard: Shard) -> str:
        """Where a shard is, for messages."""
        return f"{self.folder}/{shard.name}"

    def _check_sizes(self) -> None:
        if is_remote(self.folder):
            return  # one request a shard: what is short is found when it is read
        for shard in (shard for split in self.splits.values() for shard in split.shards):
            size = self.storage.size(shard.name)
            if size is None:
                raise FileNotFoundError(
                    f"{self.path(shard)} is missing, though {MANIFEST} names it: {_how_to_write(self.folder)}"
                )
            if size != shard.bytes:
                raise ValueError(
                    f"{self.path(shard)} has {size} bytes, {MANIFEST} says {shard.bytes}: {_how_to_write(self.folder)}"
                )


def _read_split(storage: Storage, entry: _Entry) -> Split:
    """Raises ValueError where the index is not the one of these shards."""
    name = plain_name(entry.index.name, "an index")
    for shard in entry.shards:
        plain_name(shard.name, "a shard")
    limit = _INDEX_SAMPLE * entry.samples + (1 << 20)
    try:
        content = storage.read_file(name, limit)
    except FileNotFoundError as error:
        raise ValueError(f"{name} is missing") from error
    if hashlib.sha256(content).hexdigest() != entry.index.sha256:
        raise ValueError(f"{name} is not the file that was written with it")
    if not entry.shards:
        raise ValueError(f"{name} is of a split without samples")
    # whoever wrote the manifest wrote this too: the digest says nothing of what it is
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if sum(member.file_size for member in archive.infolist()) > limit:
                raise ValueError("it unpacks to far more than its samples need")
        with np.load(io.BytesIO(content), allow_pickle=False) as tables:
            keys = tables["keys"]
            found = {key.removeprefix(_OFFSETS): tables[key] for key in tables.files if key.startswith(_OFFSETS)}
    except Exception as error:  # numpy's header alone can raise SyntaxError, TokenError, MemoryError and others
        raise ValueError(f"{name} is not an index ({error})") from error
    count = sum(shard.samples for shard in entry.shards)
    if keys.dtype.kind != "S" or not keys.shape == (count,) == (entry.samples,):
        raise ValueError(f"{name} has not the {entry.samples} samples of its shards")
    sizes = np.repeat([shard.bytes for shard in entry.shards], [shard.samples for shard in entry.shards])
    for extension, table in found.items():
        if table.dtype != np.int64 or table.shape != (entry.samples, 2):
            raise ValueError(f"{name}: {extension} has no first byte and size for each sample")
        first, size = table.T
        inside = (first >= 0) & (size >= 0) & (first <= sizes) & (size <= sizes - first)
        if not np.all(inside | ((first == ABSENT) & (size == 0))):
            raise ValueError(f"{name}: {extension} of a sample lies outside of its shard")
    return Split(tuple(entry.shards), keys, found)


def _how_to_write(folder: str) -> str:
    return (
        f"write the shards with the script of your data set in data_prep/ (python data_prep/image_folder.py --help), "
        f"or point data.shards at a folder that has them (now {folder})"
    )
