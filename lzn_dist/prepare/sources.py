"""Data sets as their authors publish them, for `prepare`: archives are listed and read without unpacking them."""

from __future__ import annotations

import functools
import gzip
import io
import lzma
import os
import pickle
import tarfile
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from PIL import Image
from tqdm import tqdm

from lzn_dist.data.index import IMAGE_EXTENSIONS, tar_members
from lzn_dist.keyed_random import make_key, permutation
from lzn_dist.prepare.writer import Item, PrepareError, Source
from lzn_dist.terminal import one_line

NO_LABEL = -1


def extension_of(name: str) -> str | None:
    """The extension that an image file's sample gets; None for other files."""
    extension = name.rpartition(".")[2].lower()
    if extension not in IMAGE_EXTENSIONS:
        return None
    return {"jpeg": "jpg", "jpe": "jpg", "jfif": "jpg", "tiff": "tif"}.get(extension, extension)


def key_of(name: str) -> str:
    """A file's path as a key: without its extension, and without the dots at which WebDataset would end it."""
    folder, _, file = name.rpartition("/")
    stem = file.rpartition(".")[0].replace(".", "_")
    return f"{folder}/{stem}" if folder else stem


def png(pixels: np.ndarray) -> bytes:
    """Lossless bytes of pixels uint8 [h, w] or [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def keyed_splits(purpose: str, count: int, held_out: dict[str, int]) -> dict[str, list[int]]:
    """The rows 0 to count of each split, drawn by a keyed permutation: as many as asked for are held out, the rest is
    ``train``."""
    order = permutation(make_key(0, purpose), count).tolist()
    found, start = {}, 0
    for split, size in held_out.items():
        found[split] = order[start : start + size]
        start += size
    return {"train": order[start:], **found}


@functools.lru_cache(maxsize=8)
def _opened(path: Path, process: int) -> int:
    """A descriptor a process: pread has no position."""
    return os.open(path, os.O_RDONLY)


def _pread(path: Path, offset: int, size: int) -> bytes:
    content = os.pread(_opened(path, os.getpid()), size, offset)
    if len(content) != size:
        raise PrepareError(f"{path} ends inside an image: it is not whole, fetch it again")
    return content


def _members(path: Path, file: io.RawIOBase | None = None) -> Iterable[tarfile.TarInfo]:
    """The files in a plain tar; file: as in `tar_members`. Raises PrepareError where it is damaged."""
    try:
        yield from tar_members(path, file)
    except ValueError as error:
        raise PrepareError(f"{error}; fetch it again") from error


_UNPACKED = 1 << 30  # bytes: CIFAR10 has 186 MB, ImageNet's devkit 3


def unpack(path: Path) -> dict[str, bytes]:
    """The files in a small .tar.gz by their paths. Raises PrepareError where it is damaged, or not small unpacked."""

    def bounded(size: int) -> None:
        if size > _UNPACKED:
            raise PrepareError(f"{path} unpacks to more than {_UNPACKED >> 30} GiB: this is not the archive")

    try:
        with tarfile.open(path) as tar:
            files: dict[str, bytes] = {}
            assert tar.fileobj is not None
            for member in tar:  # to find the next, what lies between is unpacked too
                bounded(tar.fileobj.tell() + member.size)
                if member.isfile():
                    files[member.name] = tar.extractfile(member).read()  # type: ignore[union-attr]
            while tar.fileobj.read(1 << 20):  # at the very end gzip compares its check sum
                bounded(tar.fileobj.tell())
            return files
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
        raise PrepareError(f"{path} is not a readable archive ({one_line(error)}): fetch it again") from error


# ── ImageNet ────────────────────────────────────────────────────────────────────────────────────────────────────────


def read_devkit(path: Path) -> tuple[list[str], list[str], list[str]]:
    """ILSVRC2012_devkit_t12.tar.gz: WNIDs of the classes, sorted; their words; the WNID of each validation image.

    meta.mat lists the synsets of the whole hierarchy; the classes are those without children. The validation file has
    an ILSVRC2012_ID a line, for the images in the order of their names.
    """
    from scipy.io import loadmat

    names = ("data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt")
    files = unpack(path)
    contents = {name: content for file, content in files.items() for name in names if file.endswith(name)}
    if len(contents) != len(names):
        raise PrepareError(f"{path} is not ILSVRC2012_devkit_t12.tar.gz: it lacks {' or '.join(names)}")
    try:
        found = loadmat(io.BytesIO(contents[names[0]]), squeeze_me=True, struct_as_record=False)["synsets"]
        leaves = {int(s.ILSVRC2012_ID): (str(s.WNID), str(s.words)) for s in np.atleast_1d(found) if not s.num_children}
    except Exception as error:  # whatever a damaged file makes of scipy's reader
        raise PrepareError(f"{path}: meta.mat cannot be read ({one_line(error)}): fetch it again") from error
    order = sorted(leaves.values())
    try:
        truth = [leaves[int(line)][0] for line in contents[names[1]].split()]
    except KeyError as error:
        raise PrepareError(f"{path}: the validation labels name synset {error}, which is no class") from error
    return [wnid for wnid, _ in order], [words for _, words in order], truth


@dataclass
class ImageNet(Source):
    """ILSVRC2012: the training tar of 1,000 inner tars, the validation tar, the devkit."""

    train: Path
    val: Path
    devkit: Path
    name: str = "ImageNet ILSVRC2012 (CLS-LOC)"

    def archives(self) -> list[Path]:
        return [self.train, self.val, self.devkit]

    def classes(self) -> list[str]:
        wnids, words, _ = read_devkit(self.devkit)
        return [f"{wnid} {word}" for wnid, word in zip(wnids, words, strict=True)]

    def splits(self) -> dict[str, list[Item]]:
        wnids, _, truth = read_devkit(self.devkit)
        number = {wnid: label for label, wnid in enumerate(wnids)}
        return {"train": self._train(number), "val": self._val([number[wnid] for wnid in truth])}

    def _train(self, number: dict[str, int]) -> list[Item]:
        """The inner tars lie in the outer one as they are: their images have a place in it."""
        items: list[Item] = []
        seen: set[str] = set()
        with self.train.open("rb") as file, tqdm(total=len(number), desc="listing", unit="class") as bar:
            for outer in _members(self.train):
                bar.update()
                wnid = PurePosixPath(outer.name).name.removesuffix(".tar")
                if wnid not in number:
                    raise PrepareError(f"{self.train} holds {outer.name}, which is no class of {self.devkit}")
                seen.add(wnid)
                inner_file = _Window(file, outer.offset_data, outer.size)
                for member in _members(self.train / outer.name, inner_file):
                    if extension_of(member.name):
                        where = ("train", outer.offset_data + member.offset_data, member.size)
                        key = key_of(PurePosixPath(member.name).name)
                        items.append(Item(key, "jpg", number[wnid], where, member.size))
        if missing := sorted(number.keys() - seen):
            raise PrepareError(f"{self.train} lacks {len(missing)} classes of {self.devkit}, the first is {missing[0]}")
        return items

    def _val(self, truth: list[int]) -> list[Item]:
        members = sorted(_members(self.val), key=lambda member: member.name)
        members = [member for member in members if extension_of(member.name)]
        if len(members) != len(truth):
            raise PrepareError(f"{self.val} has {len(members)} images, {self.devkit} labels for {len(truth)}")
        return [
            Item(key_of(PurePosixPath(m.name).name), "jpg", label, ("val", m.offset_data, m.size), m.size)
            for m, label in zip(members, truth, strict=True)
        ]

    def read(self, item: Item) -> bytes:
        archive, offset, size = item.where
        return _pread(self.train if archive == "train" else self.val, offset, size)


class _Window(io.RawIOBase):
    """A part of a file as a file."""

    def __init__(self, file: io.BufferedIOBase | Any, start: int, size: int) -> None:
        self.file, self.start, self.length, self.position = file, start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self.position, io.SEEK_END: self.length}[whence]
        self.position = base + offset
        return self.position

    def read(self, size: int = -1) -> bytes:
        left = max(0, self.length - self.position)
        size = left if size < 0 else min(size, left)
        self.file.seek(self.start + self.position)
        content: bytes = self.file.read(size)
        self.position += len(content)
        return content


# ── CIFAR10 ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _PixelsOnly(pickle.Unpickler):
    """A pickle may run any code; one of CIFAR10 needs but these names."""

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return np._core.multiarray._reconstruct  # type: ignore[attr-defined]
        if (module, name) in {("numpy", "ndarray"), ("numpy", "dtype")}:
            return getattr(np, name)
        if (module, name) == ("_codecs", "encode"):
            import _codecs

            return _codecs.encode
        raise PrepareError(f"a batch of CIFAR10 asks for {module}.{name}: this is not the published archive")


@dataclass
class CIFAR10(Source):
    """cifar-10-python.tar.gz or cifar-10-binary.tar.gz: 32x32 RGB pixels, written as PNG."""

    archive: Path
    name: str = "CIFAR10"
    _names: list[str] = field(default_factory=list)

    def archives(self) -> list[Path]:
        return [self.archive]

    def classes(self) -> list[str]:
        if not self._names:
            self._load()
        return self._names

    def splits(self) -> dict[str, list[Item]]:
        # pixels travel with the items: the archive is compressed, no image in it can be read alone
        found = {}
        for split, (pixels, labels) in self._load().items():
            found[split] = [
                Item(f"{split}_{row:05d}", "png", int(label), image.tobytes(), image.nbytes)
                for row, (image, label) in enumerate(zip(pixels, labels, strict=True))
            ]
        return found

    def read(self, item: Item) -> bytes:
        return png(np.frombuffer(item.where, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0))

    def _load(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """By split: pixels uint8 [n, 3072] (all red, all green, all blue; row by row) and labels [n]."""
        files = {PurePosixPath(path).name: content for path, content in unpack(self.archive).items()}
        try:
            return self._parse(files)
        except PrepareError:
            raise
        except Exception as error:  # whatever others' bytes make of the reader
            raise PrepareError(f"{self.archive} is not the published archive ({one_line(error)})") from error

    def _parse(self, files: dict[str, bytes]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        binary = "batches.meta.txt" in files
        suffix = ".bin" if binary else ""
        batches = {
            "train": sorted(name for name in files if name.startswith("data_batch_") and name.endswith(suffix)),
            "test": [f"test_batch{suffix}"],
        }
        if not batches["train"] or batches["test"][0] not in files or not (binary or "batches.meta" in files):
            raise PrepareError(f"{self.archive} is neither cifar-10-python.tar.gz nor cifar-10-binary.tar.gz")
        parse = self._parse_binary if binary else self._parse_pickle
        if binary:
            self._names = files["batches.meta.txt"].decode().split()
        else:
            self._names = [name.decode() for name in _PixelsOnly(
                io.BytesIO(files["batches.meta"]), encoding="bytes").load()[b"label_names"]]  # fmt: skip
        found = {}
        for split, names in batches.items():
            parts = [parse(files[name]) for name in names]
            found[split] = (np.concatenate([p for p, _ in parts]), np.concatenate([labels for _, labels in parts]))
        return found

    @staticmethod
    def _parse_pickle(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        batch = _PixelsOnly(io.BytesIO(content), encoding="bytes").load()
        return np.asarray(batch[b"data"], np.uint8), np.asarray(batch[b"labels"], np.int64)

    @staticmethod
    def _parse_binary(content: bytes) -> tuple[np.ndarray, np.ndarray]:
        if len(content) % 3073:
            raise PrepareError("a binary batch of CIFAR10 is not of rows of 3,073 bytes: fetch the archive again")
        rows = np.frombuffer(content, np.uint8).reshape(-1, 3073)
        return rows[:, 1:], rows[:, 0].astype(np.int64)


# ── AFHQ ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass
class AFHQCat(Source):
    """afhq.zip or afhq_v2.zip of StarGAN v2: its cats; `val` (v1) and `test` (v2) as split ``test``."""

    archive: Path
    name: str = "AFHQ Cat"

    def archives(self) -> list[Path]:
        return [self.archive]

    def classes(self) -> list[str]:
        return ["cat"]

    def splits(self) -> dict[str, list[Item]]:
        found: dict[str, list[Item]] = {"train": [], "test": []}
        try:
            with zipfile.ZipFile(self.archive) as archive:
                entries = sorted(archive.infolist(), key=lambda entry: entry.filename)
        except zipfile.BadZipFile as error:
            raise PrepareError(f"{self.archive} is not a readable zip ({error}): fetch it again") from error
        for entry in entries:
            path = PurePosixPath(entry.filename)
            extension = extension_of(path.name)
            if extension and path.parent.name == "cat":
                split = "train" if path.parent.parent.name == "train" else "test"
                found[split].append(Item(key_of(path.name), extension, 0, entry.filename, entry.file_size))
        if not found["train"]:
            raise PrepareError(f"{self.archive} has no folder train/cat: it is not afhq.zip or afhq_v2.zip")
        return {split: items for split, items in found.items() if items}

    def read(self, item: Item) -> bytes:
        if item.size > _UNPACKED:
            raise ValueError(f"it unpacks to {item.size:,} bytes")
        try:
            return _zip(self.archive, os.getpid()).read(item.where)
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise ValueError(f"damaged in the zip: {error}") from error


@functools.lru_cache(maxsize=2)
def _zip(path: Path, process: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)
