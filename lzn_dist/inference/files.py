"""What commands are asked about: images in files, folders and shards, and texts in files, in parts; and where the
results of a large set go, so that a stopped command goes on."""

from __future__ import annotations

import csv
import fcntl
import json
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lzn_dist.data import ShardIndex
from lzn_dist.data.captions import captions_of
from lzn_dist.data.index import ABSENT, MANIFEST
from lzn_dist.data.pixels import centre_crop, decode
from lzn_dist.inference.inputs import image_from
from lzn_dist.json_files import write_json
from lzn_dist.paths import expand_path
from lzn_dist.prepare.image_folder import image_kind, images_below

_PICTURE = re.compile(r"\d{6}.*\.png|grid\.png|list\.csv")  # what is written into a folder of pictures
MOST_TEXT = 256 << 20  # bytes of a file of texts


class InferError(ValueError):
    """What is asked for cannot be done; the message says what to give."""


@dataclass
class Asked:
    """Samples by number. names: of files, keys or lines. kind: image or text. left_out: what is no sample, and why."""

    kind: str
    names: list[str]
    paths: Sequence[Path] = ()
    texts: Sequence[str] = ()
    shards: tuple[ShardIndex, str] | None = None
    left_out: list[tuple[str, str]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.names)

    def labels(self, rows: Sequence[int]) -> list[int] | None:
        """Those of shards, −1 for a sample without one; None where there are none."""
        if self.shards is None or self.shards[0].split(self.shards[1]).labels is None:
            return None
        index, found = self.shards[0], []
        for row in rows:
            try:
                found.append(index.label(index.split(self.shards[1]), row))
            except ValueError:  # damaged
                found.append(-1)
        return found

    def image(self, row: int, channels: int, size: int, shorter: int) -> Tensor:
        """uint8 [channels, size, size]. Raises OSError and ValueError, naming it."""
        if self.shards is None:
            return image_from(self.paths[row], channels, size, shorter)
        index, split = self.shards[0], self.shards[0].split(self.shards[1])
        try:
            if split.images[row, 0] == ABSENT:
                raise ValueError("has no image")
            content = index.storage.read(split.shard_of(row).name, *split.images[row].tolist())
            return centre_crop(decode(content, channels), size, shorter or size)
        except ValueError as error:
            raise ValueError(f"{self.names[row]}: {error}") from error

    def images(
        self, rows: range, channels: int, size: int, shorter: int
    ) -> tuple[Tensor, list[int], list[tuple[str, str]]]:
        """uint8 [b, channels, size, size] of those of these samples that can be read (past the last they begin anew),
        which they are, and the others with the reasons."""
        found, kept, damaged = [], [], []
        for row in rows:
            name = self.names[row % len(self)]
            try:
                found.append(self.image(row % len(self), channels, size, shorter))
                kept.append(row)
            except (OSError, ValueError) as error:
                damaged.append((name, " ".join(str(error).split()).removeprefix(f"{name}: ")))
        images = torch.stack(found) if found else torch.zeros(0, channels, size, size, dtype=torch.uint8)
        return images, kept, damaged


def asked_for(inputs: Sequence[str], split: str = "") -> Asked:
    """What paths name: images in files and folders (also below), the shards of a folder or URL, or files with a text a
    line. split: of shards. Raises InferError, one line, for what holds neither."""
    parts = [_one(expand_path(text), split) for text in inputs]
    if len({part.kind for part in parts}) > 1:
        raise InferError("images and texts together: ask for one after the other")
    if len(parts) > 1 and any(part.shards for part in parts):
        raise InferError("shards are asked for alone: one folder of them")
    first = parts[0]
    for part in parts[1:]:
        first.names += part.names
        first.paths = [*first.paths, *part.paths]
        first.texts = [*first.texts, *part.texts]
        first.left_out += part.left_out
    if not first.names:
        why = f": {first.left_out[0][0]} is {first.left_out[0][1]}" if first.left_out else ""
        raise InferError(f"{', '.join(inputs)}: no image in it{why}")
    return first


def _one(text: str, split: str) -> Asked:
    path = Path(text)
    if "://" in text or (path.is_dir() and ((path / MANIFEST).is_file() or next(path.glob("*.tar"), None))):
        return _of_shards(text, split)
    if path.is_dir():
        found, left_out = images_below(path)
        return Asked("image", [str(each) for each in found], found, left_out=[(str(p), why) for p, why in left_out])
    try:
        with path.open("rb") as file:
            head = file.read(32)
        if image_kind(head) is not None:
            return Asked("image", [text], [path])
        if path.stat().st_size > MOST_TEXT:
            raise InferError(f"{text} is no image, and too large for a file of texts ({MOST_TEXT >> 20} MiB)")
        if b"\0" in head or path.suffix.lower() not in (".txt", ".text", ""):
            raise InferError(f"{text} is no image; texts stand in a .txt file, one a line")
        texts = captions_of(path.read_bytes())
    except OSError as error:
        raise InferError(f"{text} cannot be read ({error.strerror})") from error
    except InferError:
        raise
    except ValueError as error:
        raise InferError(f"{text} is neither an image nor a file of texts: {error}") from error
    if not texts:
        raise InferError(f"{text} is empty: it should have a text a line")
    return Asked("text", texts, texts=texts)


