"""People's own images: which files of a folder are samples, of which class and split, and what became of the rest.

What is an image is decided by a file's first bytes, not by its name. Nothing is left out unsaid: every file is taken or
left out for a reason, and an `Account` counts both.
"""

from __future__ import annotations

import csv
import io
import math
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from PIL import features
from tqdm import tqdm

from lzn_dist.data.index import IMAGE_EXTENSIONS, SPLITS, split_name
from lzn_dist.prepare.writer import Account, Item, PrepareError, Source

NO_LABEL = -1
NOSPLITS = "none"
_THREADS = 16  # that look into files at once: on a network's disk each look waits
_LOOK_LIKE_IMAGES = {
    *IMAGE_EXTENSIONS, "heic", "heif", "jp2", "svg", "psd", "ico",
    "dng", "cr2", "cr3", "nef", "arw", "orf", "rw2", "raf",
}  # fmt: skip
_PASSED_OVER = {"__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "system volume information"}
_PLAIN = re.compile(r"[\w][\w. -]*")  # a split's name becomes a file's


def image_kind(head: bytes) -> str | None:
    """The extension of an image's format, from the first 32 bytes of its file; None where it is none that is read."""
    if head.startswith(b"\xff\xd8\xff"):
        return "jpg"
    if head.startswith(b"\x89PNG\r\n\x1a\n"):
        return "png"
    if head.startswith(b"RIFF") and head[8:12] == b"WEBP":
        return "webp"
    if head.startswith((b"GIF87a", b"GIF89a")):
        return "gif"
    if head.startswith((b"II*\0", b"MM\0*")) and head[8:10] != b"CR":  # Canon's raw images begin as TIFF does
        return "tif"
    if head.startswith(b"BM") and head[6:10] == b"\0\0\0\0":
        return "bmp"
    if re.match(rb"P[56]\s", head):
        return {53: "pgm", 54: "ppm"}[head[1]]
    if head[4:8] == b"ftyp" and head[8:12] in (b"avif", b"avis") and features.check("avif"):
        return "avif"
    return None


TWICE = "a link to a folder that is there itself"


class _File(NamedTuple):
    """path: from the folder on. kind: extension of an image's format; why: why it is left out, "" where it is taken."""

    path: str
    kind: str = ""
    size: int = 0
    why: str = ""


def _look(folder: Path, path: str) -> _File:
    """Open a file and see what it is."""
    name = PurePosixPath(path).name
    suffix = name.rpartition(".")[2].lower() if "." in name else ""
    try:
        status = (folder / path).stat()
        if not stat.S_ISREG(status.st_mode):
            return _File(path, why="no regular file")
        with (folder / path).open("rb", buffering=0) as file:
            head = file.read(32)
    except FileNotFoundError:
        return _File(path, why="a link that leads nowhere")
    except OSError as error:
        return _File(path, why=f"cannot be opened ({error.strerror})")
    kind = image_kind(head)
    raw = suffix in ("dng", "nef", "arw", "cr2", "orf", "rw2", "raf")
    if kind is not None and not raw:
        return _File(path, kind, status.st_size)
    if not head:
        return _File(path, why="empty")
    called = f".{suffix}" if re.fullmatch(r"\w{1,8}", suffix) else "without extension"
    image = "an image of a format that is not read" if raw or head[4:8] == b"ftyp" else "no image"
    return _File(path, why=f"{image} ({called})")


def _hidden(name: str) -> bool:
    return name.startswith(".") or name.lower() in _PASSED_OVER


def _walk(folder: Path, exclude: Path | None) -> Iterator[tuple[str, str]]:
    """(path, why it is left out) of all files below a folder, in an order that is always the same.

    Folders that are links are followed, each real folder once: one that is there itself counts before a link to it.
    """
    links: list[str] = []
    seen: set[tuple[int, int]] = set()
    if exclude is not None and exclude.exists():
        own = exclude.stat()
        seen.add((own.st_dev, own.st_ino))  # what is being written

    def below(place: str, hidden: bool) -> Iterator[tuple[str, str]]:
        try:
            status = (folder / place).stat()
            if (status.st_dev, status.st_ino) in seen:
                return
            seen.add((status.st_dev, status.st_ino))
            entries = sorted(os.scandir(folder / place), key=lambda entry: entry.name)
        except OSError as error:
            yield place, f"cannot be opened ({error.strerror})"
            return
        for entry in entries:
            path = f"{place}/{entry.name}" if place else entry.name
            passed_over = hidden or _hidden(entry.name)
            if entry.is_dir(follow_symlinks=False):
                yield from below(path, passed_over)
            elif entry.is_symlink() and entry.is_dir() and not passed_over:
                links.append(path)
            else:
                yield path, "hidden, or what systems add to folders" if passed_over else ""

    yield from below("", False)
    for link in links:  # grows
        status = (folder / link).stat()
        if (status.st_dev, status.st_ino) in seen:
            yield link, TWICE
        else:
            yield from below(link, False)


def images_below(folder: Path) -> tuple[list[Path], list[tuple[Path, str]]]:
    """The images in a folder and below it, in an order that is always the same, and what else is there, with the reason
    why it is none; what is hidden, and what systems add to folders, is passed over."""
    found = [path for path, why in _walk(folder, None) if not why]
    with ThreadPoolExecutor(_THREADS) as threads:
        files = list(threads.map(lambda path: _look(folder, path), found))
    taken = [folder / file.path for file in files if not file.why]
    return taken, [(folder / file.path, file.why) for file in files if file.why]


class InFolder(Source):
    """Files of a folder, as a table says or as they lie there."""

    folder: Path
    table: Path | None
    _account: Account

    def archives(self) -> list[Path]:
        return [] if self.table is None else [self.table]

    def account(self) -> Account:
        return self._account

    def named(self, item: Item) -> str:
        return str(self.folder / item.where)

    def read(self, item: Item) -> bytes:
        return (self.folder / item.where).read_bytes()


@dataclass
class ImageFolder(InFolder):
    """Images in folders: FOLDER/CLASS/…, FOLDER/SPLIT/CLASS/…, or as a CSV file says.

    labelled: whether folders are classes; else there are none. table: CSV with a header and the columns path (relative
    to the folder), label (a class's name) and, if wanted, split. split_folders: the folders at the top that are splits,
    by comma, or "none"; without it, those with the names of such. allow_empty: classes without images keep their
    number. max_left_out: share of the files that are images, or are called so, that may be left out. exclude: a folder
    that is not looked into.
    """

    folder: Path
    labelled: bool = True
    table: Path | None = None
    name: str = ""
    split_folders: str = ""
    allow_empty: bool = False
    max_left_out: float = 0.01
    exclude: Path | None = None
    _classes: list[str] = field(default_factory=list)
    _account: Account = field(default_factory=Account)

    def __post_init__(self) -> None:
        self.name = self.name or f"image folder {self.folder.resolve().name}"
        if not self.folder.is_dir():
            raise PrepareError(f"{self.folder} is no folder")

    def classes(self) -> list[str]:
        return self._classes

    def splits(self) -> dict[str, list[Item]]:
        self._account = Account()
        rows = self._from_table() if self.table is not None else self._from_folders()
        if not rows:
            raise PrepareError(f"{self.folder} has no images that can be taken{self._account.reasons()}")
        self._check_left_out(len(rows))
        self._classes = sort_classes({label for _, _, label in rows if label} | self._named_classes)
        self._check_empty({label for _, _, label in rows})
        number = {name: label for label, name in enumerate(self._classes)}
        found: dict[str, list[Item]] = {}
        for split in sorted({split for split, _, _ in rows}, key=_order_of_splits):
            part = [(file, label) for where, file, label in rows if where == split]
            keys = make_keys([file.path for file, _ in part], self._top(split))
            found[split] = [
                Item(key, file.kind, number.get(label, NO_LABEL), file.path, file.size)
                for key, (file, label) in zip(keys, part, strict=True)
            ]
        self._account.taken = len(rows)
        return found

    # ── folders ──

    def _from_folders(self) -> list[tuple[str, _File, str]]:
        """(split, file, class) of all that are taken."""
        listed = list(_walk(self.folder, self.exclude))
        for path, why in listed:
            if why:
                self._account.leave_out(why, path)
        files: list[_File] = []
        for file in self._look_into([path for path, why in listed if not why]):
            if file.why:
                self._leave_out(file)
            else:
                files.append(file)
        tops = self._split_folders([file.path for file in files])
        self._tops = {split: top for top, split in tops.items()}
        rows: list[tuple[str, _File, str]] = []
        for file in files:
            parts = file.path.split("/")
            if tops and parts[0] not in tops:
                # folders that are none were asked about, or left out on purpose; what lies loose was not
                self._account.leave_out("in none of the splits", file.path, image=not self.split_folders)
                continue
            split = tops.get(parts[0], "train")
            inner = parts[1:] if tops else parts
            if self.labelled and len(inner) < 2:
                self._account.leave_out("an image in no class's folder", file.path, image=True)
                continue
            rows.append((split, file, inner[0] if self.labelled else ""))
        if self.labelled and not rows and files:
            raise PrepareError(f"{self.folder} has its images outside of class folders: give --unlabelled or --csv")
        again = {path for path, why in listed if why == TWICE}
        self._named_classes = self._class_folders(tops, again) if self.labelled else set()
        return rows

    def _look_into(self, paths: Sequence[str]) -> Iterator[_File]:
        with ThreadPoolExecutor(_THREADS) as pool, tqdm(
            total=len(paths), desc="listing", unit="file", mininterval=0.5, delay=2.0
        ) as bar:  # fmt: skip
            for start in range(0, len(paths), 10_000):  # an interrupt must not wait for millions
                for file in pool.map(lambda path: _look(self.folder, path), paths[start : start + 10_000]):
                    bar.update()
                    yield file

    def _leave_out(self, file: _File) -> None:
        suffix = file.path.rpartition(".")[2].lower()
        image = suffix in _LOOK_LIKE_IMAGES or "an image of" in file.why
        self._account.leave_out(file.why, file.path, image=image)

    def _split_folders(self, paths: Sequence[str]) -> dict[str, str]:
        """The folders at the top that are splits, and how these are called; empty where there are none. PrepareError
        where that is not clear."""
        if self.split_folders == NOSPLITS:
            return {}
        flat, deep = Counter[str](), Counter[str]()
        for path in paths:
            parts = path.split("/")
            (flat if len(parts) == 2 else deep)[parts[0]] += len(parts) > 1
        tops = sorted(top for top in flat | deep if "/" not in top and flat[top] + deep[top])
        if self.split_folders:
            return self._given_splits(tops)
        known = {top: split for top in tops if (split := split_name(top)) is not None}
        others = [top for top in tops if top not in known]
        inside = deep if self.labelled else flat | deep
        if not any(inside[top] for top in known):
            if len(known) > 1 and self.labelled:
                raise PrepareError(
                    f"{self.folder}: {_list(known)} are called as splits are, but have no folders of classes: give "
                    "--unlabelled, or --csv, or --splits none where they are classes"
                )
            return {}
        clear = "train" in known.values() and len(set(known.values())) == len(known)
        if not self.labelled and (others or not clear):
            return {}
        bare = [top for top in known if self.labelled and not deep[top]]
        if bare:
            raise PrepareError(
                f"{self.folder}/{bare[0]} has {flat[bare[0]]} images in no class folders, unlike other splits: sort "
                "them into folders, name their labels with --csv, or leave them out with "
                f"--splits {','.join(top for top in known if top not in bare)}"
            )
        if others or not clear:
            raise PrepareError(
                f"{self.folder} holds {_list(tops)}: which are splits? Name them, as in --splits {','.join(known)}"
                f"{' (others are left out then)' if others else ''}, or --splits none where all are classes"
            )
        return known

    def _given_splits(self, tops: Sequence[str]) -> dict[str, str]:
        given = [name.strip().strip("/") for name in self.split_folders.split(",") if name.strip()]
        if missing := [name for name in given if name not in tops]:
            raise PrepareError(
                f"--splits {self.split_folders}: {self.folder} has no images in {_list(missing)}; it has {_list(tops)}"
            )
        found = {name: split_name(name) or name for name in given}
        _check_split_names(found.values(), "--splits")
        if len(set(found.values())) < len(found):
            raise PrepareError(f"--splits {self.split_folders}: two are called {_list(sorted(found.values()))} then")
        return found

    def _class_folders(self, tops: dict[str, str], again: set[str]) -> set[str]:
        """The folders that stand for classes, also those without an image. again: links that are not followed."""
        found: set[str] = set()
        for top in [f"{top}/" for top in tops] or [""]:
            for entry in os.scandir(self.folder / top):
                passed_over = _hidden(entry.name) or f"{top}{entry.name}" in again or self._is_excluded(entry)
                if entry.is_dir() and not passed_over:
                    found.add(entry.name)
        return found

    def _is_excluded(self, entry: os.DirEntry[str]) -> bool:
        return self.exclude is not None and self.exclude.exists() and self.exclude.samefile(entry.path)

    _named_classes: set[str] = field(default_factory=set)
    _tops: dict[str, str] = field(default_factory=dict)

    def _top(self, split: str) -> str:
        """What paths of a split begin with, which their keys do not."""
        return f"{self._tops[split]}/" if split in self._tops else ""

    # ── refusals ──

    def _check_left_out(self, taken: int) -> None:
        left = self._account.images_left_out
        if left > self.max_left_out * (taken + left):
            share = math.ceil(1000 * left / (taken + left)) / 1000
            raise PrepareError(
                f"{left} of {taken + left} images of {self.folder} would be left out{self._account.reasons()}: mend "
                f"them, or allow it with --max-left-out {share:g}"
            )

    def _check_empty(self, labels: set[str]) -> None:
        empty = [name for name in self._classes if name not in labels]
        if empty and not self.allow_empty:
            raise PrepareError(
                f"{_list(empty)}: {'a class' if len(empty) == 1 else 'classes'} without an image that can be taken"
                f"{self._account.reasons()}; remove the folder, or keep its number with --allow-empty-classes"
            )

    # ── a table ──

    def _from_table(self) -> list[tuple[str, _File, str]]:
        assert self.table is not None
        lines = list(read_table(self.table))
        labelled = any(line.label for line in lines)
        seen: dict[str, int] = {}
        for line in lines:
            where = f"{self.table}, line {line.number}"
            if not line.path or PurePosixPath(line.path).is_absolute() or ".." in PurePosixPath(line.path).parts:
                raise PrepareError(f"{where}: {line.path!r} is no path inside {self.folder}")
            if not os.path.lexists(self.folder / line.path):
                raise PrepareError(f"{where}: there is no {self.folder / line.path}")
            if line.path in seen:
                raise PrepareError(f"{where}: {line.path} stands in line {seen[line.path]} already")
            if labelled and not line.label:
                raise PrepareError(f"{where}: {line.path} has no label, others have: give each row one, or none")
            seen[line.path] = line.number
        _check_split_names({line.split for line in lines}, str(self.table))
        rows: list[tuple[str, _File, str]] = []
        for line, file in zip(lines, self._look_into([line.path for line in lines]), strict=True):
            if file.why:
                self._account.leave_out(file.why, file.path, image=True)  # it was named
            else:
                rows.append((split_name(line.split) or line.split, file, line.label))
        self._named_classes = {line.label for line in lines if line.label}
        self._tops = {split: split for split, _, _ in rows}
        return rows


def _list(names: Iterable[str]) -> str:
    found = list(names)
    return ", ".join(found[:8]) + (f" and {len(found) - 8} more" if len(found) > 8 else "")


def _order_of_splits(name: str) -> tuple[int, str]:
    return (list(SPLITS).index(name) if name in SPLITS else len(SPLITS)), name


def _check_split_names(names: Iterable[str], where: str) -> None:
    for name in names:
        if not _PLAIN.fullmatch(name):
            raise PrepareError(f"{where}: {name!r} cannot be a split's name: use letters, digits and _")


def sort_classes(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their numbers: as numbers where all are."""
    found = sorted(names)
    if all(re.fullmatch(r"[0-9]+", name) for name in found):
        found.sort(key=lambda name: (int(name), name))
    return found


def make_keys(paths: Sequence[str], top: str) -> list[str]:
    """A sample's key for each file: its path without `top` and an image's extension, and without dots in the file's
    name, at which WebDataset would end it; where two would have the same, with the extension."""

    def key(path: str, whole: bool) -> str:
        folder, _, file = path.removeprefix(top).rpartition("/")
        stem, dot, suffix = file.rpartition(".")
        name = file if whole or not dot or not stem or suffix.lower() not in _LOOK_LIKE_IMAGES else stem
        return f"{folder}/{name.replace('.', '_')}" if folder else name.replace(".", "_")

    keys = [key(path, False) for path in paths]
    count = Counter(keys)
    keys = [key(path, True) if count[short] > 1 else short for path, short in zip(paths, keys, strict=True)]
    taken = set[str]()
    for place, name in enumerate(keys):
        free, more = name, 2
        while free in taken or (free != name and free in count):
            free, more = f"{name}_{more}", more + 1
        taken.add(free)
        keys[place] = free
    return keys


class _Line(NamedTuple):
    number: int
    path: str
    label: str
    split: str


def table_text(path: Path) -> str:
    """Of a table as Excel and others write it: UTF-8 or UTF-16, else Windows' cp1252. Raises PrepareError."""
    content = path.read_bytes()
    try:
        return content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except UnicodeDecodeError:
        try:
            text = content.decode("cp1252")
        except UnicodeDecodeError as error:
            raise PrepareError(f"{path} is text in no encoding that is read: save it as CSV UTF-8") from error
        tqdm.write(f"{path} is not UTF-8: read as Windows' cp1252")
    return text


def read_table(path: Path) -> Iterator[_Line]:
    """The lines of a CSV as Excel and others write it: UTF-8 or UTF-16, else Windows' cp1252; commas, semicolons, tabs.
    PrepareError, naming the line, where it cannot be read."""
    text = table_text(path)
    lines = io.StringIO(text, newline="")
    header = lines.readline()
    before = 0
    if header.lower().startswith("sep="):  # Excel's own line
        header, before = lines.readline(), 1
    names: list[str] = []
    for delimiter in ",;\t|":
        names = [name.strip().lower() for name in next(csv.reader([header], delimiter=delimiter), [])]
        if {"path", "label"} <= set(names):
            break
    else:
        raise PrepareError(f"{path} needs a header with the columns path and label, perhaps split; it is {header!r}")
    reader = csv.reader(lines, delimiter=delimiter)
    try:
        for row in reader:
            number = reader.line_num + 1 + before
            if not any(value.strip() for value in row):
                continue
            if len(row) > len(names):
                raise PrepareError(f"{path}, line {number}: {len(row)} values for {len(names)} columns: quote them")
            values = dict(zip(names, (value.strip() for value in row), strict=False))
            place = values.get("path", "").replace("\\", "/").removeprefix("./")
            yield _Line(number, place, values.get("label", ""), values.get("split") or "train")
    except csv.Error as error:
        raise PrepareError(f"{path}, line {reader.line_num + 1 + before}: {error}") from error
