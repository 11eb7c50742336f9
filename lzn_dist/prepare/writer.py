"""From a data set as it was published to WebDataset shards with a manifest; the scripts of data_prep/ are thin.

A `Source` lists its images without reading them, and reads any one of them: archives stay packed. All images of a
split are shuffled by a keyed permutation (so that shards are alike and any run of samples is a fair one) and cut into
shards, each of which is a pure function of the source and the options: processes write them side by side, and what is
there after a stop is kept when the same command runs again. Every image is decoded once; its bytes stay as published
unless another size is asked for. The manifest comes last: a folder that has one is complete.
"""

from __future__ import annotations

import argparse
import fcntl
import hashlib
import io
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, ThreadPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol, TypeVar

import numpy as np
import webdataset as wds
from PIL import Image
from tqdm import tqdm

from lzn_dist import __version__
from lzn_dist.data.captions import TOKENIZER
from lzn_dist.data.index import MANIFEST, Shard, ShardIndex, Split, hash_file, make_split, scan_tar, write_manifest
from lzn_dist.data.pixels import convert, load_with_pillow
from lzn_dist.exit_status import told
from lzn_dist.json_files import Text, read_json
from lzn_dist.keyed_random import make_key, permutation
from lzn_dist.paths import path_argument
from lzn_dist.prepare.tokenizer import train_tokenizer
from lzn_dist.terminal import INTERRUPTED, steady_output

PLAN = ".plan.json"  # what a folder is being filled with
LOCK = ".lock"  # whoever fills the folder, and its workers, hold a lock on this file
PARTS = ".shards"  # what is known of finished shards until the manifest is written

Task = TypeVar("Task")
Result = TypeVar("Result")


class PrepareError(ValueError):
    """Shards that cannot be written as asked; the message says what to do."""


# ── what is to be written ───────────────────────────────────────────────────────────────────────────────────────────


class Item(NamedTuple):
    """One image of a source. key: of the sample, without dots in its last part; extension: of the published file;
    label: the class's number, -1 without one; where: what the source's `read` needs; size: in bytes, about;
    attributes: what else is known of it, as JSON, kept beside the image as KEY.json. captions: kept as KEY.txt, one a
    line."""

    key: str
    extension: str
    label: int
    where: Any
    size: int
    attributes: str = ""
    captions: tuple[str, ...] = ()


@dataclass
class Account:
    """What became of the files that were seen: seen = taken + those left out.

    left_out: by reason, how many and the first. images_left_out: how many of these are images, or are called so; the
    others are not worth a refusal. unit: what is counted.
    """

    unit: str = "files"
    taken: int = 0
    left_out: dict[str, tuple[int, str]] = field(default_factory=dict)
    images_left_out: int = 0

    def leave_out(self, why: str, example: str, *, image: bool = False, times: int = 1) -> None:
        count, first = self.left_out.get(why, (0, example))
        self.left_out[why] = (count + times, first)
        self.images_left_out += times * image

    @property
    def seen(self) -> int:
        return self.taken + sum(count for count, _ in self.left_out.values())

    def reasons(self) -> str:
        """In brackets, for a message; "" without any."""
        found = [f"{count} {why}, as {example}" for why, (count, example) in self.left_out.items()]
        return f" ({'; '.join(found)})" if found else ""

    def lines(self) -> Iterator[str]:
        yield f"{self.seen:,} {self.unit} seen, {self.taken:,} taken, {self.seen - self.taken:,} left out"
        for why, (count, example) in sorted(self.left_out.items(), key=lambda item: -item[1][0]):
            yield f"  {count:,} {why}, as {example}"


