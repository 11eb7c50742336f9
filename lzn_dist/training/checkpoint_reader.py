"""Reading torch.distributed.checkpoint's files as what they are: data from others, on disks that can flip bits.

Its ``.metadata`` is a pickle and names files; both are taken at their word by torch's own reader. Here a pickle can
name nothing but the classes that such metadata consists of, files are those of the folder, and every tensor is compared
with the CRC-32 that torch.save wrote beside it.
"""

from __future__ import annotations

import hashlib
import io
import pickle
import zipfile
from pathlib import Path, PosixPath, PurePosixPath
from typing import IO, Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import metadata as described
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.futures import Future

from lzn_dist.terminal import one_line

SMALL_FILES = (".metadata", "run.json", "config.yaml")
OPTIONAL = ("tokenizer.json",)  # of models of text
SUMS = "SHA256SUMS"  # of these, as `sha256sum --check` reads it; older checkpoints have none

_DTYPES = {("torch", name): value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
# exactly these: through any whole module something that runs commands can be reached
_NAMES: dict[tuple[str, str], Any] = _DTYPES | {
    ("torch", "Size"): torch.Size,
    ("torch", "device"): torch.device,
    ("torch.serialization", "_get_layout"): {"torch.strided": torch.strided}.__getitem__,
    ("pathlib", "PosixPath"): PosixPath,
    ("pathlib._local", "PosixPath"): PosixPath,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StorageInfo,
    **{
        ("torch.distributed.checkpoint.metadata", name): getattr(described, name)
        for name in (
            "BytesStorageMetadata", "ChunkStorageMetadata", "Metadata", "MetadataIndex", "StorageMeta",
            "TensorProperties", "TensorStorageMetadata", "_MEM_FORMAT_ENCODING",
        )
    },
}  # fmt: skip


class _Described(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        try:
            return _NAMES[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f".metadata asks for {module}.{name}, which no checkpoint needs") from None


class CheckedReader(dcp.FileSystemReader):
    """A checkpoint's folder. What it finds wrong it raises as ValueError, pickle.UnpicklingError or
    zipfile.BadZipFile, through torch's wrappers."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._folder, self._good = path, set[tuple[str, int]]()

    def read_metadata(self, *_: Any, **__: Any) -> described.Metadata:
        with (self._folder / ".metadata").open("rb") as file:
            found = _Described(file).load()
        if not isinstance(found, described.Metadata) or not isinstance(found.storage_data, dict):
            raise ValueError(".metadata describes no checkpoint")
        for info in found.storage_data.values():
            name, place = info.relative_path, (info.offset, info.length)
            if not isinstance(name, str) or PurePosixPath(name).name != name or not name.endswith(".distcp"):
                raise ValueError(f".metadata names a file {name!r}, which is none of a checkpoint's")
            if not all(isinstance(number, int) and number >= 0 for number in place):
                raise ValueError(f".metadata has {place} for a place in {name}")
            if sum(place) > (self._folder / name).stat().st_size:
                raise ValueError(f"{name} is shorter than .metadata says")
        if getattr(found, "storage_meta", None) is None:
            found.storage_meta = described.StorageMeta()
        return found

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            info = self.storage_data[item.storage_index]
            if (info.relative_path, info.offset) not in self._good:
                self._check(info, item.storage_index.fqn)
                self._good.add((info.relative_path, info.offset))
        return super().read_data(plan, planner)

    def _check(self, info: _StorageInfo, tensor: str) -> None:
        with (self._folder / info.relative_path).open("rb") as file:
            file.seek(info.offset)
            check_saved(io.BytesIO(file.read(info.length)), f"{tensor} in {info.relative_path}")


def check_saved(file: IO[bytes], name: str) -> None:
    """What torch.save wrote, against the CRC-32 of each of its parts. Raises ValueError, naming it."""
    try:
        with zipfile.ZipFile(file) as saved:
            if any(part.compress_type != zipfile.ZIP_STORED for part in saved.infolist()):
                raise ValueError("it is compressed, as torch.save's are not")
            damaged = saved.testzip()
    except (zipfile.BadZipFile, EOFError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ValueError(f"{name} cannot be read: {error}") from error
    if damaged is not None:
        raise ValueError(f"{name} is not what was written: its checksum differs")


def read_saved(path: Path, device: torch.device) -> Any:
    """A small file of torch.save's: tensors and plain values, checked. Raises OSError and ValueError, naming it."""
    content = io.BytesIO(path.read_bytes())
    check_saved(content, str(path))
    content.seek(0)
    try:
        return torch.load(content, map_location=device, weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} cannot be read: {one_line(error)}") from error


def write_sums(folder: Path) -> None:
    """Beside files that are complete; synced by the caller."""
    names = [*SMALL_FILES, *(name for name in OPTIONAL if (folder / name).is_file())]
    lines = [f"{hashlib.sha256((folder / name).read_bytes()).hexdigest()}  {name}\n" for name in names]
    (folder / SUMS).write_text("".join(lines))


def check_sums(folder: Path) -> None:
    """ValueError, naming the file, where one is not what was written; OSError where it is gone."""
    try:
        lines = (folder / SUMS).read_text().splitlines()
    except FileNotFoundError:
        return
    sums = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    if set(sums) - set(OPTIONAL) != set(SMALL_FILES):
        raise ValueError(f"{SUMS} is damaged")
    for name, digest in sums.items():
        if hashlib.sha256((folder / name).read_bytes()).hexdigest() != digest:
            raise ValueError(f"{name} is not what was written: its checksum differs from the one in {SUMS}")