def _of_shards(folder: str, split: str) -> Asked:
    try:
        index = ShardIndex.load(folder)
    except (OSError, ValueError) as error:
        raise InferError(str(error)) from error
    name = split or next((name for name in ("test", "val", "train") if name in index.splits), next(iter(index.splits)))
    if name not in index.splits:
        raise InferError(f"--split {name}: {folder} has {', '.join(sorted(index.splits))}")
    own = index.split(name)
    return Asked("image", [own.key(row) for row in range(len(own))], shards=(index, name))


class Parts:
    """Where results are kept until all are there: OUTPUT.parts, with what was asked for, and a file a part."""

    def __init__(self, output: Path, request: Mapping[str, Any], overwrite: bool) -> None:
        """request: what makes another command another one. overwrite: what another one has written is replaced."""
        self.output, self.folder = output, output.with_name(output.name + ".parts")
        self.request, self.overwrite = json.loads(json.dumps(request)), overwrite

    @contextmanager
    def held(self) -> Iterator[None]:
        """Within, no other command writes there, and the parts are of this request. Raises InferError where one does,
        where the output is there already, or parts of another request are; nothing is removed then."""
        begun = self.folder.is_dir()
        if not begun:
            self._check_output()
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InferError(f"another command is writing {self.output}") from error
            except OSError:  # no locks here
                pass
            if begun:
                self._check_parts()
            elif self.output.is_dir():
                for path in self.output.iterdir():
                    if _PICTURE.fullmatch(path.name):
                        path.unlink()
            write_json(self.folder / "request.json", self.request)
            yield

    def _check_output(self) -> None:
        if not self.output.exists():
            return
        if not self.overwrite:
            raise InferError(f"{self.output} is there already: name another --output, or say --overwrite")
        if self.output.is_dir() and any(not _PICTURE.fullmatch(path.name) for path in self.output.iterdir()):
            raise InferError(f"{self.output} holds more than such a command writes: name another --output")

    def _check_parts(self) -> None:
        try:
            there = json.loads((self.folder / "request.json").read_text())
            changed = [key for key in self.request if there.get(key) != self.request[key]]
        except (OSError, ValueError, AttributeError):  # begun, and no more
            changed = []
        if changed and not self.overwrite:
            raise InferError(
                f"{self.folder} holds the beginning of another request ({', '.join(changed)} differ): finish that "
                "one, name another --output, or say --overwrite"
            )
        if changed:
            for path in self.folder.glob("part-*.npz"):
                path.unlink()

    def path(self, number: int) -> Path:
        return self.folder / f"part-{number:06d}.npz"

    def missing(self, count: int) -> list[int]:
        return [number for number in range(count) if not self.path(number).is_file()]

    def keep(self, number: int, arrays: Mapping[str, Any]) -> None:
        """A part's arrays (lists of str become one of text); seen whole or not at all."""
        temporary = self.path(number).with_suffix(".tmp.npz")
        whole: dict[str, Any] = {name: np.asarray(value) for name, value in arrays.items()}
        np.savez(temporary, **whole)
        temporary.replace(self.path(number))

    def read(self, number: int, only: Sequence[str] = (), but: Sequence[str] = ()) -> dict[str, Any]:
        """A part's arrays: those named alone, or all but some."""
        with np.load(self.path(number), allow_pickle=False) as found:
            return {name: found[name] for name in found.files if (not only or name in only) and name not in but}

    def done(self) -> None:
        shutil.rmtree(self.folder)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """CSV, or JSON lines where the name ends so."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        if path.suffix == ".jsonl":
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        else:
            writer = csv.DictWriter(file, list(rows[0]) if rows else ["name"])
            writer.writeheader()
            writer.writerows(rows)
    temporary.replace(path)


def write_vectors(path: Path, parts: Iterator[dict[str, Any]]) -> None:
    """Arrays of all parts side by side: npz (in memory), or parquet, part by part (needs pyarrow)."""
    temporary = path.with_name(path.stem + ".tmp" + path.suffix)
    if path.suffix == ".npz":
        found = list(parts)
        whole: dict[str, Any] = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
        np.savez(temporary, **whole)
    else:
        import pyarrow as pa  # type: ignore[import-not-found, import-untyped, unused-ignore]
        import pyarrow.parquet as pq  # type: ignore[import-not-found, import-untyped, unused-ignore]

        writer = None
        for part in parts:
            columns = {name: pa.array(list(value) if value.ndim == 2 else value) for name, value in part.items()}
            table = pa.table(columns)
            writer = writer or pq.ParquetWriter(temporary, table.schema)
            writer.write_table(table)
        assert writer is not None
        writer.close()
    temporary.replace(path)