class Source(Protocol):
    """A data set as published. Small and picklable: each process opens the archives by itself."""

    name: str

    def splits(self) -> dict[str, list[Item]]:
        """All images by split, in an order that is always the same. Raises PrepareError and OSError."""

    def classes(self) -> list[str]:
        """Names of the classes by number, after `splits`; empty without labels."""

    def read(self, item: Item) -> bytes:
        """The bytes of one image file."""

    def archives(self) -> list[Path]:
        """Published files whose hashes are recorded."""

    def named(self, item: Item) -> str:
        """An image as its owner knows it, for messages."""
        return f"{self.name}: {item.key}.{item.extension}"

    def account(self) -> Account | None:
        """After `splits`, what became of the files of a folder; None for archives, whose content is known."""
        return None


@dataclass(frozen=True)
class Options:
    """How shards are written. A shard ends at `samples_per_shard` samples or `bytes_per_shard` source bytes.

    resize: shorter side in pixels (0: published bytes); crop: then the central square; quality: of JPEG, 0 for PNG.
    """

    output: Path
    samples_per_shard: int = 0
    bytes_per_shard: int = 256 << 20
    resize: int = 0
    crop: bool = False
    quality: int = 0
    processes: int = 1
    seed: int = 0
    skip_corrupt: bool = False

    def __post_init__(self) -> None:
        if self.samples_per_shard < 0 or self.bytes_per_shard < 1 or self.processes < 1 or self.resize < 0:
            raise PrepareError("samples and bytes per shard, processes and resize must be positive")
        if not 0 <= self.quality <= 100:
            raise PrepareError(f"quality must be 1 to 100, or 0 for PNG, not {self.quality}")
        if (self.crop or self.quality) and not self.resize:
            raise PrepareError("--crop and --quality go with --resize: without it the published bytes are kept")

    def content(self) -> dict[str, Any]:
        """The options that decide what shards hold: a finished one holds nothing damaged, left out or not."""
        return {key: value for key, value in asdict(self).items() if key not in ("output", "processes", "skip_corrupt")}


class Plan(NamedTuple):
    """One shard to write: its name and its items."""

    name: str
    items: list[Item]


def plan_shards(split: str, items: Sequence[Item], options: Options) -> Iterator[Plan]:
    """Shuffle a split's items and cut them into shards."""
    order = permutation(make_key(options.seed, f"shuffle {split}"), len(items)).tolist()
    part: list[Item] = []
    size, number = 0, 0
    for row in order:
        item = items[row]
        full = size + item.size > options.bytes_per_shard or (0 < options.samples_per_shard <= len(part))
        if part and full:
            yield Plan(f"{split}-{number:06d}.tar", part)
            part, size, number = [], 0, number + 1
        part.append(item)
        size += item.size
    if part:
        yield Plan(f"{split}-{number:06d}.tar", part)


# ── writing ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _HashedFile:
    """A file that is being written, and the SHA-256 of what was."""

    def __init__(self, file: IO[bytes]) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, content: bytes) -> int:
        self.hash.update(content)
        self.bytes += len(content)
        return self.file.write(content)


