"""Images with captions, as people have them: beside the images, in a table, or in shards that img2dataset wrote."""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from tqdm import tqdm

from lzn_dist import __version__
from lzn_dist.data.captions import TOKENIZER, captions_of
from lzn_dist.data.index import MANIFEST, Shard, hash_file, make_split, scan_tar, split_name, write_manifest
from lzn_dist.keyed_random import make_key, permutation
from lzn_dist.prepare.image_folder import ImageFolder, InFolder, make_keys, table_text
from lzn_dist.prepare.tokenizer import write_tokenizer
from lzn_dist.prepare.writer import Account, Item, PrepareError

IMAGE_COLUMNS = ("image", "path", "filepath", "file_path", "filename", "file_name", "image_path", "file")
CAPTION_COLUMNS = ("caption", "captions", "text", "title", "description", "sentence")
NO_CAPTION = "an image without a caption"


class Pair(NamedTuple):
    """A line of a table. where: for messages; image: a path; captions: not empty ones; split: "" where it says none."""

    where: str
    image: str
    captions: list[str]
    split: str


def _records(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a table, by its extension, with their numbers. Raises PrepareError."""
    kind = path.suffix.lower()
    if kind == ".parquet":
        try:
            import pyarrow.parquet  # type: ignore[import-not-found, import-untyped, unused-ignore]
        except ImportError as error:
            raise PrepareError(f"{path}: reading parquet needs pyarrow: pip install pyarrow") from error
        try:
            yield from enumerate(pyarrow.parquet.read_table(path).to_pylist(), 1)
        except (OSError, ValueError) as error:
            raise PrepareError(f"{path} is no parquet file that can be read ({error})") from error
        return
    text = table_text(path)
    if kind in (".jsonl", ".json", ".ndjson"):
        for number, line in enumerate(text.splitlines(), 1):
            if line.strip():
                try:
                    row = json.loads(line)
                except ValueError as error:
                    raise PrepareError(f"{path}, line {number}: not a line of JSON ({error})") from error
                if not isinstance(row, dict):
                    raise PrepareError(f"{path}, line {number}: an object with the image and its caption is needed")
                yield number, row
        return
    header = text.partition("\n")[0]
    delimiter = "\t" if kind == ".tsv" or header.count("\t") > header.count(",") else ";" if ";" in header else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if None in row:
                raise PrepareError(f"{path}, line {reader.line_num}: more values than columns: quote them")
            yield reader.line_num, row
    except csv.Error as error:
        raise PrepareError(f"{path}, line {reader.line_num}: {error}") from error


def _column(path: Path, row: dict[str, Any], asked: str, known: Iterable[str], what: str, option: str) -> str:
    names = {str(name).strip().lower(): name for name in row}
    if asked:
        if asked.lower() not in names:
            raise PrepareError(f"{path} has no column {asked!r}: it has {', '.join(map(str, row))}")
        return str(names[asked.lower()])
    found = next((names[name] for name in known if name in names), None)
    if found is None:
        raise PrepareError(f"{path}: which column is the {what}? Name it by {option}: {', '.join(map(str, row))}")
    return str(found)


def read_pairs(path: Path, image_column: str = "", caption_column: str = "") -> Iterator[Pair]:
    """The lines of a CSV, TSV, JSON lines or parquet table; a caption may be a list of several. Raises PrepareError,
    naming the line."""
    image = caption = ""
    for number, row in _records(path):
        where = f"{path}, line {number}"
        if not image:
            image = _column(path, row, image_column, IMAGE_COLUMNS, "image", "--image-column")
            caption = _column(path, row, caption_column, CAPTION_COLUMNS, "caption", "--caption-column")
        place, said = row.get(image), row.get(caption)
        if not isinstance(place, str) or not place.strip():
            raise PrepareError(f"{where}: {image} is {place!r}, not a path")
        texts = said if isinstance(said, list) else [said]
        captions = [" ".join(text.split()) for text in texts if isinstance(text, str)]
        split = str(row.get("split") or row.get("Split") or "").strip()
        yield Pair(where, place.strip().replace("\\", "/").removeprefix("./"), [c for c in captions if c], split)


@dataclass
class ImageText(InFolder):
    """Images of a folder with captions: KEY.txt beside KEY.jpg (one caption a line), or as a table says, whose paths
    are relative to the folder. held_out: share of the images that become the split ``test``, where the folder or the
    table names none; images with a caption in common are in one split. Without a caption an image is left out, or
    kept."""

    folder: Path
    table: Path | None = None
    image_column: str = ""
    caption_column: str = ""
    held_out: float = 0.0
    keep_all: bool = False
    exclude: Path | None = None
    name: str = ""
    _account: Account = field(default_factory=Account)

    def __post_init__(self) -> None:
        self.name = self.name or f"images with captions of {self.folder.resolve().name}"
        if not self.folder.is_dir():
            raise PrepareError(f"{self.folder} is no folder")
        if not 0.0 <= self.held_out < 1.0:
            raise PrepareError(f"--held-out: a share from 0 to 1 is needed, not {self.held_out}")

    def classes(self) -> list[str]:
        return []

    def splits(self) -> dict[str, list[Item]]:
        images = ImageFolder(self.folder, labelled=False, exclude=self.exclude, max_left_out=1.0)
        found = images.splits()
        self._account = images.account()
        if self.table is None:
            self._beside(found)
        else:
            found = self._by_table({item.where: item for items in found.values() for item in items})
        for items in found.values():
            bare = [item for item in items if not item.captions]
            for item in bare if not self.keep_all else ():
                self._account.taken -= 1
                self._account.leave_out(NO_CAPTION, item.where, image=True)
            if not self.keep_all:
                items[:] = [item for item in items if item.captions]
        found = {split: items for split, items in found.items() if items}
        if not any(item.captions for items in found.values() for item in items):
            raise PrepareError(f"{self.folder} has no image with a caption{self._account.reasons()}")
        if self.held_out and set(found) == {"train"}:
            found = self._hold_out(found["train"])
        return found

    def _beside(self, found: dict[str, list[Item]]) -> None:
        """Captions of KEY.txt, or KEY.jpg.txt."""
        used = 0
        for items in found.values():
            for place, item in enumerate(items):
                path = self.folder / item.where
                for beside in (path.with_suffix(".txt"), path.with_name(f"{path.name}.txt")):
                    if beside.is_file():
                        used += 1
                        try:
                            items[place] = item._replace(captions=tuple(captions_of(beside.read_bytes())))
                        except ValueError:
                            self._account.leave_out("a caption that is not UTF-8", str(beside))
                        break
        self._recount("no image (.txt)", used)

    def _recount(self, why: str, fewer: int) -> None:
        """Files that belong to images are no files that were left out."""
        count, example = self._account.left_out.get(why, (0, ""))
        if count > fewer:
            self._account.left_out[why] = (count - fewer, example)
        else:
            self._account.left_out.pop(why, None)

    def _by_table(self, known: dict[str, Item]) -> dict[str, list[Item]]:
        assert self.table is not None
        captions: dict[str, list[str]] = {}
        splits: dict[str, str] = {}
        for pair in read_pairs(self.table, self.image_column, self.caption_column):
            if PurePosixPath(pair.image).is_absolute() or ".." in PurePosixPath(pair.image).parts:
                raise PrepareError(f"{pair.where}: {pair.image!r} is no path inside {self.folder}")
            if pair.image not in known:
                if not os.path.lexists(self.folder / pair.image):
                    raise PrepareError(f"{pair.where}: there is no {self.folder / pair.image}")
                self._account.leave_out("named in the table, but no image", pair.image, image=True)
                continue
            split = split_name(pair.split) or pair.split or "train"
            if not re.fullmatch(r"\w[\w. -]*", split):
                raise PrepareError(f"{pair.where}: {split!r} cannot be a split's name: use letters, digits and _")
            if splits.setdefault(pair.image, split) != split:
                raise PrepareError(f"{pair.where}: {pair.image} is in split {splits[pair.image]} already")
            captions.setdefault(pair.image, []).extend(pair.captions)
        for where in sorted(known.keys() - captions.keys()):
            self._account.taken -= 1
            self._account.leave_out("an image that is not in the table", where)
        found: dict[str, list[Item]] = {}
        keys = dict(zip(captions, make_keys(list(captions), ""), strict=True))
        for where in sorted(captions):
            item = known[where]._replace(key=keys[where], captions=tuple(dict.fromkeys(captions[where])))
            found.setdefault(splits[where], []).append(item)
        return found

    def _hold_out(self, items: list[Item]) -> dict[str, list[Item]]:
        groups: dict[str, int] = {}
        leader = list(range(len(items)))

        def first(row: int) -> int:
            while leader[row] != row:
                leader[row] = row = leader[leader[row]]
            return row

        for row, item in enumerate(items):
            for caption in item.captions:
                other = first(groups.setdefault(caption.lower(), row))
                leader[first(row)] = other
        members: dict[int, list[int]] = {}
        for row in range(len(items)):
            members.setdefault(first(row), []).append(row)
        room, held = round(self.held_out * len(items)), set[int]()
        order = list(members.values())
        for place in permutation(make_key(0, "held out"), len(order)).tolist():
            if len(held) + len(order[place]) <= room:
                held.update(order[place])
        if not held:
            raise PrepareError(
                f"--held-out {self.held_out:g} of {len(items)} images is none that shares no caption with the others"
            )
        return {
            "train": [item for row, item in enumerate(items) if row not in held],
            "test": [item for row, item in enumerate(items) if row in held],
        }


def adopt_shards(folder: Path, held_out: int = 0) -> list[str]:
    """Make a manifest beside shards that are there (img2dataset's 00000.tar …, with KEY.jpg and KEY.txt), which stay as
    they are; and a tokenizer, where there is none. held_out: of the last shards, which become the split ``test``.
    Returns lines for people. Raises PrepareError."""
    if (folder / MANIFEST).is_file():
        raise PrepareError(f"{folder} has a {MANIFEST} already")
    paths = sorted(folder.glob("*.tar"))
    if not paths:
        raise PrepareError(f"{folder} has no shards (*.tar)")
    if not 0 <= held_out < len(paths):
        raise PrepareError(f"--held-out-shards: less than the {len(paths)} that there are, not {held_out}")
    parts: dict[str, list[tuple[Shard, list[str], list[dict[str, tuple[int, int]]]]]] = {}
    samples = captioned = several = 0
    for place, path in enumerate(tqdm(paths, desc="shards", unit="shard", mininterval=0.5)):
        try:
            keys, members = scan_tar(path)
        except ValueError as error:
            raise PrepareError(f"{error}: fetch it again, or remove it") from error
        if not keys:
            continue
        with path.open("rb") as file:
            for sample in members:
                samples += 1
                if "txt" in sample:
                    file.seek(sample["txt"][0])
                    try:
                        found = len(captions_of(file.read(sample["txt"][1])))
                    except ValueError:
                        continue
                    captioned, several = captioned + (found > 0), several + (found > 1)
        shard = Shard(path.name, len(keys), path.stat().st_size, hash_file(path))
        parts.setdefault("test" if place >= len(paths) - held_out else "train", []).append((shard, keys, members))
    if not captioned:
        raise PrepareError(f"{folder}: none of {samples} samples has a caption (KEY.txt)")
    write_manifest(
        folder, {split: make_split(found) for split, found in parts.items()}, source=f"shards of {folder.name}",
        tool=f"lzn_dist {__version__}",
    )  # fmt: skip
    lines = [f"{samples:,} samples, {captioned:,} with a caption, {several:,} with several (lines of KEY.txt)"]
    if not (folder / TOKENIZER).exists():
        write_tokenizer(folder)
        lines.append(f"written: {folder / TOKENIZER}")
    return [*lines, f"written: {folder / MANIFEST}"]