def finish_image(content: bytes, item: Item, options: Options) -> tuple[str, bytes]:
    """Check that the image can be decoded; its extension and bytes, of another size where asked for."""
    published = load_with_pillow(content)
    if not options.resize:
        return item.extension, content
    image = convert(published, published.mode in ("1", "L", "LA") or published.mode.startswith("I"))
    factor = options.resize / min(image.size)
    if factor != 1:
        size = tuple(max(options.resize, round(side * factor)) for side in image.size)
        image = image.resize((size[0], size[1]), Image.Resampling.BICUBIC)
    if options.crop:
        left, top = ((side - options.resize) // 2 for side in image.size)
        image = image.crop((left, top, left + options.resize, top + options.resize))
    buffer = io.BytesIO()
    if options.quality:
        image.save(buffer, "JPEG", quality=options.quality, subsampling=0)
        return "jpg", buffer.getvalue()
    image.save(buffer, "PNG")
    return "png", buffer.getvalue()


@dataclass
class Part:
    """What is known of a shard that is written. skipped: keys of its damaged images; example: what one was called."""

    shard: Shard
    skipped: list[Text]
    example: list[Text]


def write_shard(source: Source, options: Options, plan: Plan) -> Part:
    """Write one shard and what is known of it; returns that. Raises PrepareError for an image that is damaged."""
    skipped: list[str] = []
    examples: list[str] = []
    written = 0
    temporary = options.output / f".{plan.name}.{os.getpid()}.tmp"
    with temporary.open("wb") as file:
        hashed = _HashedFile(file)
        with wds.TarWriter(hashed, user="", group="", mode=0o644, mtime=0) as tar:
            for item in plan.items:
                try:
                    extension, content = finish_image(source.read(item), item, options)
                except ValueError as error:
                    if not options.skip_corrupt:
                        raise PrepareError(
                            f"{source.named(item)} cannot be decoded ({error}): mend it, or fetch it again, or leave "
                            "such images out with --skip-corrupt; finished shards are kept"
                        ) from error
                    skipped.append(item.key)
                    if not examples:
                        examples.append(source.named(item))
                    continue
                label = {"cls": str(item.label).encode()} if item.label >= 0 else {}
                more = {"json": item.attributes.encode()} if item.attributes else {}
                if item.captions:
                    more["txt"] = "".join(f"{caption}\n" for caption in item.captions).encode()
                tar.write({"__key__": item.key, extension: content, **label, **more})
                written += 1
        file.flush()
        os.fsync(file.fileno())
    found = Part(Shard(plan.name, written, hashed.bytes, hashed.hash.hexdigest()), skipped, examples)
    temporary.rename(options.output / plan.name)
    part = options.output / PARTS / f"{plan.name}.json"
    temporary = part.with_suffix(f".{os.getpid()}.tmp")
    temporary.write_text(json.dumps(asdict(found)))
    temporary.rename(part)
    return found


def _finished(options: Options, plan: Plan) -> Part | None:
    """What an earlier start knew of a shard that it finished; None where it is still to be written, or that is
    damaged."""
    try:
        found = read_json(options.output / PARTS / f"{plan.name}.json", Part)
        size = (options.output / plan.name).stat().st_size
    except (OSError, ValueError):
        return None
    whole = (plan.name, size, len(plan.items))
    shard = found.shard
    return found if (shard.name, shard.bytes, shard.samples + len(found.skipped)) == whole else None


def prepare(source: Source, options: Options, *, dry_run: bool = False, quiet: bool = False) -> None:
    """Write a source's shards, index and manifest to `options.output`, or go on where an earlier start stopped.

    Raises PrepareError: a folder that holds something else, too little space, a damaged image. quiet: no progress.
    """
    say: Callable[[str], None] = (lambda _: None) if quiet else partial(print, flush=True)
    splits = source.splits()
    plans = {name: list(plan_shards(name, items, options)) for name, items in splits.items()}
    for name, items in splits.items():
        _check_keys(name, items)
    for name, items in splits.items():
        size = sum(item.size for item in items)
        say(f"{name}: {len(items):,} images, {size / 1e9:.2f} GB, {len(plans[name])} shards")
    if classes := source.classes():
        say(f"{len(classes)} classes: {', '.join(classes[:3])}{' …' if len(classes) > 3 else ''}")
    account = source.account()
    if dry_run:
        if account is not None:
            say("\n".join(account.lines()))
        say(f"nothing was written (--dry-run); first sample: {next(iter(plans.values()))[0].items[0].key}")
        return
    plan: dict[str, Any] = {"source": source.name, "listing": _listing(splits), "options": options.content()}
    with _claim(options.output, plan) as complete:
        if complete:
            say(f"{options.output} is complete already")
            return
        missing = _write(source, options, splits, plans, plan, quiet)
    say(f"{options.output}: complete" + (f", {missing} damaged images left out" if missing else ""))
    if account is not None:
        say("\n".join(account.lines()))


def _write(
    source: Source,
    options: Options,
    splits: dict[str, list[Item]],
    plans: dict[str, list[Plan]],
    plan: dict[str, Any],
    quiet: bool,
) -> int:
    """Write the shards that are not there yet, index and manifest; returns how many images were left out."""
    classes, account = source.classes(), source.account()
    waiting = [plan for part in plans.values() for plan in part if _finished(options, plan) is None]
    if not options.resize:
        _check_space(options.output, sum(item.size + 2048 for plan in waiting for item in plan.items))
    count = sum(len(items) for items in splits.values())
    done = count - sum(len(plan.items) for plan in waiting)
    with (
        ThreadPoolExecutor(1) as hasher,
        tqdm(total=count, initial=done, unit="image", disable=quiet, smoothing=0.05, mininterval=0.5) as bar,
    ):
        stop = threading.Event()
        hashes = hasher.submit(lambda: [_describe(path, stop) for path in source.archives()])  # beside the writing
        try:
            for found in _run(partial(write_shard, source, options), waiting, options.processes):
                bar.update(found.shard.samples + len(found.skipped))
            archives = hashes.result()
        finally:
            stop.set()  # after an error or Ctrl-C nobody waits for the hash
    written: dict[str, Split] = {}
    skipped: dict[str, list[str]] = {}
    counts: dict[str, list[int]] = {}
    for name, items in splits.items():
        parts = [part for plan in plans[name] if (part := _finished(options, plan)) is not None]
        shards = [part.shard for part in parts if part.shard.samples]
        if not shards:
            raise PrepareError(
                f"split {name!r} has no image that can be decoded: fetch {source.name} again, and name another folder"
            )
        scanned = []
        for shard in shards:
            try:
                keys, members = scan_tar(path := options.output / shard.name)
                if len(keys) != shard.samples:
                    raise ValueError(f"{path} has {len(keys)} samples, {shard.samples} were written")
            except ValueError as error:  # damaged since it was finished
                raise PrepareError(f"{error}: remove that file and repeat the command") from error
            scanned.append((shard, keys, members))
        written[name] = make_split(scanned)
        left_out = {key for part in parts for key in part.skipped}
        for part in parts:
            if account is not None:
                account.taken -= len(part.skipped)
                for _ in part.skipped:
                    account.leave_out("damaged: cannot be decoded", part.example[0], image=True)
        if left_out:
            skipped[name] = sorted(left_out)
        if classes:
            labels = [item.label for item in items if item.key not in left_out]
            counts[name] = np.bincount(labels, minlength=len(classes)).tolist()
    captions = (caption for item in splits.get("train", ()) for caption in item.captions)
    if (first := next(captions, None)) is not None:
        (options.output / TOKENIZER).write_text(train_tokenizer(chain([first], captions)), encoding="utf-8")
    write_manifest(
        options.output, written, tool=f"lzn_dist {__version__}", classes=classes, archives=archives,
        counts=counts, skipped=skipped, account=None if account is None else asdict(account), **plan,
    )  # fmt: skip
    shutil.rmtree(options.output / PARTS)
    (options.output / PLAN).unlink()
    return sum(map(len, skipped.values()))


def _run(function: Callable[[Task], Result], tasks: Sequence[Task], processes: int) -> Iterator[Result]:
    """Results as they come; few tasks wait at a time, so that an error or a stop ends soon. Raises PrepareError where
    a process was killed."""
    if processes == 1:
        yield from map(function, tasks)
        return
    # Ctrl-C reaches the workers too, which finish the shards under way: it is held back until they know that
    held = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    with ProcessPoolExecutor(processes, initializer=_start_worker) as pool:
        waiting: set[Future[Result]] = set()
        left = iter(tasks)
        try:
            while True:
                waiting |= {pool.submit(function, task) for task in islice(left, 2 * processes - len(waiting))}
                signal.pthread_sigmask(signal.SIG_SETMASK, held)
                if not waiting:
                    return
                done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
                for future in done:
                    yield future.result()
        except BaseException as error:
            if isinstance(error, KeyboardInterrupt):
                print("stopping after the shards under way", file=sys.stderr)
            pool.shutdown(wait=True, cancel_futures=True)
            if isinstance(error, BrokenProcessPool):
                raise PrepareError("a process was killed, for want of memory perhaps: try fewer --processes") from error
            raise


def _start_worker() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A parent that is killed cannot tell its workers; they would write on, or wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_keys(split: str, items: Iterable[Item]) -> None:
    seen: set[str] = set()
    for item in items:
        if item.key in seen:
            raise PrepareError(f"split {split!r} has two images of the key {item.key!r}: rename one of them")
        if "." in item.key.rpartition("/")[2]:
            raise PrepareError(f"the key {item.key!r} has a dot, at which WebDataset would end it")
        seen.add(item.key)
    if not seen:
        raise PrepareError(f"split {split!r} has no images")


def _listing(splits: dict[str, list[Item]]) -> str:
    """A hash of what a source holds: keys, labels, sizes, attributes and captions."""
    listing = hashlib.sha256()
    for name, items in splits.items():
        for item in items:
            more = "".join(f" {part}" for part in (item.attributes, *item.captions) if part)
            line = f"{name} {item.key} {item.extension} {item.label} {item.size}{more}\n"
            listing.update(line.encode("utf-8", "surrogateescape"))
    return listing.hexdigest()


@contextmanager
def _claim(folder: Path, plan: dict[str, Any]) -> Iterator[bool]:
    """Hold the folder for this plan; True where it is complete already. PrepareError where it is somebody else's."""
    folder.mkdir(parents=True, exist_ok=True)
    if _is_complete(folder, plan):
        yield True
        return
    with (folder / LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise PrepareError(
                f"another data preparation writes to {folder}: let it finish, or name another folder"
            ) from error
        except OSError:
            pass  # a file system without locks
        complete = _is_complete(folder, plan)  # perhaps made so since
        if not complete:
            for left in [*folder.glob(".*.tmp"), *folder.glob(f"{PARTS}/*.tmp")]:
                left.unlink()
            temporary = folder / f"{PLAN}.tmp"
            temporary.write_text(json.dumps(plan))
            temporary.rename(folder / PLAN)
            (folder / PARTS).mkdir(exist_ok=True)
        yield complete
        (folder / LOCK).unlink(missing_ok=True)  # not after an error: others may wait for this very file


@dataclass
class _Settings:
    """What a folder of shards is made from, as its plan and its manifest say."""

    source: str
    listing: str
    options: dict[str, Any]


def _is_complete(folder: Path, plan: dict[str, Any]) -> bool:
    """Whether the folder has all of the plan. PrepareError where it holds something else, or a part of that."""
    complete = (folder / MANIFEST).is_file()
    if complete or (folder / PLAN).is_file():
        path = folder / (MANIFEST if complete else PLAN)
        try:
            theirs = read_json(path, _Settings)
        except ValueError as error:
            raise PrepareError(f"{error}: remove {folder} and repeat the command, or name another folder") from error
        theirs.options.pop("skip_corrupt", None)  # earlier versions had it there
        if changed := [key for key in plan if getattr(theirs, key) != plan[key]]:
            raise PrepareError(
                f"{folder} was {'written' if complete else 'begun'} with other settings ({', '.join(changed)}): repeat "
                "the first command to go on, or name another folder"
            )
    elif any(path.name not in (LOCK, f"{PLAN}.tmp") for path in folder.iterdir()):
        raise PrepareError(f"{folder} exists and is not empty: name another folder")
    return complete


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise PrepareError(f"the shards need about {needed / 1e9:.1f} GB, {folder} has {free / 1e9:.1f} GB free")


def _describe(path: Path, stop: threading.Event) -> dict[str, Any]:
    return {"name": path.name, "bytes": path.stat().st_size, "sha256": hash_file(path, stop)}


# ── the scripts ─────────────────────────────────────────────────────────────────────────────────────────────────────


def parser(description: str | None, default_output: str = "") -> argparse.ArgumentParser:
    """The options that all scripts have. Their output is steady from here on: --help | head ends without a word."""
    steady_output()
    result = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    result.add_argument(
        "--output",
        type=path_argument,
        required=not default_output,
        default=default_output or None,
        help="folder of the shards",
    )
    result.add_argument("--samples-per-shard", type=int, default=0, metavar="N", help="at most N samples a shard")
    result.add_argument(
        "--bytes-per-shard", type=int, default=256 << 20, metavar="N", help="at most N source bytes (default: 256 MiB)"
    )
    result.add_argument("--resize", type=int, default=0, metavar="N", help="shorter side in pixels (default: keep)")
    result.add_argument("--crop", action="store_true", help="with --resize: then the central square")
    result.add_argument("--quality", type=int, default=0, metavar="Q", help="with --resize: JPEG (default: PNG)")
    result.add_argument("--processes", type=int, default=os.cpu_count() or 1, metavar="N", help="default: all cores")
    result.add_argument("--seed", type=int, default=0, help="of the shuffle of all images (default: 0)")
    result.add_argument("--skip-corrupt", action="store_true", help="leave damaged images out instead of stopping")
    result.add_argument("--dry-run", action="store_true", help="say what would be written")
    return result


def run(make_source: Callable[[argparse.Namespace], Source], arguments: argparse.Namespace) -> int:
    """What a script does; returns the exit status: 0, or 2 for what the user can mend, said in one line."""
    try:
        options = Options(**{key: getattr(arguments, key) for key in Options.__dataclass_fields__})
        prepare(make_source(arguments), options, dry_run=arguments.dry_run)
    except OSError as error:
        print(f"error: {told(error, arguments.output)}", file=sys.stderr)
        return 2
    except PrepareError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; finished shards are kept: repeat the command to go on", file=sys.stderr)
        return INTERRUPTED
    return 0


# ── checking ────────────────────────────────────────────────────────────────────────────────────────────────────────


class ShardToCheck(NamedTuple):
    """A shard to look at, its path and hash. images: (key, offset, bytes) of those to be decoded."""

    path: Path
    sha256: str
    images: list[tuple[str, int, int]]


def check_shard(task: ShardToCheck) -> list[str]:
    """What is wrong with one shard."""
    path = task.path
    if hash_file(path) != task.sha256:
        return [f"{path}: its SHA-256 is not the one in {MANIFEST}"]
    problems = []
    with path.open("rb") as file:
        for key, offset, size in task.images:
            file.seek(offset)
            try:
                load_with_pillow(file.read(size))
            except ValueError as error:
                problems.append(f"{path}: sample {key} cannot be decoded: {error}")
    return problems


def check(folder: Path, *, decode: bool = False, processes: int = 1, quiet: bool = False) -> list[str]:
    """Compare shards and index with the manifest, byte for byte; returns what is wrong, empty if nothing is.

    Raises FileNotFoundError and ValueError where there is no manifest, or a shard is missing or of another size, and
    PrepareError, a ValueError, where one of its processes was killed.
    """
    if not (folder / MANIFEST).is_file():
        raise FileNotFoundError(
            f"{folder} has no {MANIFEST}: its shards were not written by data_prep/, or not all yet"
        )
    index = ShardIndex.load(folder)
    problems: list[str] = []
    tasks = []
    for name, split in index.splits.items():
        scanned = make_split((shard, *scan_tar(folder / shard.name)) for shard in split.shards)
        same = np.array_equal(scanned.keys, split.keys) and scanned.offsets.keys() == split.offsets.keys()
        if not same or any(not np.array_equal(scanned.offsets[e], split.offsets[e]) for e in split.offsets):
            problems.append(f"{folder}: the index of split {name!r} is not that of its shards")
        for shard, end in zip(split.shards, split.ends.tolist(), strict=True):
            rows = range(end - shard.samples, end)
            images = [(split.key(row), *split.images[row].tolist()) for row in rows] if decode else []
            tasks.append(ShardToCheck(folder / shard.name, shard.sha256, images))
    with tqdm(total=len(tasks), unit="shard", disable=quiet) as bar:
        for found in _run(check_shard, tasks, processes):
            problems += found
            bar.update()
    return sorted(problems)
